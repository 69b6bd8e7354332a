"""The tests of the rule notice when the rule is broken: each mutation of `trace` has to fail the invariants.

The first two are the failures that matter most: a rule that no longer prunes looks healthy in every other way.
"""

from collections.abc import Callable
from typing import Any

import pytest

from hcot_lmeval import trace
from hcot_lmeval.trace import Kind, LiveContext, Malformed, Policy, Spans, _Block
from tests.invariants import check_trace
from tests.random_traces import SHAPES, random_trace
from tests.reference import MARKERS, POLICIES

CASES = [
    (*random_trace(seed, markers, length=30, shape=shape), markers, policy)
    for shape in SHAPES
    for seed in range(6)
    for name, markers in MARKERS.items()
    if name != "memento" or shape == "sequential"
    for policy in POLICIES
]

original = {name: getattr(LiveContext, name) for name in vars(LiveContext)}


def open_without_push(self: LiveContext, token: int) -> Any:
    return self._append(token, Kind.OPEN)


def close_without_prune(self: LiveContext, token: int) -> Any:
    if self._blocks:
        self._blocks.pop()
    return self._append(token, Kind.CLOSE)


def first_split_wins(self: LiveContext, token: int) -> Any:
    if self._blocks and self._blocks[-1].split is not None:
        return self._append(token, Kind.SPLIT, Malformed.REPEATED_SPLIT)
    return original["_split"](self, token)


def unsplit_close_keeps_the_block(self: LiveContext, token: int) -> Any:
    if self._blocks and self._blocks[-1].split is None:
        return self._append(token, Kind.CLOSE, Malformed.UNSPLIT_CLOSE)
    return original["_close"](self, token)


def outermost_block_closes(self: LiveContext, token: int) -> Any:
    self._blocks.reverse()
    return original["_close"](self, token)


def stray_close_is_silent(self: LiveContext, token: int) -> Any:
    return original["_close"](self, token)._replace(malformed=None)


def one_token_of_the_thought_stays(self: LiveContext, open: int, split: int) -> Any:
    start, stop = original["_thought"](self, open, split)
    return min(start + 1, stop), stop


def one_token_of_the_solution_goes(self: LiveContext, open: int, split: int) -> Any:
    start, stop = original["_thought"](self, open, split)
    return start, min(stop + 1, len(self.live))


def recompute_keeps_positions(self: LiveContext, token: int, spans: Spans) -> Any:
    step = original["_recompute"](self, token, spans)
    return step._replace(positions=step.source)


def recompute_does_not_rewind(self: LiveContext, token: int, spans: Spans) -> Any:
    step = original["_recompute"](self, token, spans)
    return step._replace(rewind=step.rewind + 1)


def recompute_reads_the_close_alone(self: LiveContext, token: int, spans: Spans) -> Any:
    step = original["_recompute"](self, token, spans)
    return step._replace(forward=step.forward[-1:], positions=step.positions[-1:], source=step.source[-1:])


def evict_drops_nothing(self: LiveContext, token: int, spans: Spans) -> Any:
    return original["_evict"](self, token, spans)._replace(drop=())


def evict_renumbers(self: LiveContext, token: int, kind: Kind, malformed: Malformed | None = None) -> Any:
    rows = len(self.live)
    return original["_append"](self, token, kind, malformed)._replace(positions=(rows,))


def prompt_acts(self: LiveContext, token: int) -> Any:
    return self.push(token)


def off_prunes(self: LiveContext, token: int) -> Any:
    if self.policy is Policy.OFF:
        self.policy = Policy.RECOMPUTE
    return original["_close"](self, token)


def peak_is_forgotten(self: LiveContext, token: int, kind: Kind, malformed: Malformed | None = None) -> Any:
    peak = self.peak
    step = original["_append"](self, token, kind, malformed)
    self.peak = max(peak, len(self.live) - 1)
    return step


def splits_count_from_zero(self: LiveContext, token: int) -> Any:
    self._blocks.append(_Block(len(self.live), split=len(self.live)))
    return self._append(token, Kind.OPEN)


MUTATIONS: dict[str, list[Callable[..., Any]]] = {
    "_open": [open_without_push, splits_count_from_zero],
    "_close": [
        close_without_prune,
        unsplit_close_keeps_the_block,
        outermost_block_closes,
        stray_close_is_silent,
        off_prunes,
    ],
    "_split": [first_split_wins],
    "_thought": [one_token_of_the_thought_stays, one_token_of_the_solution_goes],
    "_recompute": [recompute_keeps_positions, recompute_does_not_rewind, recompute_reads_the_close_alone],
    "_evict": [evict_drops_nothing],
    "_append": [evict_renumbers, peak_is_forgotten],
    "push_inert": [prompt_acts],
}


def failures() -> int:
    count = 0
    for case in CASES:
        try:
            check_trace(*case)
        except (AssertionError, IndexError, ValueError):
            count += 1
    return count


def test_the_rule_as_it_is_passes():
    for case in CASES:
        check_trace(*case)


@pytest.mark.parametrize(
    ("method", "mutant"), [(method, mutant) for method, mutants in MUTATIONS.items() for mutant in mutants]
)
def test_a_broken_rule_is_caught(method, mutant, monkeypatch):
    monkeypatch.setattr(LiveContext, method, mutant)
    assert failures(), f"LiveContext.{method} = {mutant.__name__} passes every invariant"


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_death_off_by_one_is_caught(shift, monkeypatch):
    def bury(plan: trace.Plan, start: int, stop: int) -> None:
        for row in plan.live[start:stop]:
            plan.death[row] = len(plan.ids) + shift
        del plan.live[start:stop]

    monkeypatch.setattr(trace, "_end_rows", bury)
    assert failures()
