"""Problems made on the spot from a seed, with gold hierarchical traces: many steps, little memory.

problem.py   what a problem is; its gold trace and the flat twin; splits that cannot overlap
arith.py     nested arithmetic modulo 10
cnf.py       formulas, one character a token
qbf.py       quantified Boolean formulas, evaluated branch by branch
sat.py       3-SAT, searched by backtracking

The package imports the standard library alone; the functions for lm-eval import `datasets` when they are called.
"""

from __future__ import annotations

import inspect
import itertools
import string
from collections.abc import Callable, Iterator
from typing import Any

from hcot_lmeval.errors import did_you_mean
from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.synthetic.arith import (
    NAMES,
    OPERATORS,
    TEST_DEPTHS,
    arith_dataset,
    arith_problems,
    problems,
    sample_problem,
)
from hcot_lmeval.synthetic.cnf import LABELS, OPEN, VARIABLES
from hcot_lmeval.synthetic.problem import SPLITS, Mark, Problem, Split, check_split, flat_trace, gold_trace
from hcot_lmeval.synthetic.qbf import EXISTS, FORALL, qbf_dataset, qbf_problems
from hcot_lmeval.synthetic.sat import UNDECIDED, sat_dataset, sat_problems

__all__ = [
    "training_rows",
    "TASKS",
    "Problem",
    "Split",
    "SPLITS",
    "gold_trace",
    "flat_trace",
    "arith_problems",
    "qbf_problems",
    "sat_problems",
    "arith_dataset",
    "qbf_dataset",
    "sat_dataset",
    "problems",
    "sample_problem",
    "ALPHABET",
    "NAMES",
    "OPERATORS",
    "TEST_DEPTHS",
]

ALPHABET = "".join(
    (NAMES, string.digits, OPERATORS, "=;?}", VARIABLES.upper(), EXISTS, FORALL, UNDECIDED, OPEN, *Mark, LABELS)
)
"""The characters of all problems and traces, apart from the notation and the opening of the box."""

TASKS: dict[str, Callable[..., Iterator[Problem]]] = {
    "arith": arith_problems,
    "qbf": qbf_problems,
    "sat": sat_problems,
}
"""Name of a family -> its stream of problems; the arguments behind split and seed are the family's options."""


def training_rows(
    task: str,
    split: Split,
    *,
    size: int = 10_000,
    seed: int = 0,
    flat: bool = False,
    markup: str | Markup = "hcot",
    **options: Any,
) -> Iterator[dict[str, str]]:
    """Returns rows to train on; the same arguments give the same rows.

    No two rows hold the same problem, up to its wording, as long as there are others. Some kinds of problem are few:
    nested arithmetic has 300 of depth 1, 3-SAT 190 unsatisfiable ones with three variables. Those repeat
    when they are used up, in other words.

    Args:
        task: arith, qbf or sat.
        split: train, validation or test.
        size: number of rows.
        seed: chooses the problems within the split.
        flat: put the flat twin of the trace into the column hierarchical_cot.
        markup: notation of the traces.
        **options: of the family: ``depths`` of arith, ``sizes`` of qbf and sat, lists that are taken in turn.

    Returns:
        an iterator over dictionaries with question, hierarchical_cot (thinking tokens and boxed answer included) and
        expected_answer.

    Raises:
        ValueError: an unknown task, split or option, or a value out of range; at once, not at the first row.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")
    check_split(split)
    if type(size) is not int or size < 1:
        raise ValueError(f"size={size!r}: a positive number of rows is needed")
    _check_options(task, options)
    stream = TASKS[task](split, seed, **options)
    marks, write = get_markup(markup), flat_trace if flat else gold_trace
    return (
        {"question": p.prompt, "hierarchical_cot": write(p, marks), "expected_answer": p.answer}
        for p in itertools.islice(stream, size)
    )


def _check_options(task: str, options: dict[str, Any]) -> None:
    shared = ("size", "seed", "flat", "markup")
    known = [*shared, *list(inspect.signature(TASKS[task]).parameters)[2:]]
    for name in options:
        if name not in known:
            near = did_you_mean(name, known) or "."
            raise ValueError(f"option {name!r} of task {task!r} is unknown{near} Known are {', '.join(known)}")
