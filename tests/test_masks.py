"""All forms of the mask say what the plan says, and models under them compute what the slow twins compute."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import CONFIG_MAPPING

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.masks import attention_masks, block_mask, dense_mask
from hcot_lmeval.trace import IGNORE, Plan, Policy, compile_trace
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import MARKERS, reference_logits
from tests.tiny import tiny_model

MARKS = MarkerIds(open=1, split=2, close=3)
KINDS = ("qwen2", "qwen3", "llama", "mistral", "gemma2")
PAD = 0
traces = st.lists(st.integers(1, 6), min_size=2, max_size=40)
policies = st.sampled_from(Policy)


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Deaths and positions [B, T]: plans, and numbers without sense, for which the masks are defined as well."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    if draw(st.booleans()):
        ids = [draw(st.lists(st.integers(1, 6), min_size=tokens, max_size=tokens)) for _ in range(batch)]
        plans = [compile_trace(one, 1, MARKS, draw(policies)) for one in ids]
        return row_of(*plans)[:2]
    lives = st.lists(st.integers(1, tokens), min_size=batch * tokens, max_size=batch * tokens)
    index = torch.arange(tokens)
    death = (index + torch.tensor(draw(lives)).view(batch, tokens)).clamp(max=tokens)
    return death, torch.tensor(draw(lives)).view(batch, tokens)


def row_of(*plans: Plan, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Puts plans one behind the other in a row and padding behind them: deaths, positions and ids, [1, T]."""
    death, positions, ids = [], [], []
    for plan in plans:
        death += [len(ids) + end for end in plan.death]
        positions += plan.positions
        ids += plan.ids
    death += range(len(ids) + 1, len(ids) + padding + 1)
    return tuple(torch.tensor([x + y]) for x, y in ((death, []), (positions, [0] * padding), (ids, [PAD] * padding)))


# --- the masks --------------------------------------------------------------------------------------------------------


@given(st.lists(traces, min_size=1, max_size=4), policies, st.integers(0, 5))
def test_mask_is_the_visibility_of_each_plan(documents: list[list[int]], policy: Policy, padding: int) -> None:
    """Documents in one row do not see each other, and padding sees itself."""
    plans = [compile_trace(ids, 1, MARKS, policy) for ids in documents]
    mask = dense_mask(row_of(*plans, padding=padding)[0])
    each = [torch.tensor([[p.visible(q, k) for k in range(len(p))] for q in range(len(p))]) for p in plans]
    assert torch.equal(mask, torch.block_diag(*each, *([torch.ones(1, 1)] * padding)).bool()[None, None])


@given(rows(), st.integers(1, 20))
def test_window_is_measured_in_positions(row: tuple[torch.Tensor, torch.Tensor], window: int) -> None:
    death, positions = row
    mask = dense_mask(death, positions, window)
    for b, at in enumerate(positions.tolist()):
        near = [[q - k < window for k in at] for q in at]
        assert torch.equal(mask[b, 0], dense_mask(death)[b, 0] & torch.tensor(near))


