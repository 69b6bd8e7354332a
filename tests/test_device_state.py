"""The rule on a device against the rule: the same live context, the same places and the same ends, at every step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.engine.device.state import ENDED, NOTHING, RowState, Rule, State
from hcot_lmeval.engine.rows import Limits, Request, Row
from hcot_lmeval.engine.sampling import Choice, SamplingParams
from hcot_lmeval.trace import LiveContext, Policy, Step
from tests.random_traces import random_trace
from tests.reference import EOS, MARKERS, POLICIES
from tests.strategies import cases, notations, policies

CPU = torch.device("cpu")
STOP = 9
AFTERWARDS = 3
"""Steps that a row takes part in after its end."""


class Paper:
    """One row on paper: its slot holds (token, position) pairs instead of keys and values, and its twin is a `Row`."""

    def __init__(self, state: State, slot: int, ids: Sequence[int], prompt_len: int, **params) -> None:
        self.state, self.slot, self.tokens = state, slot, list(ids[prompt_len:]) or [EOS]
        settings = SamplingParams(max_gen_toks=len(self.tokens), stop_ids=(STOP,), **params)
        request, rule = Request("r", tuple(ids[:prompt_len]), settings), state.rule
        limits = Limits(rule.context, rule.position, frozenset({EOS}))
        self.twin = Row(request, 0, slot, LiveContext(rule.markers, rule.policy), limits)
        self.twin.load_prompt(acts=False)
        self.twin.forwarded(len(self.twin.next_chunk(prompt_len).ids))
        self.cells = [*zip(request.prompt_ids, range(prompt_len), strict=True)]
        self.last: Step | None = None
        self.prunes = self.replayed = self.after_end = 0
        state.begin(slot, request, (EOS, STOP))

    @property
    def over(self) -> bool:
        return self.after_end >= AFTERWARDS

    def forward(self, slot: int, place: int, token: int, position: int) -> None:
        if slot == self.slot and place < self.state.length:
            self.cells[place:] = [(token, position)]

    def take(self, emitted: int, after: RowState) -> None:
        """What the device says of `tokens[0]` has to be what the twin makes of it."""
        if emitted == NOTHING:
            self.replayed += 1
        elif self.twin.finished:
            assert emitted == ENDED
            self.after_end += 1
        else:
            assert emitted == self.tokens[0]
            self._move(bool(after.hold))
            self._compare()
            self.last = self.twin.accept(Choice(self.tokens[0]))
            assert bool(after.done) == bool(self.twin.finished)
            if self.last is not None:
                self.prunes += self.last.is_prune
                assert self.state.rule.policy is Policy.OFF or int(after.depth) == self.twin.context.depth
            self.tokens = self.tokens[1:] or [EOS]

    def _move(self, held: bool) -> None:
        """The host's part under ``evict``."""
        spans = () if self.last is None else self.last.drop
        assert held == bool(spans)
        self.state.drop(self.slot, spans, len(self.cells))
        for start, stop in reversed(spans):
            del self.cells[start:stop]
        if held:
            self.state.release(self.slot)

    def _compare(self) -> None:
        context, places = self.twin.context, range(len(self.cells))
        positions = context.source if self.state.rule.policy is Policy.EVICT else places
        assert self.cells == [*zip(context.live, positions, strict=True)]
        assert self.state.ids[self.slot, : len(self.cells)].tolist() == context.live
        assert self.state.positions[self.slot, : len(self.cells)].tolist() == [*positions]


def run(rows: list[Paper]) -> None:
    """Steps all rows until each has been over for a while; two rows of padding take part."""
    state = rows[0].state
    at = torch.tensor([*(row.slot for row in rows), state.scratch, state.scratch])
    while not all(row.over for row in rows):
        emitted = state.advance(at, torch.tensor([*(row.tokens[0] for row in rows), 0, 0]))
        assert emitted[len(rows) :].tolist() == [ENDED, ENDED]
        after = state.states[at]
        for i, row in enumerate(rows):
            row.take(int(emitted[i]), RowState(*after[i]))
        fed = state.feed(at)
        for values in zip(*(part.tolist() for part in (fed.slots, *fed[3:])), strict=True):
            for row in rows:
                row.forward(*values)


def make_state(notation: str, policy: str, context: int, slots: int = 1, position: int = 10**6) -> State:
    rule = Rule(Policy(policy), MARKERS[notation], context, position)
    return State(slots, context, rule, CPU, ends=2, forced=1, positions=True)


@settings(max_examples=150, derandomize=True)
@given(st.data(), notations, policies, st.booleans())
def test_rows_follow_the_rule(data, notation, policy, tight):
    """Well-formed, broken and random traces side by side, in slots in any order, in ample and in scarce contexts."""
    traces = data.draw(st.lists(cases(notation=notation, policy=policy), min_size=1, max_size=3))
    longest = max(len(ids) for ids, *_ in traces)
    context = data.draw(st.integers(max(p for _, p, *_ in traces), longest)) if tight else longest
    position = data.draw(st.integers(1, longest)) if tight else 10**6
    state = make_state(notation, policy, context, 4, position)
    slots = data.draw(st.permutations(range(4)))
    run([Paper(state, slot, ids, n) for slot, (ids, n, *_) in zip(slots, traces, strict=False)])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_long_random_traces(notation, policy):
    state = make_state(notation, policy, 200, 3)
    prunes = replayed = 0
    for seed in range(0, 12, 3):
        traces = [random_trace(seed + k, MARKERS[notation], 60 + 40 * k) for k in range(3)]
        rows = [Paper(state, slot, *trace) for slot, trace in zip((2, 0, 1), traces, strict=True)]
        run(rows)
        prunes += sum(row.prunes for row in rows)
        replayed += sum(row.replayed for row in rows)
    assert (prunes >= 20) == (policy != "off")
    assert (replayed >= 20) == (policy == "recompute")


@pytest.mark.parametrize("policy", POLICIES)
def test_deep_stacks(policy):
    """As many open blocks as there are live tokens."""
    marks = MARKERS["hcot"]
    ids = [20, *[marks.open] * 90, *[marks.split, 21, marks.close] * 92, 22]
    (row,) = [Paper(make_state("hcot", policy, 500), 0, ids, 1)]
    run([row])
    assert row.prunes == (0 if policy == "off" else 90)


def test_a_stop_id_or_the_end_token_ends_a_row():
    for end in (STOP, EOS):
        row = Paper(make_state("hcot", "recompute", 50), 0, [20, 21, end, 22, 23], 1)
        run([row])
        assert row.twin.generated == [21, end]


def test_a_solution_may_be_forwarded_at_once():
    """`skip`: the rest of a solution is forwarded in one piece, after none or some of its tokens came one by one."""
    marks = MARKERS["hcot"]
    thought = [marks.open, *range(30, 40), marks.split, *range(50, 56)]
    for replayed in range(6):
        state, at = make_state("hcot", "recompute", 50), torch.tensor([0])
        state.begin(0, Request("r", (20, 21), SamplingParams(max_gen_toks=100)), ())
        for token in [*thought, marks.close]:
            state.feed(at)
            state.advance(at, torch.tensor([token]))
        for _ in range(replayed):
            state.feed(at)
            assert int(state.advance(at, torch.tensor([63]))) == NOTHING
        solution = [*range(50, 56), marks.close]
        state.skip(0, solution[replayed:], 3 + replayed)
        assert int(state.advance(at, torch.tensor([40]))) == 40
        assert [int(part) for part in state.feed(at)] == [0, 0, 0, 10, 40, 10]
        assert state.ids[0, :11].tolist() == [20, 21, marks.open, *solution, 40]
