"""What a decoder may be told to do beside the model's wish: keep to the grammar, cap blocks, end in time.

    grammar              no token that a well-formed trace would not have there
    max_depth            no block within so many others
    max_block_tokens     a thought that has grown so long gets its ``[split]``
    max_solution_tokens  a solution that has grown so long gets its ``[close]``
    force_answer         near the end of the budget the open blocks are closed and the thinking ends, so that an answer
                         can still be written

`Controller` follows one trace and says before each token which ids are forbidden, or which one must come. It reads the
trace alone, so every policy gets the same directives for the same trace, but for what the budget has left.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from hcot_lmeval.errors import Allowed, check_values, one_of, whole_number
from hcot_lmeval.grammar import Cursor, Grammar, State

GRAMMAR = "grammar"
CLOSING_TOKENS = 32
"""What a solution may take that is written only because the budget ends: about a sentence."""


class Cause(StrEnum):
    """Why a token is not the one that the model would have written. The names are those of the options."""

    GRAMMAR = "constraints"
    DEPTH = "max_depth"
    THOUGHT = "max_block_tokens"
    SOLUTION = "max_solution_tokens"
    ENDING = "force_answer"


@dataclass(frozen=True)
class ControlOptions:
    """What a decoder does beside the model's wish; by default nothing.

    Attributes:
        constraints: ``grammar`` forbids every token that a well-formed trace would not have at its place: markers out
            of order, ends and ``</think>`` within a block, markers behind ``</think>``. None forbids nothing.
        max_depth: most blocks open at once.
        max_block_tokens: most tokens of a thought; then its ``[split]`` is forced. What is counted is what would stay
            if the blocks within were pruned: a finished one counts as its solution and two markers.
        max_solution_tokens: most tokens of a solution, counted likewise; then its ``[close]`` is forced.
        force_answer: tokens kept for the answer. When no more is left of ``max_gen_toks``, or of the room in the
            context, the open blocks are closed, ``</think>`` is forced if the model thinks, and it goes on freely. A
            block that could not be closed in time is not opened any more.
        closing_tokens: most tokens of each solution that is written only because the answer is forced; no more than
            `max_solution_tokens`, if that is given.
        loop_tokens: end a row that has repeated itself for so many tokens (`hcot_lmeval.control`); if an answer can be
            forced, force it instead.

    Raises:
        ValueError: a value is not allowed.
    """

    constraints: str | None = None
    max_depth: int | None = None
    max_block_tokens: int | None = None
    max_solution_tokens: int | None = None
    force_answer: int | None = None
    closing_tokens: int = CLOSING_TOKENS
    loop_tokens: int | None = None

    def __post_init__(self) -> None:
        check_values(self, CONTROLS)

    def check_room(self, context: int | None) -> None:
        """Raises `ValueError` if an answer is to be kept more room than a context has (None: not known)."""
        if context is not None and (self.force_answer or 0) >= context:
            raise ValueError(
                f"force_answer={self.force_answer} keeps all of max_context={context} for the answer; lower it, or "
                "raise max_context"
            )

    @property
    def controls(self) -> dict[str, Any]:
        """The options in force by name; nothing if the model writes as it likes."""
        found = {name: getattr(self, name) for name in CONTROLS}
        if self.force_answer is None:
            del found["closing_tokens"]
        return {name: value for name, value in found.items() if value is not None}

    @property
    def closing(self) -> int:
        """Most tokens of a solution once the answer is forced."""
        return min(self.closing_tokens, self.max_solution_tokens or self.closing_tokens)

    @property
    def steers(self) -> bool:
        """Whether any token may come out otherwise than the model wants it."""
        return not self.controls.keys() <= {"loop_tokens"}


_OPTIONAL = whole_number(1, optional=True)
CONTROLS: dict[str, Allowed] = {
    "constraints": one_of(GRAMMAR, None),
    **dict.fromkeys(("max_depth", "max_block_tokens", "max_solution_tokens", "force_answer"), _OPTIONAL),
    "closing_tokens": whole_number(0),
    "loop_tokens": _OPTIONAL,
}
"""The options, and what is allowed of each."""


class Directive(NamedTuple):
    """What holds for the next token.

    Attributes:
        illegal: ids that may not come.
        forced: the id that has to come, or None.
        cause: why, of the forced one; for the forbidden ones see `Controller.cause`.
    """

    illegal: frozenset[int] = frozenset()
    forced: int | None = None
    cause: Cause | None = None


class Budget(NamedTuple):
    """What a row may still use.

    Attributes:
        tokens: that it may generate.
        room: that fit into its context.
    """

    tokens: int
    room: int


FREE = Directive()
"""The model may write what it likes."""


@dataclass(slots=True)
class _Size:
    """Tokens of an open block: `split` says to which of the two numbers the next one belongs."""

    thought: int = 0
    solution: int = 0
    split: bool = False

    def grow(self, tokens: int) -> None:
        if self.split:
            self.solution += tokens
        else:
            self.thought += tokens

    def restart(self) -> None:
        """The solution begins here; what was taken for one belongs to the thought."""
        self.thought, self.solution, self.split = self.thought + self.solution + self.split, 0, True

    @property
    def remains(self) -> int:
        """What a prune leaves of the block besides its first marker."""
        return 1 + (self.solution if self.split else self.thought)


class Controller:
    """Follows one trace and says what may come next.

    Args:
        options: what is wanted.
        grammar: of the notation in the vocabulary.
        thinking: whether the prompt leaves a thinking section open.
        prunes: whether a closing marker makes room in the context.

    Attributes:
        cursor: state of the trace by the grammar.
        ending: whether the answer is being forced.
    """

    def __init__(
        self, options: ControlOptions, grammar: Grammar, *, thinking: bool = False, prunes: bool = True
    ) -> None:
        self.cursor = Cursor(grammar)
        self.ending = False
        self._options, self._grammar, self._prunes = options, grammar, prunes
        self._thinking = thinking
        self._steers = options.steers
        self._sizes: list[_Size] = []

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Opens the blocks that an acting prompt leaves open; their tokens so far are not counted."""
        self.cursor.begin(prompt_ids)
        self._sizes = [_Size() for _ in range(self.cursor.depth)]
        if self._sizes:
            self._sizes[-1].split = self.cursor.in_solution

    def push(self, token: int) -> bool:
        """Appends a generated token and returns whether the grammar allows it there."""
        depth = self.cursor.depth
        label = self.cursor.push(token)
        if token in self._grammar.control_ids:
            self._follow(token, self.cursor.depth - depth)
        elif self._sizes:
            self._sizes[-1].grow(1)
        return label.legal

    def directive(self, budget: Budget) -> Directive:
        """Returns what holds for the next token."""
        if not self._steers:
            return FREE
        options, blocks = self._options, self._sizes
        self.ending = self.ending or self._is_nearly_spent(budget)
        if self.cursor.state is State.LEAD and (self.ending or options.constraints or options.max_block_tokens):
            return Directive(forced=self._grammar.markers.lead, cause=self._lead_cause)
        if blocks:
            forced = self._forced(blocks[-1])
            if forced is not None:
                return forced
        elif self.ending and self._thinking and self._grammar.think[1] is not None:
            return Directive(forced=self._grammar.think[1], cause=Cause.ENDING)
        illegal = self._illegal(budget)
        return Directive(illegal) if illegal else FREE

    def cause(self, wanted: int) -> Cause:
        """Why `wanted`, which is among the illegal ids, may not come."""
        if not self.ending and wanted in self.cursor.illegal:
            return Cause.GRAMMAR
        return Cause.DEPTH if self._is_deep and not self.ending else Cause.ENDING

    def end(self) -> bool:
        """Forces the answer from now on; returns whether there is anything left to force."""
        if self._options.force_answer is None or self.ending:
            return False
        self.ending = self._can_end
        return self.ending

    @property
    def is_closing(self) -> bool:
        """Whether blocks or the thinking are being closed for the answer, which takes a bounded number of tokens."""
        return self.ending and self._can_end

    def _illegal(self, budget: Budget) -> frozenset[int]:
        illegal = self.cursor.illegal if self._options.constraints or self.ending else frozenset()
        closed = self.ending or self._is_deep or not self._can_open(budget)
        return illegal | {self._grammar.markers.open} if closed else illegal

    @property
    def _is_deep(self) -> bool:
        most = self._options.max_depth
        return most is not None and len(self._sizes) >= most

    @property
    def _lead_cause(self) -> Cause:
        if self.ending:
            return Cause.ENDING
        return Cause.GRAMMAR if self._options.constraints else Cause.THOUGHT

    def _forced(self, block: _Size) -> Directive | None:
        """The marker that ends the part of the innermost block that has grown too long."""
        marks, options = self._grammar.markers, self._options
        most: int | None
        if self.ending:
            most, cause = (options.closing if block.split else 0), Cause.ENDING
        elif block.split:
            most, cause = options.max_solution_tokens, Cause.SOLUTION
        else:
            most, cause = options.max_block_tokens, Cause.THOUGHT
        size = block.solution if block.split else block.thought
        if most is None or size < most:
            return None
        return Directive(forced=marks.close if block.split else marks.split, cause=cause)

    @property
    def _can_end(self) -> bool:
        return bool(self._sizes) or (self._thinking and self._grammar.think[1] is not None)

    def _is_nearly_spent(self, budget: Budget) -> bool:
        """Whether closing the open blocks and the answer's reserve may take all that is left."""
        if self._options.force_answer is None or not self._can_end:
            return False
        return self._slack(budget, len(self._sizes)) <= 0

    def _can_open(self, budget: Budget) -> bool:
        """Whether one more block could still be closed in time."""
        if self._options.force_answer is None:
            return True
        return self._slack(Budget(budget.tokens - 1, budget.room - 1), len(self._sizes) + 1) > 0

    def _slack(self, budget: Budget, blocks: int) -> int:
        """What is left of the budget beyond the reserve and the most that closing so many blocks takes.

        Where a close prunes, the solution of a block vanishes with the thought of the one around it: the context holds
        two solutions at a time, and one in the end.
        """
        each, reserve = self._options.closing + 3, self._options.force_answer or 0  # + split, lead, close
        freed = sum(size.thought for size in self._sizes) if self._prunes else 0
        at_once, at_end = (min(blocks, 2), min(blocks, 1)) if self._prunes else (blocks, blocks)
        return min(
            budget.tokens - reserve - each * blocks - 1,
            budget.room - each * at_once - 1,
            budget.room + freed - reserve - each * at_end - 1,
        )

    def _follow(self, token: int, change: int) -> None:
        """Keeps the sizes when a control token came; `change` is that of the depth."""
        sizes = self._sizes
        if token == self._grammar.think[0] or token == self._grammar.think[1]:
            self._thinking = token == self._grammar.think[0]
        if change < 0:
            closed = sizes.pop()
            if sizes:
                sizes[-1].grow(closed.remains)
        elif token == self._grammar.markers.split and sizes:
            sizes[-1].restart()
        elif sizes:
            sizes[-1].grow(1)
        if change > 0:
            sizes.append(_Size())


