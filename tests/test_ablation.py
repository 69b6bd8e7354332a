"""Ablations against obvious twins: what is alive is counted on the whole trace, logits come from own forwards."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.ablation import Ablation, joined, moved
from hcot_lmeval.engine import Engine
from hcot_lmeval.events import Close, Prune, Sweep, statistics
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import LiveContext, Policy, compile_in
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import EOS, MARKERS, as_reference, masked_logits, plain_logits, rewrite
from tests.test_engine_exact import FP64, forced, run
from tests.tiny import tiny_model

SWEEP = 9
"""A text token that plays the end of thinking."""
VARIANTS = ("keep_last:0", "keep_last:1", "keep_last:3", "oracle", "oldest", "random")
PRUNING = (Policy.RECOMPUTE, Policy.EVICT)


def make(variant: str, markers: MarkerIds, policy: Policy, prompt_len: int, seed: int = 0) -> LiveContext:
    return Ablation.parse(variant).context(markers, policy, prompt_len=prompt_len, think_end=SWEEP, seed=seed)


# --- the twins --------------------------------------------------------------------------------------------------------


def alive(ids: Sequence[int], inert: int, markers: MarkerIds, variant: str) -> list[int]:
    """The trace indices in the live context at the end, for every variant but ``random``."""
    if variant == "oldest":
        return sliding(ids, inert, markers)
    blocks = [block for block in rewrite(ids, inert, markers).blocks if block.removed]
    if variant == "oracle":
        end = max((i for i in range(inert, len(ids)) if ids[i] == SWEEP), default=-1)
        gone = [block for block in blocks if block.close < end]
    else:
        keep = int(variant.removeprefix("keep_last:"))
        gone = blocks[: max(0, len(blocks) - keep)]
    removed = {i for block in gone for i in block.removed}
    return [i for i in range(len(ids)) if i not in removed]


def sliding(ids: Sequence[int], inert: int, markers: MarkerIds) -> list[int]:
    """The live context of ``oldest``: at each close as many of the oldest generated tokens go as the rule prunes."""
    live: list[int] = []
    closing = {block.close: block for block in rewrite(ids, inert, markers).blocks}
    for index in range(len(ids)):
        block = closing.get(index)
        size = sum(i < index for i in block.removed) if block else 0
        generated = [i for i in live if i >= inert]
        live = [i for i in live if i not in generated[:size]]
        if not size or "close" in markers.keep:
            live.append(index)
    return live


def follow(context: LiveContext, ids: Sequence[int], inert: int) -> list[list[int]]:
    """Obeys the steps with a list of rows as a decoder would; returns what is alive after each token."""
    rows: list[int] = []
    history = []
    for index, token in enumerate(ids):
        needed, before = context.rows_needed(token), len(rows)
        step = context.push_inert(token) if index < inert else context.push(token)
        rows[step.rewind :] = step.source
        assert index < inert or max(before, len(rows)) == needed
        assert step.forward == tuple(ids[i] for i in step.source)
        for start, stop in reversed(step.drop):
            del rows[start:stop]
        assert rows == context.source
        assert len(context.live) == len(rows)
        assert not index or len(history[-1]) + 1 - len(rows) == len(step.pruned)
        history.append(list(rows))
    return history


# --- the live context -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "random"])
@pytest.mark.parametrize("notation", MARKERS)
@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), length=st.integers(5, 90))
def test_what_is_alive(notation: str, variant: str, seed: int, length: int) -> None:
    markers = MARKERS[notation]
    ids, inert = random_trace(seed, markers, length)
    for policy in PRUNING:
        history = follow(make(variant, markers, policy, inert), ids, inert)
        for stop in range(inert, len(ids)):
            assert history[stop] == alive(ids[: stop + 1], inert, markers, variant), (policy, stop)


def test_keep_last_0_is_the_rule_step_by_step() -> None:
    for notation, markers in MARKERS.items():
        for policy in PRUNING:
            for seed in range(60):
                ids, inert = random_trace(seed, markers, 60)
                rule, variant = LiveContext(markers, policy), make("keep_last:0", markers, policy, inert)
                for index, token in enumerate(ids):
                    push = "push_inert" if index < inert else "push"
                    assert getattr(rule, push)(token) == getattr(variant, push)(token), (notation, policy, seed, index)


@settings(max_examples=80)
@given(seed=st.integers(0, 10**6), length=st.integers(20, 90))
def test_random_removes_as_much_as_the_rule_at_the_same_moments(seed: int, length: int) -> None:
    markers = MARKERS["hcot"]
    ids, inert = random_trace(seed, markers, length)
    context, again = (make("random", markers, Policy.EVICT, inert, seed=5) for _ in range(2))
    history = follow(context, ids, inert)
    assert history == follow(again, ids, inert)
    for block in rewrite(ids, inert, markers).blocks:
        before, after = history[block.close - 1], history[block.close]
        gone = [place for place, i in enumerate(before) if i not in after]
        assert len(gone) == len(block.removed)
        assert gone == list(range(gone[0], gone[0] + len(gone))) if gone else True
        assert all(before[place] >= inert for place in gone)


@pytest.mark.parametrize("variant", ["random", "oldest"])
def test_as_many_tokens_are_alive_as_under_the_rule(variant: str) -> None:
    """Nested thoughts too: what an inner block has thrown away is not thrown away again with the outer one."""
    markers, pruned = MARKERS["hcot"], 0
    for policy, seed in itertools.product(PRUNING, range(60)):
        ids, inert = random_trace(seed, markers, 90)
        rule, moved_one = LiveContext(markers, policy), make(variant, markers, policy, inert)
        for index, token in enumerate(ids):
            push = "push_inert" if index < inert else "push"
            pruned += len(getattr(rule, push)(token).pruned)
            getattr(moved_one, push)(token)
            assert len(rule.live) == len(moved_one.live)
    assert pruned > 500


def test_random_depends_on_its_seed() -> None:
    markers = MARKERS["hcot"]
    ids, inert = random_trace(3, markers, 80)
    assert (
        len({tuple(follow(make("random", markers, Policy.RECOMPUTE, inert, s), ids, inert)[-1]) for s in range(9)}) > 3
    )


# --- the engine -------------------------------------------------------------------------------------------------------


def expected_logits(model, ids: Sequence[int], inert: int, history: Sequence[Sequence[int]], policy: Policy):
    """From a forward of the live text at each step, or from one forward in which each token sees what was alive."""
    if policy is Policy.RECOMPUTE:
        texts = [[ids[i] for i in history[stop - 1]] for stop in range(inert, len(ids))]
        return torch.stack([plain_logits(model, text)[-1] for text in texts])
    mask = torch.eye(len(ids), dtype=torch.bool)
    for query in range(1, len(ids)):
        mask[query, list(history[query - 1])] = True
    return masked_logits(model, ids, range(len(ids)), mask)[inert - 1 : -1]


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def models(request):
    make_model = lambda: tiny_model(request.param, torch.float64, vocab_size=VOCAB_SIZE)  # noqa: E731
    return make_model(), as_reference(make_model())


@pytest.mark.parametrize("policy", PRUNING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_equals_the_slow_twin(models, variant: str, policy: Policy) -> None:
    model, twin = models
    markers = MARKERS["hcot"]
    traces = [random_trace(seed, markers, random.Random(seed).randint(30, 70)) for seed in range(12)]
    for ids, _ in traces:
        ids[-12] = SWEEP
    requests = [forced(str(i), *trace, seed=i) for i, trace in enumerate(traces)]
    options = {
        "slots": 5,
        "eos_ids": (EOS,),
        "poison": True,
        "self_check": False,
        "ablation": variant,
        "think_ids": (None, SWEEP),
    }
    engine = Engine(model, markup="hcot", markers=markers, policy=policy, **options)
    done, logits = run(engine, requests)
    pruned = 0
    for i, (ids, inert) in enumerate(traces):
        history = follow(make(variant, markers, policy, inert, seed=i), ids, inert)
        completion = done[str(i), 0]
        expected = expected_logits(twin, ids, inert, history, policy)[: len(logits[str(i), 0])]
        assert (logits[str(i), 0] - expected).abs().max() <= FP64
        assert list(completion.live_ids) == [ids[k] for k in history[-1]]
        pruned += completion.statistics.pruned_tokens
    assert pruned > 30


def test_a_sweep_is_counted_as_a_prune_and_not_as_a_block(models) -> None:
    model, _ = models
    m = MARKERS["hcot"]
    block = [m.open, 20, 21, 22, m.split, 23, m.close]
    ids = [10, 11, *block, 30, *block, SWEEP, 31]
    engine = Engine(
        model, markup="hcot", markers=m, policy="recompute", eos_ids=(EOS,), ablation="oracle", think_ids=(None, SWEEP)
    )
    [completion] = engine.generate([forced("a", ids, 2)])
    events = completion.note.events
    assert [type(e) for e in events if isinstance(e, (Close, Prune))] == [Close, Close, Sweep]
    stats = statistics(events)
    assert (stats.blocks, stats.prune_events, stats.pruned_tokens) == (2, 1, 8)
    assert stats.reforwarded_tokens == 6  # 23 [close] 30 [open] 23 [close]
    assert stats.prompt_tokens + stats.generated_tokens - stats.pruned_tokens == stats.live_tokens == 11


def test_plans_follow_the_variant() -> None:
    """Training and log-probabilities of an ablated trace come from the same compiler."""
    markers = MARKERS["hcot"]
    ids, inert = random_trace(8, markers, 60)
    context = make("keep_last:1", markers, Policy.RECOMPUTE, inert)
    plan = compile_in(context, ids, inert)
    assert [plan.source[row] for row in plan.live] == context.source == alive(ids, inert, markers, "keep_last:1")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["keep_last:0", "keep_last:12", "oracle", "random", "oldest"])
def test_names(text: str) -> None:
    assert str(Ablation.parse(text)) == text


@pytest.mark.parametrize("text", ["", "keep_last", "keep_last:-1", "keep_last:x", "oracle:1", "newest"])
def test_unknown_names(text: str) -> None:
    with pytest.raises(ValueError, match="keep_last:N"):
        Ablation.parse(text)


def test_what_cannot_be_done_is_refused_before_the_first_request(models) -> None:
    options = {"markup": "hcot", "markers": MARKERS["hcot"], "eos_ids": (EOS,)}
    with pytest.raises(ValueError, match="policy off"):
        Engine(models[0], policy="off", ablation="random", **options)
    with pytest.raises(ValueError, match="no end of thinking"):
        Engine(models[0], policy="evict", ablation="oracle", **options)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted), max_size=6))
def test_spans(spans: list[list[int]]) -> None:
    union = joined([(a, b) for a, b in spans])
    gone = {i for a, b in spans for i in range(a, b)}
    assert {i for a, b in union for i in range(a, b)} == gone
    assert all(a < b for a, b in union) and all(x[1] < y[0] for x, y in itertools.pairwise(union))
    kept = [i for i in range(40) if i not in gone]
    assert [moved(i, union) for i in kept] == list(range(len(kept)))