@given(rows(), st.sampled_from([2, 4, 8, 16, 128]))
def test_block_mask_is_what_trying_all_pairs_finds(row: tuple[torch.Tensor, torch.Tensor], block: int) -> None:
    death, (batch, tokens) = row[0], row[0].shape
    ours = block_mask(death, block=block)
    theirs = create_block_mask(ours.mask_mod, batch, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for kind in (name, f"full_{name}"):
            assert torch.equal(getattr(ours, kind), getattr(theirs, kind)), kind
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert (ours.shape, ours.BLOCK_SIZE) == (theirs.shape, theirs.BLOCK_SIZE)


@given(rows(), st.sampled_from([2, 4, 8, 16, 128]), st.none() | st.integers(1, 40))
def test_kernel_that_trusts_the_blocks_sees_the_dense_mask(
    row: tuple[torch.Tensor, torch.Tensor], block: int, window: int | None
) -> None:
    """A kernel skips unlisted blocks, asks for each pair of a partial block, and does not ask within full ones."""
    death, positions = row
    found = block_mask(death, positions, window, block)
    assert torch.equal(as_the_kernel_sees(found), dense_mask(death, positions, window))


def as_the_kernel_sees(mask: BlockMask) -> torch.Tensor:
    batch, _, tokens, _ = mask.shape
    size = mask.BLOCK_SIZE[0]
    seen = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        for i in range(mask.kv_indices.shape[2]):
            rows = torch.arange(i * size, min((i + 1) * size, tokens))
            for j in mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist():
                columns = torch.arange(j * size, min((j + 1) * size, tokens))
                b_, h, q, k = torch.tensor(b), torch.tensor(0), rows[:, None], columns[None, :]
                seen[b, 0, q, k] = mask.mask_mod(b_, h, q, k)
            for j in mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist():
                seen[b, 0, rows, j * size : (j + 1) * size] = True
    return seen


def test_blocks_are_skipped_and_full_where_that_is_known() -> None:
    """Were all blocks partial, the mask would be right and FlexAttention slow."""
    tokens, block = 128, 16
    death = torch.full((1, tokens), tokens)
    death[:, 16:64] = 64  # three blocks of keys that die where a block of queries begins
    index, positions = torch.arange(tokens // block), torch.arange(tokens)[None]
    hidden = (index >= 4)[:, None] & (index >= 1) & (index < 4)
    visible = (index < index[:, None]) & ~hidden
    plain = block_mask(death, block=block)
    assert plain.full_kv_num_blocks.flatten().tolist() == visible.sum(1).tolist()
    assert plain.kv_num_blocks.flatten().tolist() == [1] * len(index)
    narrow = block_mask(death, positions, window=17, block=block)
    assert narrow.full_kv_num_blocks.sum() == 0
    assert narrow.kv_num_blocks.flatten().tolist() == [1, 2, 2, 2, 1, 2, 2, 2]


@pytest.mark.parametrize("make", [dense_mask, block_mask])
@pytest.mark.parametrize(
    ("death", "message"), [([1, 1], r"shape \(2,\)"), ([[1, 1]], "at least k \\+ 1"), ([[0, 2]], "at least k \\+ 1")]
)
def test_bad_deaths_are_refused(make, death: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.tensor(death))


@pytest.mark.parametrize("make", [dense_mask, block_mask])
@pytest.mark.parametrize("positions", [None, torch.tensor([0, 1])])
def test_window_without_positions_is_refused(make, positions) -> None:
    with pytest.raises(ValueError, match="window=4 is measured in positions"):
        make(torch.tensor([[1, 2]]), positions, 4)


# --- in models --------------------------------------------------------------------------------------------------------


def case(policy: str) -> tuple[list[tuple[list[int], int]], list[Plan]]:
    """Two traces that share a row; both outgrow the sliding windows of the tiny models."""
    traces = [
        random_trace(seed, MARKERS["hcot"], length=45, shape=shape) for seed, shape in ((3, "nested"), (1, "soup"))
    ]
    return traces, [compile_trace(ids, prompt, MARKERS["hcot"], policy) for ids, prompt in traces]


def expected_logits(model, traces, policy) -> torch.Tensor:
    each = [reference_logits(model, ids, prompt, MARKERS["hcot"], policy)[:-1] for ids, prompt in traces]
    return torch.cat(each)


def packed_logits(model, plans: list[Plan], implementation: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The logits of all targets, from one row with padding behind the plans."""
    death, positions, ids = row_of(*plans, padding=5)
    masks = attention_masks(model.config, death, positions, implementation, dtype)
    with torch.no_grad():
        logits = model(ids, position_ids=positions, attention_mask=masks, use_cache=False).logits[0]
    targets = [target for plan in plans for target in plan.targets] + [IGNORE] * 5
    return logits[[target != IGNORE for target in targets]]


def reference_model(kind: str, dtype: torch.dtype):
    """The model with the attention of the twins: gemma2's soft cap is not for sdpa, and eager rounds to fp32."""
    model = tiny_model(kind, dtype, vocab_size=VOCAB_SIZE)
    model.set_attn_implementation("textbook" if kind == "gemma2" else "sdpa")
    return model


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("kind", KINDS)
def test_bool_and_additive_masks_give_the_logits_of_the_slow_twin(kind: str, policy: Policy) -> None:
    model = reference_model(kind, torch.float64)
    traces, plans = case(policy)
    expected = expected_logits(model, traces, policy)
    for dtype in (None, torch.float64):
        assert (packed_logits(model, plans, "sdpa", dtype) - expected).abs().max() <= 1e-9, dtype


@pytest.mark.parametrize("policy", [Policy.RECOMPUTE, Policy.EVICT])
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_flex_attention_give_the_same_logits(kind: str, policy: Policy) -> None:
    """FlexAttention runs uncompiled here: compiling for a CPU takes longer than all other tests of this file."""
    model = reference_model(kind, torch.float32)
    traces, plans = case(policy)
    expected = expected_logits(model, traces, policy)
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            difference = packed_logits(model, plans, implementation) - expected
        assert difference.abs().max() <= 1e-4, implementation


@pytest.mark.parametrize("given", [True, False], ids=["mask of the model's dtype", "float32 mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_masks_hide_in_half_precision(dtype: torch.dtype, given: bool) -> None:
    """What the mask hides gets no weight at all, and nothing overflows."""
    model = tiny_model("qwen2", dtype, vocab_size=VOCAB_SIZE, attn_implementation="eager")
    plan = compile_trace([9, 3, 10, 11, 4, 12, 5, 13], 1, MARKERS["hcot"], Policy.EVICT)
    death, positions, ids = row_of(plan)
    masks = attention_masks(model.config, death, positions, "eager", dtype if given else None)
    weights = model(
        ids, position_ids=positions, attention_mask=masks, output_attentions=True, use_cache=False
    ).attentions
    hidden = ~dense_mask(death).expand_as(weights[0])
    assert hidden[..., 7, 2:5].all()  # the thought, behind the close
    for found in weights:
        assert (found[hidden] == 0).all() and (found[~hidden] > 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on GPUs alone")
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_compiled_flex_attention_gives_the_gradients_of_eager(kind: str) -> None:
    head = {"hidden_size": 64, "head_dim": 16} if kind == "gemma2" else {"hidden_size": 64}
    model = tiny_model(kind, torch.float32, vocab_size=VOCAB_SIZE, **head).cuda()
    traces = [random_trace(seed, MARKERS["hcot"], length=300, shape="nested") for seed in range(2)]
    plans = [compile_trace(ids, prompt, MARKERS["hcot"], Policy.RECOMPUTE) for ids, prompt in traces]
    death, positions, ids = (x.cuda() for x in row_of(*plans))
    found = {}
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        masks = attention_masks(model.config, death, positions, implementation)
        logits = model(ids, position_ids=positions, attention_mask=masks, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        found[implementation] = [logits, *(parameter.grad.clone() for parameter in model.parameters())]
        model.zero_grad()
    for ours, theirs in zip(found["flex_attention"], found["eager"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_mask_is_minus_infinity_where_nothing_is_visible(implementation: str, dtype: torch.dtype) -> None:
    death = torch.tensor([[3, 2, 3]])
    mask = attention_masks(CONFIG_MAPPING["qwen2"](), death, torch.tensor([[0, 1, 1]]), implementation, dtype)
    assert mask.dtype is dtype
    assert mask[0, 0].tolist() == [[0, -torch.inf, -torch.inf], [0, 0, -torch.inf], [0, -torch.inf, 0]]


def test_layers_share_an_additive_mask() -> None:
    """The reason for it: under a bool mask, every layer keeps [T, T] numbers for the backward pass."""
    model = tiny_model("qwen2", vocab_size=VOCAB_SIZE, num_hidden_layers=3)
    tokens = 61
    death, positions = torch.full((1, tokens), tokens), torch.arange(tokens)[None]
    kept = {}
    for dtype in (None, torch.float32):
        masks = attention_masks(model.config, death, positions, "sdpa", dtype)
        found: set[int] = set()

        def keep(tensor: torch.Tensor, found: set[int] = found) -> torch.Tensor:
            if tensor.shape[-2:] == (tokens, tokens):
                found.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(positions, position_ids=positions, attention_mask=masks, use_cache=False)
        kept[dtype] = len(found)
    assert kept == {None: 3, torch.float32: 1}


def test_form_follows_the_layers() -> None:
    """One mask where all layers are alike, with the window if they slide; one for each kind where they alternate."""
    death, positions = torch.full((1, 40), 40), torch.arange(40)[None]

    def masks(kind: str, **config):
        return attention_masks(tiny_model(kind, **config).config, death, positions, "sdpa")

    full, near = dense_mask(death), dense_mask(death, positions, 16)
    assert not torch.equal(full, near)
    assert torch.equal(masks("qwen2"), full)
    assert torch.equal(masks("llama"), full)
    assert torch.equal(masks("mistral"), near)
    assert torch.equal(masks("mistral", sliding_window=None), full)
    alternating = masks("gemma2")
    assert alternating.keys() == {"full_attention", "sliding_attention"}
    assert torch.equal(alternating["full_attention"], full)
    assert torch.equal(alternating["sliding_attention"], near)
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    assert torch.equal(masks("qwen2", **sliding), near)


PAIR = (torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("flash_attention_2", "FlashAttention would drop it"),
        ("flash_attention_3", "FlashAttention would drop it"),
        ("kernels-community/vllm-flash-attn3", "FlashAttention would drop it"),
        ("hcot_slots", "'hcot_slots' cannot run"),
        (None, "one of 'sdpa', 'eager', 'flex_attention'"),
    ],
)
def test_attention_that_would_ignore_the_mask_is_refused(implementation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_masks(CONFIG_MAPPING["qwen2"](), *PAIR, implementation)


def test_layers_with_another_state_are_refused() -> None:
    with pytest.raises(ValueError, match="'qwen3_next' has layers of type 'linear_attention'; a mask says"):
        attention_masks(CONFIG_MAPPING["qwen3_next"](), *PAIR, "sdpa")


def test_sliding_layers_without_a_window_are_refused() -> None:
    config = SimpleNamespace(model_type="odd", layer_types=["sliding_attention"], sliding_window=None)
    with pytest.raises(ValueError, match=r"config\.sliding_window is None"):
        attention_masks(config, *PAIR, "sdpa")
