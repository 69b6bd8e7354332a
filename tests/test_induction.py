"""The copying circuit that small models may start from does what it is for, before any training."""

from __future__ import annotations

import pytest
import torch

from hcot_lmeval.training.config import TinyConfig
from hcot_lmeval.training.tiny import LOOK_BACK, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SHAPE = TinyConfig(start="induction")


def attention_of(model, ids: list[int], layer: int) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([ids]), output_attentions=True).attentions[layer][0]  # [heads, query, key]


def test_heads_look_back_by_their_offset() -> None:
    """Attention weights of the first layer, from the biases alone, peak at the offset wherever it exists."""
    model = tiny_model(TOKENIZER, SHAPE)
    attention = model.model.layers[0].self_attn
    for module in (attention.q_proj, attention.k_proj):
        module.weight.data.zero_()
    weights = attention_of(model, torch.randint(len(TOKENIZER), (40,)).tolist(), 0)
    for head, offset in enumerate(LOOK_BACK):
        expected = torch.arange(offset, 40) - offset
        assert torch.equal(weights[head, offset:].argmax(-1), expected)
        assert weights[head, 10:].max(-1).values.min() > 0.5


@pytest.mark.parametrize("start, found", [("induction", True), ("random", False)])
def test_untrained_model_looks_for_what_followed_before(start, found) -> None:
    """Some head of the second layer attends to the token behind an earlier occurrence, far above chance (1 in 60)."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randperm(len(TOKENIZER), generator=generator)[:30].tolist()
    weights = attention_of(tiny_model(TOKENIZER, TinyConfig(start=start)), words + words, 1)
    seen = torch.stack([weights[:, 30 + i, i + 1] for i in range(3, 29)]).max(-1).values
    assert (seen.mean() > 5 / 60) == found


def test_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (tiny_model(TOKENIZER, SHAPE, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize("small", [{"layers": 1}, {"heads": 3}, {"hidden_size": 96}])
def test_a_model_too_small_for_it_is_told(small) -> None:
    with pytest.raises(ValueError, match="start: induction needs 2 layers"):
        tiny_model(TOKENIZER, TinyConfig(start="induction", **small))
