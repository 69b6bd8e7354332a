r"""Seeded nested arithmetic with gold hierarchical traces: problems that need many steps and little memory.

A problem is a list of definitions in shuffled order and a question::

    c=4*7;a=b-c;b=c+c;a?

Every definition joins two digits or defined names by ``+``, ``-`` or ``*`` modulo 10. The gold trace evaluates the
question by recursion, one block per evaluation, whose solution is the value alone::

    <think>[THOUGHT]a=b-c[THOUGHT]b=c+c ... 8+8[SOLUTION]6[RETURN]
                         [THOUGHT]c=4*7[SOLUTION]8[RETURN]6-8[SOLUTION]8[RETURN]</think>\boxed{8}

A name is evaluated anew wherever it is used, so a trace grows exponentially with the depth of the problem while the
live context under pruning grows linearly: the regime that pruned reasoning is for. (A solver that remembers every name
would need fewer steps; the *flat twin* of a trace is the same steps in the same order without blocks, not that solver.)
Definitions that the question never reaches are left in as distractors.

Problems that differ only in the names of variables or in the order of definitions are one problem: they share a
fingerprint, which alone decides the split, so that the splits cannot overlap whatever the seeds.

This module imports the standard library alone; `arith_dataset` imports `datasets` when it is called.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from hcot_lmeval.markup import Markup, get_markup

if TYPE_CHECKING:
    from datasets import DatasetDict

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

MODULUS = 10
OPERATORS = "+-*"
NAMES = string.ascii_lowercase[:16]
NAMES_PER_LEVEL = 2
"""Two names a level suffice for full binary recursion and keep the prompt short: 6 tokens a definition."""
MAX_DEPTH = 1 + (len(NAMES) - 1) // NAMES_PER_LEVEL
DIGIT_OPERANDS = 0.1
"""Share of operands above the last level that are digits, so that the shape of the recursion has to be read."""


@dataclass(frozen=True)
class Definition:
    """``name = left operator right``; an operand is a digit or the name of another definition."""

    name: str
    left: str
    operator: str
    right: str

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
class Problem:
    """Definitions in the order of the prompt, the name that is asked for, and the levels of recursion it takes."""

    definitions: tuple[Definition, ...]
    question: str
    depth: int

    @cached_property
    def by_name(self) -> dict[str, Definition]:
        return {definition.name: definition for definition in self.definitions}

    @property
    def prompt(self) -> str:
        return ";".join(str(definition) for definition in self.definitions) + f";{self.question}?"

    @cached_property
    def steps(self) -> tuple[_Step, ...]:
        """The evaluation in order, opening and closing each name as the recursion meets it."""
        return tuple(_evaluate(self, self.question, []))

    @property
    def value(self) -> int:
        """The answer, 0..9."""
        return self.steps[-1].value

    @property
    def blocks(self) -> int:
        """How many evaluations (blocks of the trace) the problem takes."""
        return sum(step.opens for step in self.steps)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the problem with names and order made canonical."""
        names: dict[str, str] = {}
        for step in self.steps:
            names.setdefault(step.definition.name, f"v{len(names)}")
        reached = (self.by_name[name] for name in names)
        canonical = ";".join(f"{names.get(d.left, d.left)}{d.operator}{names.get(d.right, d.right)}" for d in reached)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def split(self) -> Split:
        """The split that this problem belongs to: 8 of 10 train, 1 validation, 1 test."""
        remainder = int(self.fingerprint, 16) % 10
        return "test" if remainder == 0 else "validation" if remainder == 1 else "train"


@dataclass(frozen=True)
class _Step:
    """One end of an evaluation: `opens` at its start (operands unknown), else its end with the operands' values."""

    definition: Definition
    opens: bool
    operands: tuple[int, int] = (0, 0)
    value: int = 0


def _evaluate(problem: Problem, name: str, result: list[int]) -> Iterator[_Step]:
    """Yields the steps of evaluating `name` and appends its value to `result`."""
    definition = problem.by_name[name]
    yield _Step(definition, opens=True)
    values: list[int] = []
    for operand in (definition.left, definition.right):
        if operand.isdigit():
            values.append(int(operand))
        else:
            yield from _evaluate(problem, operand, values)
    value = apply_operator(definition.operator, *values)
    result.append(value)
    yield _Step(definition, opens=False, operands=(values[0], values[1]), value=value)


def sample_problem(depth: int, rng: random.Random) -> Problem:
    """Draws a problem that takes exactly `depth` levels of recursion.

    Raises:
        ValueError: `depth` is outside 1..MAX_DEPTH (there are 26 names).
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"depth={depth} is outside 1..{MAX_DEPTH}: every level uses {NAMES_PER_LEVEL} of 26 names")
    names = rng.sample(NAMES, 1 + (depth - 1) * NAMES_PER_LEVEL)
    levels = [names[:1]] + [names[i : i + NAMES_PER_LEVEL] for i in range(1, len(names), NAMES_PER_LEVEL)]
    definitions = [
        Definition(name, *_operation(below, rng))
        for level, below in zip(levels, [*levels[1:], []], strict=True)
        for name in level
    ]
    rng.shuffle(definitions)
    return Problem(tuple(definitions), names[0], depth)


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


def problems(split: Split, depths: Sequence[int], seed: int = 0) -> Iterator[Problem]:
    """Yields problems of one split for ever, going through `depths` in turn; the same arguments give the same problems.

    Raises:
        ValueError: an unknown split, or a depth out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    rng = random.Random(f"nested arithmetic {split} {seed}")
    for depth in itertools.cycle(depths):
        problem = sample_problem(depth, rng)
        while problem.split != split:
            problem = sample_problem(depth, rng)
        yield problem


def gold_trace(problem: Problem, markup: str | Markup = "hcot") -> str:
    """Returns the text a perfect hierarchical reasoner writes behind the prompt."""
    marks = get_markup(markup)
    begin, end = marks.think
    body = "".join(_write(step, marks) for step in problem.steps)
    return f"{begin}{body}{end}\\boxed{{{problem.value}}}"


def flat_trace(problem: Problem, markup: str | Markup = "hcot") -> str:
    """Returns the flat twin of `gold_trace`: the same steps with a ``;`` wherever a marker stood, hence as long."""
    text = gold_trace(problem, markup)
    for marker in get_markup(markup).markers:
        text = text.replace(marker, ";")
    return text


def _write(step: _Step, markup: Markup) -> str:
    definition = step.definition
    if step.opens:
        return f"{markup.open}{definition}"
    left, right = step.operands
    reduction = "" if definition.is_reduced else f"{left}{definition.operator}{right}"
    return f"{reduction}{markup.split}{markup.lead or ''}{step.value}{markup.close}"


TEST_DEPTHS = (3, 4, 5, 6)


def arith_dataset(depths: Sequence[int] = TEST_DEPTHS, size: int = 100, problem_seed: int = 0, **_: Any) -> DatasetDict:
    """Returns the test problems as lm-eval's `custom_dataset` wants them (it passes model arguments too: ignored).

    Args:
        depths: levels of recursion, taken in turn.
        size: number of problems.
        problem_seed: chooses the problems within the test split (`seed` is a model argument already).

    Returns:
        one split ``test`` with the columns problem, answer, depth, blocks (evaluations the gold trace takes).
    """
    from datasets import Dataset, DatasetDict

    rows = [
        {"problem": p.prompt, "answer": str(p.value), "depth": p.depth, "blocks": p.blocks}
        for p in itertools.islice(problems("test", depths, problem_seed), size)
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})
