r"""What the families of synthetic problems share: a problem, its gold trace, the flat twin of that trace, the split.

A problem tells its gold solution as *pieces*: text, and the three marks of a block wherever one opens, splits or
closes. `gold_trace` writes the pieces in a notation of `hcot_lmeval.markup`, `flat_trace` writes the same pieces with
plain separators, one for one::

    gold    <think>[THOUGHT]a=b-3[THOUGHT]b=4*4[SOLUTION]6[RETURN]6-3[SOLUTION]3[RETURN]</think>\boxed{3}
    flat    <think>(a=b-3(b=4*4:6)6-3:3)</think>\boxed{3}

The twin is as long and says as much as the trace, so that a model trained on one and a model trained on the other
differ in nothing but what they may forget.

The split of a problem follows from its fingerprint alone, and problems that differ only in wording share one: splits
cannot overlap, whatever the seeds and sizes.

This module imports the standard library alone; `lm_eval_dataset` imports `datasets` when it is called.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from hcot_lmeval.markup import Markup, get_markup

if TYPE_CHECKING:
    from datasets import DatasetDict

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

PATIENCE = 20
"""Draws in a row that may repeat a problem before `distinct` takes its split for used up."""


class Mark(StrEnum):
    """The ends of a block; the values are what the flat twin writes."""

    OPEN = "("
    SPLIT = ":"
    CLOSE = ")"


Piece = str | Mark
"""A stretch of a trace: text or a mark. Marks are strings too: ask for them with ``isinstance(piece, Mark)``."""


class Problem(ABC):
    """A problem with a gold solution. Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The number that makes the problem hard: levels of recursion, or variables."""

    @property
    @abstractmethod
    def prompt(self) -> str:
        """The problem as the model reads it."""

    @property
    @abstractmethod
    def answer(self) -> str:
        """What the box has to hold."""

    @property
    @abstractmethod
    def canonical(self) -> str:
        """A text that problems share which differ in wording alone."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Yields the gold solution between the thinking tokens: one block, whose solution is the answer."""

    @property
    def blocks(self) -> int:
        """How many blocks the gold trace has."""
        return sum(piece is Mark.OPEN for piece in self.pieces())

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the canonical text."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @property
    def split(self) -> Split:
        """The split that this problem belongs to: 8 of 10 train, 1 validation, 1 test."""
        remainder = int(self.fingerprint, 16) % 10
        return "test" if remainder == 0 else "validation" if remainder == 1 else "train"


P = TypeVar("P", bound=Problem)
Draw = Callable[[random.Random], P]
"""Draws one problem of a kind."""


def gold_trace(problem: Problem, markup: str | Markup = "hcot") -> str:
    """Returns the text a perfect hierarchical reasoner writes behind the prompt."""
    marks = get_markup(markup)
    written = {Mark.OPEN: marks.open, Mark.SPLIT: marks.split + (marks.lead or ""), Mark.CLOSE: marks.close}
    return _write(problem, marks, written)


def flat_trace(problem: Problem, markup: str | Markup = "hcot") -> str:
    """Returns the flat twin of `gold_trace`: separators instead of markers; of `markup` only the thinking tokens."""
    return _write(problem, get_markup(markup), {mark: mark.value for mark in Mark})


def _write(problem: Problem, markup: Markup, written: dict[Mark, str]) -> str:
    begin, end = markup.think
    body = "".join(written[piece] if isinstance(piece, Mark) else piece for piece in problem.pieces())
    return f"{begin}{body}{end}\\boxed{{{problem.answer}}}"


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")


def draw_in_split(draw: Draw[P], split: Split, rng: random.Random) -> P:
    """Draws until a problem belongs to `split`."""
    while (problem := draw(rng)).split != split:
        pass
    return problem


def distinct(draws: Sequence[Draw[P]], split: Split, rng: random.Random) -> Iterator[P]:
    """Yields problems of one split for ever, going through `draws` in turn, no fingerprint twice.

    Where a kind of problem is so rare that `PATIENCE` draws in a row are known already, the next one is a repetition;
    nearly always it is in other words (other names, another order).

    Raises:
        ValueError: an unknown split; at once.
    """
    check_split(split)
    return _distinct(draws, split, rng)


def _distinct(draws: Sequence[Draw[P]], split: Split, rng: random.Random) -> Iterator[P]:
    seen: set[str] = set()
    for draw in itertools.cycle(draws):
        candidates = (draw_in_split(draw, split, rng) for _ in range(PATIENCE))
        problem = next((p for p in candidates if p.fingerprint not in seen), None)
        problem = problem or draw_in_split(draw, split, rng)
        seen.add(problem.fingerprint)
        yield problem


def check_sizes(name: str, sizes: Sequence[int], allowed: range) -> None:
    """Raises ValueError unless `sizes` (called `name` by the user) is a list of numbers within `allowed`, not empty."""
    good = isinstance(sizes, Sequence) and all(type(size) is int and size in allowed for size in sizes)
    if not good or not sizes:
        raise ValueError(f"{name}={sizes!r}: a list of numbers within {allowed.start}..{allowed.stop - 1} is needed")


def lm_eval_dataset(problems: Iterator[Problem], size: int, name: str) -> DatasetDict:
    """Returns `size` problems as lm-eval's ``custom_dataset`` wants them.

    Returns:
        one split ``test`` with the columns problem, answer, `name` (the problem's size), and blocks (evaluations that
        the gold trace takes).
    """
    if type(size) is not int or size < 1:
        raise ValueError(f"size={size!r}: a number of problems, 1 or more, is needed")
    from datasets import Dataset, DatasetDict

    chosen = itertools.islice(problems, size)
    rows = [{"problem": p.prompt, "answer": p.answer, name: p.size, "blocks": p.blocks} for p in chosen]
    return DatasetDict({"test": Dataset.from_list(rows)})
