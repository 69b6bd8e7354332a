r"""Quantified Boolean formulas: is it true that for some a, for all b, ... every clause holds?

The kind and size of problem of PENCIL (arXiv 2503.14337), with a generator and traces of our own::

    ∃c~∀a~①c~A~②a~A~c~③C~a~?                                  the prompt: a form, prefix and numbered clauses
    <think>[THOUGHT]∃c[THOUGHT]C0c1∀a[THOUGHT]A0a1①c1②a1③C0a1[SOLUTION]1[RETURN]
                                     [THOUGHT]A1a0①c1②a0A1③C0a0[SOLUTION]0[RETURN][SOLUTION]0[RETURN]
                      [THOUGHT]C1c0∀a[THOUGHT]A0a1①c0A0[SOLUTION]0[RETURN][SOLUTION]0[RETURN][SOLUTION]0[RETURN]
    </think>\boxed{0}

The trace evaluates the tree of quantifiers in depth-first order, the value true first, one block per branch, whose
solution is the branch's value. A branch is not tried when the one before decides: a true one under ∃, a false one
under ∀. A block begins with the values that it gives to a variable's negation and to the variable, and goes on with the
quantifier it has to evaluate or, in a leaf, with the clauses: the literals of each with their values up to the first
that is true, up to the first clause without one.

Every token follows from the live context by one look at one place: the trace copies the prompt and writes a value
wherever the prompt holds a ``~``, and a literal's value is what stood behind it the last time; whether a branch decides
stands just before it. That makes all the difference to a small model. With one value a clause it has to learn the
look-up from a verdict over three of them, nine tenths of which are true; where a block names only the literal that it
makes true, a value is whether something is absent, which was still a guess after two thousand steps. The live context
holds the prompt, at most 10 tokens for each variable, and a leaf; the trace as a whole grows exponentially.

This module imports the standard library alone.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hcot_lmeval.synthetic.cnf import LABELS, OPEN, SIZES, VARIABLES, canonical, labelled, models, negation, truth
from hcot_lmeval.synthetic.problem import Mark, Piece, Problem, Split, check_sizes, distinct, lm_eval_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict

EXISTS, FORALL = "∃", "∀"
CLAUSES_PER_VARIABLE = 2.0
FILLERS = range(4)
"""Clauses that hold a literal and its negation, added to the others: they cost steps and decide nothing."""


@dataclass(frozen=True)
class QbfProblem(Problem):
    """A prefix of (quantifier, variable) pairs, outermost first, and the clauses in the order of the prompt."""

    prefix: tuple[tuple[str, str], ...]
    clauses: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.prefix)

    @property
    def prompt(self) -> str:
        prefix = "".join(quantifier + name + OPEN for quantifier, name in self.prefix)
        clauses = ("".join(literal + OPEN for literal in clause) for clause in self.clauses)
        return f"{prefix}{''.join(labelled(clauses))}?"

    @cached_property
    def is_valid(self) -> bool:
        """Whether the formula is true; computed from the truth table, not by the search of the trace."""
        table = models(self.clauses, [name for _, name in self.prefix])
        # the first variable is the lowest bit of an assignment's number, the last one halves the table
        for index in reversed(range(len(self.prefix))):
            high, low = table >> (1 << index), table & ((1 << (1 << index)) - 1)
            table = high | low if self.prefix[index][0] == EXISTS else high & low
        return bool(table)

    @property
    def answer(self) -> str:
        return truth(self.is_valid)

    @property
    def canonical(self) -> str:
        """Names, order of clauses and literals, and order of neighbours with one quantifier make no difference."""
        groups = [list(group) for _, group in groupby(self.prefix, key=lambda pair: pair[0])]
        classes = {name: index for index, group in enumerate(groups) for _, name in group}
        return "".join(quantifier for quantifier, _ in self.prefix) + canonical(self.clauses, classes)

    def pieces(self) -> Iterator[Piece]:
        yield Mark.OPEN
        value = yield from self._evaluate(())
        yield from (Mark.SPLIT, truth(value), Mark.CLOSE)

    def _evaluate(self, path: tuple[str, ...]) -> Generator[Piece, None, bool]:
        """Yields what stands in the block that is reached by making the literals of `path` true; returns its value."""
        if len(path) == len(self.prefix):
            return (yield from self._check(frozenset(path)))
        quantifier, name = self.prefix[len(path)]
        yield quantifier + name
        value = False
        for literal in (name, negation(name)):
            yield from (Mark.OPEN, f"{negation(name)}{truth(literal != name)}{name}{truth(literal == name)}")
            value = yield from self._evaluate((*path, literal))
            yield from (Mark.SPLIT, truth(value), Mark.CLOSE)
            if value == (quantifier == EXISTS):
                break
        return value

    def _check(self, true: frozenset[str]) -> Generator[Piece, None, bool]:
        """Yields the clauses, as far as they have to be read; returns whether all are true."""
        for label, clause in zip(LABELS, self.clauses, strict=False):
            values = [literal in true for literal in clause]
            read = values.index(True) + 1 if any(values) else len(values)
            yield label + "".join(literal + truth(value) for literal, value in zip(clause[:read], values, strict=False))
            if not any(values):
                return False
        return True


def sample_qbf(size: int, valid: bool, rng: random.Random) -> QbfProblem:
    """Draws a problem with `size` variables that is valid or not, as asked.

    Each quantifier is ∃ with probability 1/2, both occur. There are ``int(2.0 * size)`` clauses of two or three
    variables, one of which at least is under ∃ (a clause without would decide the formula by itself), and 0 to 3
    fillers. Clauses are drawn one by one, and those that would make the formula false are drawn again. For a problem
    that is not valid, clauses of such a formula are then replaced until it is false. So both kinds have the same
    prefixes and nearly the same clauses, and there is no telling them apart at a glance.

    Raises:
        ValueError: `size` is outside 3..10.
    """
    check_sizes("size", [size], SIZES)
    names = rng.sample(VARIABLES, size)
    problem = QbfProblem(tuple(zip(_quantifiers(size, rng), names, strict=True)), ())
    while len(problem.clauses) < int(CLAUSES_PER_VARIABLE * size):
        longer = replace(problem, clauses=(*problem.clauses, _clause(problem.prefix, rng)))
        problem = longer if longer.is_valid else problem
    while problem.is_valid != valid:
        place = rng.randrange(len(problem.clauses))
        others = problem.clauses[:place] + problem.clauses[place + 1 :]
        problem = replace(problem, clauses=(*others, _clause(problem.prefix, rng)))
    fillers = [_filler(names, rng) for _ in range(rng.choice(FILLERS))]
    clauses = [*problem.clauses, *fillers]
    rng.shuffle(clauses)
    return replace(problem, clauses=tuple(clauses))


def _quantifiers(size: int, rng: random.Random) -> list[str]:
    quantifiers = [EXISTS]
    while len(set(quantifiers)) < 2:
        quantifiers = rng.choices((EXISTS, FORALL), k=size)
    return quantifiers


def _clause(prefix: Sequence[tuple[str, str]], rng: random.Random) -> str:
    first = rng.choice([name for quantifier, name in prefix if quantifier == EXISTS])
    others = rng.sample([name for _, name in prefix if name != first], rng.choice((1, 2)))
    literals = [rng.choice((name, negation(name))) for name in (first, *others)]
    rng.shuffle(literals)
    return "".join(literals)


def _filler(names: Sequence[str], rng: random.Random) -> str:
    name, other = rng.sample(names, 2)
    literals = [name, negation(name), *rng.choice(([], [other], [negation(other)]))]
    rng.shuffle(literals)
    return "".join(literals)


def qbf_problems(split: Split, seed: int, sizes: Sequence[int] = SIZES) -> Iterator[QbfProblem]:
    """Yields problems of one split for ever, in turn valid and not, of each size; see `problem.distinct`.

    Raises:
        ValueError: an unknown split, or sizes out of range.
    """
    check_sizes("sizes", sizes, SIZES)
    draws = [partial(sample_qbf, size, valid) for valid in (True, False) for size in sizes]
    return distinct(draws, split, random.Random(f"quantified formulas {split} {seed}"))


def qbf_dataset(sizes: Sequence[int] = SIZES, size: int = 100, problem_seed: int = 0, **_: Any) -> DatasetDict:
    """Returns the test problems as lm-eval's `custom_dataset` wants them (it passes model arguments too: ignored).

    Args:
        sizes: numbers of variables, taken in turn, first for a valid problem and then for an invalid one.
        size: number of problems.
        problem_seed: chooses the problems within the test split.
    """
    return lm_eval_dataset(qbf_problems("test", problem_seed, sizes), size, "variables")
