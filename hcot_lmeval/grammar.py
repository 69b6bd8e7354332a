"""Which token may come next: the grammar of well-formed traces, as a table over what the innermost open block allows.

    body := (text | [open] body [split] body [close])*          trace := body </think> text eos

The rule (`hcot_lmeval.trace`) gives every token a meaning, malformed or not. The grammar says which tokens a
well-formed trace would not have there. It is stricter than the rule, which knows nothing of thinking tokens and ends:
those may come at depth 0 alone, and no marker may follow ``</think>``; and a lead token may come nowhere but behind its
``[split]``. The stack of blocks is the rule's own.

``<think>`` may come wherever no block is open, until ``</think>``. Most prompts end with it and some completions begin
with it; a state that remembers which would forbid nothing but a second one, which acts on nothing. What follows an end
of the sequence is judged as if it had not come, for a decoder stops there.

Losses on illegal tokens, constrained decoding and the counts of illegal traces read the same table:

    a trace      label_tokens(ids, prompt_len, grammar): the state, class and legality of each generated token
    a decoder    cursor = Cursor(grammar); forbid cursor.illegal; cursor.push(token); and so on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import LiveContext, Policy


class State(IntEnum):
    """Where a trace stands before its next token."""

    OUTSIDE = 0
    """No block is open."""
    THOUGHT = 1
    """The innermost open block has no ``[split]`` yet."""
    SOLUTION = 2
    """The innermost open block has its ``[split]``."""
    LEAD = 3
    """Right behind the ``[split]`` of a notation whose solutions begin with a lead token."""
    ANSWER = 4
    """Behind ``</think>``."""


class TokenClass(IntEnum):
    """What a generated token is, for losses that are reported apart."""

    TEXT = 0
    MARKER = 1
    """Markers, thinking tokens and the end of the sequence."""
    SOLUTION = 2
    ANSWER = 3


class Label(NamedTuple):
    """A generated token: the state in which it came, its class, and whether the grammar allows it there."""

    state: State
    token_class: TokenClass
    legal: bool


@dataclass(frozen=True)
class Grammar:
    """The grammar of a notation in the ids of a vocabulary.

    Attributes:
        markers: the marker ids.
        think: ids of the tokens around the thinking section, None for a vocabulary that lacks them.
        eos_ids: ids that end a trace.
    """

    markers: MarkerIds
    think: tuple[int | None, int | None]
    eos_ids: frozenset[int]

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """All ids whose legality depends on the state."""
        return self.markers.ids | self.eos_ids | {i for i in self.think if i is not None}

    def illegal(self, state: State) -> frozenset[int]:
        """Returns the ids that may not come in `state`.

        In state `LEAD` nothing but the lead token may come; of the ids that may not, those of text are left out.
        """
        return self._illegal[state]

    def is_legal(self, token: int, state: State) -> bool:
        """Whether `token` may come in `state`."""
        return token == self.markers.lead if state is State.LEAD else token not in self._illegal[state]

    def token_class(self, token: int, state: State) -> TokenClass:
        """Returns the class of a token that comes in `state`."""
        if token in self.control_ids:
            return TokenClass.MARKER
        return _CLASSES[state]

    @cached_property
    def _illegal(self) -> dict[State, frozenset[int]]:
        marks = self.markers
        begin, end = ({i} - {None} for i in self.think)
        lead = {marks.lead} - {None}
        nested = set() if marks.nested else {marks.open}
        inside = self.eos_ids | begin | end | lead | nested
        table = {
            State.OUTSIDE: {marks.split, marks.close} | lead,
            State.THOUGHT: {marks.close} | inside,
            State.SOLUTION: {marks.split} | inside,
            State.LEAD: self.control_ids - lead,
            State.ANSWER: marks.ids | begin | end,
        }
        return {state: frozenset(i for i in ids if i is not None) for state, ids in table.items()}


_CLASSES = {
    State.OUTSIDE: TokenClass.TEXT,
    State.THOUGHT: TokenClass.TEXT,
    State.SOLUTION: TokenClass.SOLUTION,
    State.LEAD: TokenClass.SOLUTION,
    State.ANSWER: TokenClass.ANSWER,
}


class Cursor:
    """The state of a growing trace, one generated token at a time.

    Attributes:
        state: before the next token.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.state = State.OUTSIDE
        self._blocks = LiveContext(grammar.markers, Policy.OFF)  # is told of markers alone: text moves no block

    @property
    def depth(self) -> int:
        """Blocks open now."""
        return self._blocks.depth

    @property
    def in_solution(self) -> bool:
        """Whether the innermost open block has its ``[split]`` behind it."""
        return self._blocks.in_solution

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Opens the blocks that an acting prompt leaves open. Before the first token."""
        for token in prompt_ids:
            self._blocks.push(token)
        if self._blocks.depth:
            self.state = State.SOLUTION if self._blocks.in_solution else State.THOUGHT

    @property
    def illegal(self) -> frozenset[int]:
        """The ids that may not come next (in state `LEAD` only the lead token may: see `Grammar.illegal`)."""
        return self.grammar.illegal(self.state)

    def push(self, token: int) -> Label:
        """Appends a token and returns its label."""
        before, grammar = self.state, self.grammar
        label = Label(before, grammar.token_class(token, before), grammar.is_legal(token, before))
        if token in grammar.control_ids or before is State.LEAD:
            self.state = self._after(token)
        return label

    def _after(self, token: int) -> State:
        marks = self.grammar.markers
        if token in marks.ids:
            self._blocks.push(token)
        if self.state is State.ANSWER or token == self.grammar.think[1]:
            return State.ANSWER
        if not self._blocks.depth:
            return State.OUTSIDE
        if token == marks.split and marks.lead is not None:
            return State.LEAD
        return State.SOLUTION if self._blocks.in_solution else State.THOUGHT


def label_tokens(ids: Sequence[int], prompt_len: int, grammar: Grammar) -> list[Label]:
    """Returns a label for each generated token of a trace."""
    cursor = Cursor(grammar)
    return [cursor.push(token) for token in ids[prompt_len:]]


def is_legal_trace(ids: Sequence[int], prompt_len: int, grammar: Grammar, *, finished: bool = True) -> bool:
    """Whether a well-formed trace could look so.

    Args:
        ids: the trace.
        prompt_len: tokens of it that are the prompt.
        grammar: the grammar.
        finished: whether it is over, so that no block may be open any more; a trace that ran out of room is not.
    """
    cursor = Cursor(grammar)
    return all(cursor.push(token).legal for token in ids[prompt_len:]) and not (finished and cursor.depth)
