r"""Nested arithmetic: problems that need many steps and little memory.

A problem is a list of definitions in shuffled order and a question::

    c=4*7;a=b-c;b=c+c;a?

Every definition joins two digits or defined names by ``+``, ``-`` or ``*`` modulo 10. The gold trace evaluates the
question by recursion, one block per evaluation, whose solution is the value alone::

    <think>[THOUGHT]a=b-c[THOUGHT]b=c+c ... 8+8[SOLUTION]6[RETURN]
                         [THOUGHT]c=4*7[SOLUTION]8[RETURN]6-8[SOLUTION]8[RETURN]</think>\boxed{8}

A name is evaluated anew wherever it is used, so a trace grows exponentially with the depth of the problem while the
live context under pruning grows linearly: the regime that pruned reasoning is for. (A solver that remembers every name
would need fewer steps; the flat twin is the same steps in the same order, not that solver.) Definitions that the
question never reaches are left in as distractors. Problems that differ in names, in the order of the definitions or in
distractors are one problem.

This module imports the standard library alone.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hcot_lmeval.synthetic.problem import (
    Mark,
    Piece,
    Problem,
    Split,
    check_sizes,
    check_split,
    distinct,
    draw_in_split,
    lm_eval_dataset,
)

if TYPE_CHECKING:
    from datasets import DatasetDict

MODULUS = 10
OPERATORS = "+-*"
NAMES = string.ascii_lowercase[:16]
NAMES_PER_LEVEL = 2
"""Two names a level suffice for full binary recursion and keep the prompt short: 6 tokens a definition."""
MAX_DEPTH = 1 + (len(NAMES) - 1) // NAMES_PER_LEVEL
DEPTHS = range(1, MAX_DEPTH + 1)
DIGIT_OPERANDS = 0.1
"""Share of operands above the last level that are digits, so that the shape of the recursion has to be read."""
TEST_DEPTHS = (3, 4, 5, 6)


@dataclass(frozen=True)
class Definition:
    """``name = left operator right``; an operand is a digit or the name of another definition."""

    name: str
    left: str
    operator: str
    right: str

    @property
    def operands(self) -> tuple[str, str]:
        return self.left, self.right

    @property
    def is_reduced(self) -> bool:
        """Whether both operands are digits already."""
        return self.left.isdigit() and self.right.isdigit()

    def __str__(self) -> str:
        return f"{self.name}={self.left}{self.operator}{self.right}"


def apply_operator(operator: str, left: int, right: int) -> int:
    """Returns ``left operator right`` modulo 10."""
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operator] % MODULUS


@dataclass(frozen=True)
class ArithProblem(Problem):
    """Definitions in the order of the prompt, the name that is asked for, and the levels of recursion it takes."""

    definitions: tuple[Definition, ...]
    question: str
    depth: int

    @cached_property
    def by_name(self) -> dict[str, Definition]:
        return {definition.name: definition for definition in self.definitions}

    @property
    def size(self) -> int:
        return self.depth

    @property
    def prompt(self) -> str:
        return ";".join(str(definition) for definition in self.definitions) + f";{self.question}?"

    @cached_property
    def value(self) -> int:
        """The answer, 0..9."""
        return self._value(self.question)

    @property
    def answer(self) -> str:
        return str(self.value)

    @property
    def canonical(self) -> str:
        order = dict.fromkeys(self._reached(self.question))
        names = {name: f"v{index}" for index, name in enumerate(order)}
        reached = (self.by_name[name] for name in names)
        return ";".join(f"{names.get(d.left, d.left)}{d.operator}{names.get(d.right, d.right)}" for d in reached)

    def pieces(self) -> Iterator[Piece]:
        yield from self._evaluate(self.question)

    def _value(self, operand: str) -> int:
        if operand.isdigit():
            return int(operand)
        definition = self.by_name[operand]
        return apply_operator(definition.operator, *map(self._value, definition.operands))

    def _reached(self, name: str) -> Iterator[str]:
        """Yields the names that the evaluation of `name` meets, in order, some of them more than once."""
        yield name
        for operand in self.by_name[name].operands:
            if not operand.isdigit():
                yield from self._reached(operand)

    def _evaluate(self, name: str) -> Generator[Piece, None, int]:
        """Yields the block that evaluates `name`; returns its value."""
        definition = self.by_name[name]
        yield Mark.OPEN
        yield str(definition)
        values = []
        for operand in definition.operands:
            values.append(int(operand) if operand.isdigit() else (yield from self._evaluate(operand)))
        left, right = values
        if not definition.is_reduced:
            yield f"{left}{definition.operator}{right}"
        value = apply_operator(definition.operator, left, right)
        yield from (Mark.SPLIT, str(value), Mark.CLOSE)
        return value


def sample_problem(depth: int, rng: random.Random) -> ArithProblem:
    """Draws a problem that takes exactly `depth` levels of recursion.

    Raises:
        ValueError: `depth` is outside 1..MAX_DEPTH (there are 16 names).
    """
    if depth not in DEPTHS:
        raise ValueError(
            f"depth={depth} is outside 1..{MAX_DEPTH}: every level uses {NAMES_PER_LEVEL} of {len(NAMES)} names"
        )
    names = rng.sample(NAMES, 1 + (depth - 1) * NAMES_PER_LEVEL)
    levels = [names[:1]] + [names[i : i + NAMES_PER_LEVEL] for i in range(1, len(names), NAMES_PER_LEVEL)]
    definitions = [
        Definition(name, *_operation(below, rng))
        for level, below in zip(levels, [*levels[1:], []], strict=True)
        for name in level
    ]
    rng.shuffle(definitions)
    return ArithProblem(tuple(definitions), names[0], depth)


def _operation(below: Sequence[str], rng: random.Random) -> tuple[str, str, str]:
    """Draws (left, operator, right); with names below at least one operand is a name, which fixes the depth."""
    operands = [_operand(below, rng), _operand(below, rng)]
    if below and all(operand.isdigit() for operand in operands):
        operands[rng.randrange(2)] = rng.choice(below)
    return operands[0], rng.choice(OPERATORS), operands[1]


def _operand(below: Sequence[str], rng: random.Random) -> str:
    if not below or rng.random() < DIGIT_OPERANDS:
        return str(rng.randrange(MODULUS))
    return rng.choice(below)


def problems(split: Split, depths: Sequence[int], seed: int = 0) -> Iterator[ArithProblem]:
    """Yields problems of one split for ever, going through `depths` in turn; the same arguments give the same problems.

    Small problems repeat themselves (there are 300 of depth 1); `arith_problems` passes over repetitions.

    Raises:
        ValueError: an unknown split, or a depth out of range.
    """
    check_split(split)
    rng = _generator(split, seed)
    for depth in itertools.cycle(depths):
        yield draw_in_split(partial(sample_problem, depth), split, rng)


def arith_problems(split: Split, seed: int, depths: Sequence[int] = DEPTHS[:6]) -> Iterator[ArithProblem]:
    """Yields problems as `problems` does, no two alike (see `problem.distinct`).

    Raises:
        ValueError: an unknown split, or depths out of range.
    """
    check_sizes("depths", depths, DEPTHS)
    return distinct([partial(sample_problem, depth) for depth in depths], split, _generator(split, seed))


def _generator(split: Split, seed: int) -> random.Random:
    return random.Random(f"nested arithmetic {split} {seed}")


def arith_dataset(depths: Sequence[int] = TEST_DEPTHS, size: int = 100, problem_seed: int = 0, **_: Any) -> DatasetDict:
    """Returns the test problems as lm-eval's `custom_dataset` wants them (it passes model arguments too: ignored).

    Args:
        depths: levels of recursion, taken in turn.
        size: number of problems.
        problem_seed: chooses the problems within the test split (`seed` is a model argument already).
    """
    check_sizes("depths", depths, DEPTHS)
    return lm_eval_dataset(problems("test", depths, problem_seed), size, "depth")
