"""What has to hold for every trace: `LiveContext` and `compile_trace` asserted against the slow twins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import IGNORE, Kind, LiveContext, Plan, Policy, Step, compile_trace
from tests.reference import evict_mask, rewrite, survivors


def check_trace(
    ids: Sequence[int], prompt_len: int, markers: MarkerIds, policy: str, *, prompt_acts: bool = False
) -> None:
    """Checks one trace in every way known here."""
    check_steps(ids, 0 if prompt_acts else prompt_len, markers, policy)
    check_plan(ids, prompt_len, markers, policy, prompt_acts=prompt_acts)


def check_steps(ids: Sequence[int], inert: int, markers: MarkerIds, policy: str) -> None:
    """Follows the steps with a list of rows, as a decoder would, and compares it with the twin after each token."""
    context, steps = LiveContext(markers, policy), []
    rows: list[tuple[int, int]] = []  # (trace index, position id) of each key and value held
    peak = 0
    for index, token in enumerate(ids):
        needed = context.rows_needed(token)
        before = len(rows)
        step = context.push_inert(token) if index < inert else context.push(token)
        steps.append(step)
        _check_step(step, index, ids, before)
        rows[step.rewind :] = zip(step.source, step.positions, strict=True)
        used = max(before, len(rows))
        assert index < inert or used == needed, f"push({token}) used {used} rows; rows_needed said {needed}"
        peak = max(peak, used)
        for start, stop in reversed(step.drop):
            del rows[start:stop]
        so_far = ids[: index + 1]
        assert [i for i, _ in rows] == context.source == survivors(so_far, inert, markers, policy)
        assert [position for _, position in rows] == _positions(context.source, policy)
        assert step.depth == context.depth == rewrite(so_far, inert, markers).faults["unclosed"]
        assert context.live == [ids[i] for i in context.source]
        assert (context.length, context.peak) == (index + 1, peak)
    _check_totals(ids, inert, markers, context, steps)


def _positions(source: list[int], policy: str) -> list[int]:
    return source if policy == "evict" else list(range(len(source)))


def _check_step(step: Step, index: int, ids: Sequence[int], rows: int) -> None:
    assert 0 <= step.rewind <= rows
    assert step.forward, "without a forwarded token there is nothing to sample from"
    assert step.forward == tuple(ids[i] for i in step.source)
    assert all(i <= index for i in step.source)
    assert step.source[-1] == index or step.is_prune
    if index > 0:
        assert all(position >= 0 for position in step.positions)


def _check_totals(ids: Sequence[int], inert: int, markers: MarkerIds, context: LiveContext, steps: list[Step]) -> None:
    wanted = rewrite(ids, inert, markers)
    found = Counter(str(step.malformed) for step in steps if step.malformed is not None)
    found["unclosed"] += context.depth
    assert +found == wanted.faults
    prunes = {} if context.policy is Policy.OFF else {b.close: b.removed for b in wanted.blocks if b.removed}
    assert {i: step.pruned for i, step in enumerate(steps) if step.is_prune} == prunes
    pruned = [index for step in steps for index in step.pruned]
    assert sorted([*pruned, *context.source]) == list(range(len(ids))), "prompt + generated - pruned = live"
    assert context.live == [ids[index] for index in context.source]
    opened = sum(step.kind is Kind.OPEN for step in steps)
    assert opened - sum(step.kind is Kind.CLOSE for step in steps) == context.depth


def check_plan(
    ids: Sequence[int], prompt_len: int, markers: MarkerIds, policy: str, *, prompt_acts: bool = False
) -> None:
    """Checks one compiled trace."""
    plan = compile_trace(ids, prompt_len, markers, policy, prompt_acts=prompt_acts)
    inert = 0 if prompt_acts else prompt_len
    n = len(plan)
    columns = (plan.ids, plan.positions, plan.death, plan.targets, plan.source)
    assert all(len(column) == n for column in columns)
    assert plan.ids == [ids[i] for i in plan.source]
    assert [t for t in plan.targets if t != IGNORE] == list(ids[prompt_len:]), "each generated token once, in order"
    assert all(row < death <= n for row, death in enumerate(plan.death))
    assert all(plan.death[row] == n for row in plan.live)
    assert [plan.source[row] for row in plan.live] == survivors(ids, inert, markers, policy)
    _check_contexts(plan, ids, prompt_len, inert, markers, policy)
    if policy == "evict":
        _check_evict(plan, ids, inert, markers)
    else:
        _check_trie(plan)
    if policy == "off":
        assert plan.ids == list(ids)
        assert plan.death == [n] * n
        assert plan.live == list(range(n))


def seen_by(plan: Plan, query: int) -> list[int]:
    """Returns the rows that are visible to a row, itself included."""
    return [key for key in range(len(plan)) if plan.visible(query, key)]


def _check_contexts(
    plan: Plan, ids: Sequence[int], prompt_len: int, inert: int, markers: MarkerIds, policy: str
) -> None:
    """Each generated token, and the one after the trace, is predicted from the live context of its time."""
    predicting = [row for row, target in enumerate(plan.targets) if target != IGNORE]
    for index, row in enumerate([*predicting, len(plan) - 1], start=prompt_len):
        seen = [plan.source[key] for key in seen_by(plan, row)]
        if policy == "evict":  # the last token itself is still read with everything that it may be about to remove
            assert seen == [*survivors(ids[: index - 1], inert, markers, policy), index - 1]
        else:
            assert seen == survivors(ids[:index], inert, markers, policy)


def _check_trie(plan: Plan) -> None:
    """`recompute` and `off` plans are a trie in depth-first order: a row sees its ancestors and itself alone."""
    for query in range(len(plan)):
        seen = seen_by(plan, query)
        assert plan.positions[query] == len(seen) - 1
        assert len(seen) == 1 or seen[:-1] == seen_by(plan, seen[-2]), "what my parent sees, and myself"
        assert all(plan.death[query] <= plan.death[key] for key in seen), "nobody outlives an ancestor"


def _check_evict(plan: Plan, ids: Sequence[int], inert: int, markers: MarkerIds) -> None:
    n = len(ids)
    assert plan.ids == list(ids)
    assert plan.positions == plan.source == list(range(n))
    mask = [[plan.visible(query, key) for key in range(n)] for query in range(n)]
    assert mask == evict_mask(ids, inert, markers).tolist()