# --- traces that repeat themselves ------------------------------------------------------------------------------------

REPEATS = 4
"""Copies, the first one included, from which on something counts as a loop."""
_GRAM = 8
"""Length of the n-grams by which an earlier copy is found; no longer than what has to be repeated."""
_SLOTS = 2**13
_TRIED = 64
"""Earlier places of an n-gram that are looked at; more of them have only long laps of very few different tokens."""
_SETTLED = 4
"""A distance that has held for so many n-grams is a lap's, or breaks before the lap is over: no other is sought."""


class LoopDetector:
    """Follows one trace, one generated token at a time, and notices that it has begun to repeat itself.

    Two kinds of repetition count, each after `REPEATS` times and `tokens` repeated tokens, whichever comes later: the
    end of the trace is periodic, the same n-gram again and again; or a block is written again and again, token for
    token, with nothing but other text between its copies. It costs a few operations a token.

    Args:
        tokens: repeated tokens from which on a repetition counts, at least 1.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._gram = min(_GRAM, max(tokens, REPEATS - 1))
        self._starts: list[int] = []  # of the open blocks
        self._siblings: list[tuple[list[int], int]] = [([], 0)]  # at each depth the last block and how often it came
        self.forget()

    def push(self, token: int, depth: int) -> bool:
        """Appends a token after which `depth` blocks are open, and returns whether the trace repeats itself."""
        self._ids.append(token)
        again = self._is_periodic(token)
        while depth > len(self._starts):
            self._starts.append(len(self._ids) - 1)
            self._siblings.append(([], 0))
        while depth < len(self._starts):
            again |= self._close()
        return again

    def forget(self) -> None:
        """Starts to count anew."""
        self._first = len(self._ids)
        self._recent: deque[int] = deque(maxlen=self._gram)
        self._seen = [-1] * _SLOTS  # hash of an n-gram -> where it ended last
        self._before: list[int] = []  # of each token since: where its n-gram ended before, or -1
        self._runs: dict[int, int] = {}  # distance to an earlier copy -> tokens that are equal at this distance
        self._siblings = [([], 0) for _ in self._siblings]

    def _is_periodic(self, token: int) -> bool:
        """Follows every distance to an earlier copy for as long as it holds, and looks for others."""
        ids, last = self._ids, len(self._ids) - 1
        if self._runs:
            self._runs = {period: run + 1 for period, run in self._runs.items() if ids[last - period] == token}
        self._recent.append(token)
        slot = hash(tuple(self._recent)) % _SLOTS
        at = self._seen[slot]
        self._seen[slot] = last
        self._before.append(at)
        settled = any(run >= _SETTLED * self._gram for run in self._runs.values())
        for _ in range(0 if settled else _TRIED):
            if at < 0:
                break
            self._follow(last - at)
            at = self._before[at - self._first]
        return any(run >= max(self._tokens, (REPEATS - 1) * period) for period, run in self._runs.items())

    def _follow(self, period: int) -> None:
        """Begins to follow a distance, unless a part of it is followed that holds and breaks with it."""
        if any(period % known == 0 and period <= run + known for known, run in self._runs.items()):
            return
        ids, place = self._ids, len(self._ids) - 1
        while place - period >= self._first and ids[place] == ids[place - period]:
            place -= 1
        run = len(ids) - 1 - place
        if run >= self._gram:
            self._runs[period] = run

    def _close(self) -> bool:
        """Takes note of the block that ends with the last token."""
        block = self._ids[self._starts.pop() :]
        self._siblings.pop()
        same, count = self._siblings[-1]
        count = count + 1 if block == same else 1
        self._siblings[-1] = (block, count)
        return count >= REPEATS and (count - 1) * len(block) >= self._tokens
