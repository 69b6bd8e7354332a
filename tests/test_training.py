"""Training on compiled traces: the loss is the decoder's own, and it falls."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoTokenizer

from hcot_lmeval.synthetic import gold_trace, problems
from hcot_lmeval.tokens import encode_prompt, marker_ids
from hcot_lmeval.trace import LiveContext, Policy
from hcot_lmeval.training.loop import LoopConfig, arithmetic_plans, batches, held_out_loss, mean_loss, train
from hcot_lmeval.training.tiny import LOOK_BACK, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def stream(config: LoopConfig, split="train", depths=(1, 2), policy=Policy.RECOMPUTE):
    return batches(arithmetic_plans(TOKENIZER, split, depths, policy=policy), config, TOKENIZER.pad_token_id)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_tokenizer_keeps_every_character_of_a_trace(depth: int, tmp_path) -> None:
    problem = next(problems("train", [depth]))
    text = problem.prompt + gold_trace(problem)
    TOKENIZER.save_pretrained(tmp_path)
    tiny_model(TOKENIZER).save_pretrained(tmp_path)
    for tokenizer in (TOKENIZER, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == TOKENIZER.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert ids.count(marker_ids(tokenizer).close) == problem.blocks


def test_loss_of_a_batch_is_that_of_the_decoder() -> None:
    """The slow twin forwards the live context anew for each generated token of the same problems."""
    config = LoopConfig(steps=1, rows=1, row_length=200)
    model = tiny_model(TOKENIZER).eval()
    losses = []
    for problem in itertools.islice(problems("train", [1, 2]), 4):
        context = LiveContext(marker_ids(TOKENIZER))
        for token in encode_prompt(TOKENIZER, problem.prompt):
            context.push_inert(token)
        for token in [*TOKENIZER.encode(gold_trace(problem)), TOKENIZER.eos_token_id]:
            with torch.no_grad():
                logits = model(torch.tensor([context.live])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[token].item())
            context.push(token)
    plans = list(itertools.islice(arithmetic_plans(TOKENIZER, "train", [1, 2]), 4))
    assert sum(map(len, plans)) <= config.row_length  # nothing is cut
    [batch] = batches(plans, config, TOKENIZER.pad_token_id)
    assert mean_loss(model, batch).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("policy", Policy)
def test_a_few_steps_lower_the_held_out_loss(policy: Policy) -> None:
    config = LoopConfig(steps=30, rows=2, row_length=128, warmup=5, evaluate_every=10)
    model = tiny_model(TOKENIZER)
    held_out = list(itertools.islice(stream(config, "validation", policy=policy), 2))
    before = held_out_loss(model, held_out)
    curve = train(model, stream(config, policy=policy), held_out, config, progress=False)
    assert [point["step"] for point in curve] == [10, 20, 30]
    assert curve[-1]["held_out_loss"] == pytest.approx(held_out_loss(model, held_out))
    assert curve[-1]["held_out_loss"] < 0.5 * before


def test_training_is_reproducible() -> None:
    config = LoopConfig(steps=3, rows=1, row_length=64)
    held_out = [next(stream(config, "validation"))]
    curves = [train(tiny_model(TOKENIZER, 1), stream(config), held_out, config, progress=False) for _ in range(2)]
    assert curves[0] == curves[1]


def test_learning_rate_rises_holds_and_falls() -> None:
    config = LoopConfig(steps=100, warmup=10, decay=0.4)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:61] == [1.0] * 52
    assert rates[60:] == sorted(rates[60:], reverse=True) and rates[-1] == pytest.approx(1 / 40)


def first_attention(model, ids: list[int], layer: int) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([ids]), output_attentions=True).attentions[layer][0]  # [heads, query, key]


def test_heads_look_back_by_their_offset() -> None:
    """Attention weights of the first layer, from the biases alone, peak at the offset wherever it exists."""
    model = tiny_model(TOKENIZER)
    attention = model.model.layers[0].self_attn
    for module in (attention.q_proj, attention.k_proj):
        module.weight.data.zero_()
    weights = first_attention(model, torch.randint(len(TOKENIZER), (40,)).tolist(), 0)
    for head, offset in enumerate(LOOK_BACK):
        expected = torch.arange(offset, 40) - offset
        assert torch.equal(weights[head, offset:].argmax(-1), expected)
        assert weights[head, 10:].max(-1).values.min() > 0.5


def test_untrained_model_looks_for_what_followed_before() -> None:
    """Some head of the second layer attends to the token behind an earlier occurrence, far above chance."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randperm(len(TOKENIZER), generator=generator)[:30].tolist()
    weights = first_attention(tiny_model(TOKENIZER), words + words, 1)
    found = torch.stack([weights[:, 30 + i, i + 1] for i in range(3, 29)]).max(-1).values
    assert found.mean() > 5 / 60
