r"""3-SAT by backtracking search: can the variables be chosen so that every clause holds?

The kind and size of problem of PENCIL (arXiv 2503.14337), with a generator and traces of our own. The prompt is the
numbered clauses, ``①aBc②AbC③…?``. The trace is a DPLL search (Davis, Putnam, Logemann, Loveland) without clause
learning, of two kinds of blocks::

    scan    [THOUGHT]①a1②A0b1③A0B~c~![SOLUTION]~B[RETURN]     reads the clauses under what is assigned
    branch  [THOUGHT]a ... [SOLUTION]0[RETURN]                 assumes a literal, scans and branches until it is decided

A scan writes the literals of each clause with their values, ``1`` true, ``0`` false, ``~`` open, up to the first that
is true. A clause without a true literal and with two or three open ones is undecided and gets a ``!``. A scan ends at a
clause without a true literal that has fewer, or behind the last clause. Its solution is

    0       that clause has no open literal: the branch fails
    C       that clause has one open literal, which has to be true: assigned from now on, and scanned again
    ~c      some clause is undecided: branch on the first open literal of the last of them, then on its negation
    1       every clause is true: the problem is solved

What survives a scan under pruning is its solution, so the live context is the prompt, the literals that are assigned,
and one scan. A literal is assigned exactly if it stands right behind an opening marker.

This module imports the standard library alone.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hcot_lmeval.synthetic.cnf import (
    FALSE,
    LABELS,
    OPEN,
    SIZES,
    TRUE,
    VARIABLES,
    canonical,
    labelled,
    models,
    negation,
    truth,
)
from hcot_lmeval.synthetic.problem import Mark, Piece, Problem, Split, check_sizes, distinct, lm_eval_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict

CLAUSES_PER_VARIABLE = 4.5
WIDTH = 3
"""Literals of a clause, of distinct variables."""
UNDECIDED = "!"
"""Mark of a clause with two open literals or more and none that is true."""


@dataclass(frozen=True)
class SatProblem(Problem):
    """Variables and the clauses in the order of the prompt; a variable may occur in no clause."""

    variables: tuple[str, ...]
    clauses: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.variables)

    @property
    def prompt(self) -> str:
        return f"{''.join(labelled(self.clauses))}?"

    @cached_property
    def is_satisfiable(self) -> bool:
        """Whether some assignment satisfies every clause; from the truth table, not by the search of the trace."""
        return models(self.clauses, self.variables) != 0

    @property
    def answer(self) -> str:
        return truth(self.is_satisfiable)

    @property
    def canonical(self) -> str:
        """Names and order of clauses and literals make no difference; repeated clauses count."""
        return canonical(self.clauses, dict.fromkeys(self.variables, 0))

    def pieces(self) -> Iterator[Piece]:
        yield Mark.OPEN
        value = yield from self._search(frozenset())
        yield from (Mark.SPLIT, truth(value), Mark.CLOSE)

    def _search(self, true: frozenset[str]) -> Generator[Piece, None, bool]:
        """Yields what stands in a branch block behind its literal; returns whether `true` can be extended."""
        while (verdict := (yield from self._scan(true))) not in (TRUE, FALSE):
            if verdict.startswith(OPEN):
                return (yield from self._branch(true, verdict.removeprefix(OPEN)))
            true |= {verdict}
        return verdict == TRUE

    def _branch(self, true: frozenset[str], literal: str) -> Generator[Piece, None, bool]:
        for choice in (literal, negation(literal)):
            yield from (Mark.OPEN, choice)
            value = yield from self._search(true | {choice})
            yield from (Mark.SPLIT, truth(value), Mark.CLOSE)
            if value:
                return True
        return False

    def _scan(self, true: frozenset[str]) -> Generator[Piece, None, str]:
        """Yields a scan block; returns its solution."""
        verdict = TRUE
        yield Mark.OPEN
        for label, clause in zip(LABELS, self.clauses, strict=False):
            values = literal_values(clause, true)
            yield label + "".join(map("".join, zip(clause, values, strict=False)))
            if TRUE in values:
                continue
            left = [literal for literal, value in zip(clause, values, strict=True) if value == OPEN]
            if len(left) < 2:
                verdict = "".join(left) or FALSE
                break
            yield UNDECIDED
            verdict = OPEN + left[0]
        yield from (Mark.SPLIT, verdict, Mark.CLOSE)
        return verdict


def literal_values(clause: str, true: frozenset[str]) -> str:
    """Returns the values of a clause's literals up to the first that is true, when the literals `true` are."""
    values = "".join(TRUE if x in true else FALSE if negation(x) in true else OPEN for x in clause)
    before, found, _ = values.partition(TRUE)
    return before + found


def sample_sat(size: int, satisfiable: bool, rng: random.Random) -> SatProblem:
    """Draws a problem with `size` variables that is satisfiable or not, as asked.

    There are ``int(4.5 * size)`` clauses of three distinct variables with random signs, each drawn by itself (with
    three variables there are but 8 clauses, and some repeat). Drawn until the answer is the one that was asked for.

    Raises:
        ValueError: `size` is outside 3..10.
    """
    check_sizes("size", [size], SIZES)
    while True:
        names = tuple(rng.sample(VARIABLES, size))
        clauses = tuple(_clause(names, rng) for _ in range(int(CLAUSES_PER_VARIABLE * size)))
        problem = SatProblem(names, clauses)
        if problem.is_satisfiable == satisfiable:
            return problem


def _clause(names: Sequence[str], rng: random.Random) -> str:
    return "".join(rng.choice((name, negation(name))) for name in rng.sample(names, WIDTH))


def sat_problems(split: Split, seed: int, sizes: Sequence[int] = SIZES) -> Iterator[SatProblem]:
    """Yields problems of one split for ever (see `problem.distinct`), in turn satisfiable and not, of each size.

    Raises:
        ValueError: an unknown split, or sizes out of range.
    """
    check_sizes("sizes", sizes, SIZES)
    draws = [partial(sample_sat, size, satisfiable) for satisfiable in (True, False) for size in sizes]
    return distinct(draws, split, random.Random(f"3-SAT {split} {seed}"))


def sat_dataset(sizes: Sequence[int] = SIZES, size: int = 100, problem_seed: int = 0, **_: Any) -> DatasetDict:
    """Returns the test problems as lm-eval's `custom_dataset` wants them (it passes model arguments too: ignored).

    Args:
        sizes: numbers of variables, taken in turn, first for a satisfiable problem and then for an unsatisfiable one.
        size: number of problems.
        problem_seed: chooses the problems within the test split.
    """
    return lm_eval_dataset(sat_problems("test", problem_seed, sizes), size, "variables")
