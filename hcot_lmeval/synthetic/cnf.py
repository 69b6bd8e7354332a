"""Formulas in conjunctive normal form, one character a token; what the families `qbf` and `sat` have in common.

A literal is a letter, ``a`` for a variable and ``A`` for its negation; a clause is a string of literals, one of which
has to be true; a formula is a sequence of clauses. Written out, each clause stands behind its number, ``①abC②Bc``: the
number names it, so that to copy a clause or to go on to the next one takes a look at one place of the prompt.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

VARIABLES = "abcdefghij"
"""Names of variables. Problems draw theirs from all ten, so that small ones practise the letters of large ones."""
SIZES = range(3, len(VARIABLES) + 1)
"""Numbers of variables, as in PENCIL (arXiv 2503.14337)."""
LABELS = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳㉑㉒㉓㉔㉕㉖㉗㉘㉙㉚㉛㉜㉝㉞㉟㊱㊲㊳㊴㊵㊶㊷㊸㊹㊺"
"""Numbers of clauses: 45 suffice for 3-SAT with ten variables."""
TRUE, FALSE, OPEN = "1", "0", "~"
"""Values of literals, branches and problems; of a literal that has none yet. Digits, for ``F`` is a literal and the
answer checker knows numbers."""


def negation(literal: str) -> str:
    """Returns the literal that is true when `literal` is false."""
    return literal.swapcase()


def truth(value: bool) -> str:
    """Returns `TRUE` or `FALSE`."""
    return TRUE if value else FALSE


def labelled(clauses: Iterable[str]) -> Iterator[str]:
    """Yields each clause behind its number."""
    return (label + clause for label, clause in zip(LABELS, clauses, strict=False))


def models(clauses: Iterable[str], order: Sequence[str]) -> int:
    """Returns the set of satisfying assignments as bits of an integer.

    Bit k stands for the assignment in which the variable ``order[i]`` is true if bit i of k is set.
    """
    full = (1 << (1 << len(order))) - 1
    columns = {name: _column(i, len(order)) for i, name in enumerate(order)}
    true = columns | {negation(name): full ^ column for name, column in columns.items()}
    for clause in clauses:
        satisfied = 0
        for literal in clause:
            satisfied |= true[literal]
        full &= satisfied
    return full


@cache
def _column(index: int, count: int) -> int:
    """The assignments of `count` variables in which the one at `index` is true, as bits."""
    half = 1 << index
    return sum(((1 << half) - 1) << (start + half) for start in range(0, 1 << count, 2 * half))


def canonical(clauses: Sequence[str], classes: Mapping[str, int]) -> str:
    """Returns the formula with every variable replaced by its rank, clauses and literals sorted.

    Ranks come from colour refinement: variables start with their class and are told apart by the clauses they stand in
    until nothing changes. Formulas that differ in names and order alone therefore give the same text. The reverse holds
    where the refinement tells all variables apart; where it does not, formulas that differ may share a text, which is
    harmless for a split.

    Args:
        clauses: the formula.
        classes: variable -> a number that its name does not decide.
    """
    rank = dict(classes)
    while True:
        views = {name: (rank[name], _surroundings(name, clauses, rank)) for name in rank}
        order = {view: index for index, view in enumerate(sorted(set(views.values())))}
        if len(order) == len(set(rank.values())):
            break
        rank = {name: order[view] for name, view in views.items()}
    return ";".join(sorted("".join(f"{'+' if up else '-'}{r}" for r, up in _view(c, rank)) for c in clauses))


def _view(clause: str, rank: Mapping[str, int]) -> tuple[tuple[int, bool], ...]:
    return tuple(sorted((rank[literal.lower()], literal.islower()) for literal in clause))


def _surroundings(name: str, clauses: Sequence[str], rank: Mapping[str, int]) -> tuple[object, ...]:
    occurrences = (
        (literal.islower(), _view(clause, rank)) for clause in clauses for literal in clause if literal.lower() == name
    )
    return tuple(sorted(occurrences))
