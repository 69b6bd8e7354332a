r"""Sets of real numbers, however they are written: intervals, unions, inequalities in one variable, ``\mathbb{R}``."""

from __future__ import annotations

import re
from typing import Any

import sympy

from hcot_lmeval.answers import algebra
from hcot_lmeval.answers.structure import ORDER, Node, parse, split

_KNOWN = {
    r"\mathbb{R}": sympy.Reals,
    r"\emptyset": sympy.EmptySet,
    r"\mathbb{Z}": sympy.Integers,
    r"\mathbb{N}": sympy.Naturals,
    **dict.fromkeys(("all real numbers", "all reals", "real numbers"), sympy.Reals),
    **dict.fromkeys(("all integers", "integers"), sympy.Integers),
}
_X = sympy.Dummy("x", real=True)


def is_region(node: Node) -> bool:
    """Whether a node can only mean a set of numbers or an order: half-open brackets, unions, inequalities."""
    if node.kind == "chain":
        return bool(set(node.marks) & (ORDER | {"!=", "notin"})) or (
            set(node.marks) <= {"in", "="} and is_region(node.items[-1])
        )
    if node.kind == "list":
        return any(item.kind == "chain" and set(item.marks) & (ORDER | {"!="}) for item in node.items)
    if node.kind == "tuple":
        return len(node.items) == 2 and (node.marks in (("(", "]"), ("[", ")")) or r"\infty" in node.text)
    return node.kind == "union" or node.text in _KNOWN or r"\setminus" in node.text


def equal(gold: Node, answer: Node) -> bool | None:
    """Whether both denote the same set of reals; None when one of them denotes none that can be computed."""
    one, other = _region(gold), _region(answer)
    if one is None or other is None:
        return None
    if one == other:
        return True
    difference = sympy.SymmetricDifference(one, other)
    return (
        difference.is_empty if difference.is_empty is not None else bool(sympy.simplify(difference) == sympy.EmptySet)
    )


def _region(node: Node) -> sympy.Set | None:
    try:
        return _convert(node)
    except (algebra.Unparsed, NotImplementedError, TypeError, ValueError, AttributeError, KeyError):
        return None  # not a set of numbers, or one that sympy cannot solve for


def _convert(node: Node) -> sympy.Set | None:
    if node.text in _KNOWN:
        return _KNOWN[node.text]
    if node.kind == "tuple":
        return _interval(node)
    if node.kind == "union":
        return _all(sympy.Union, node.items)
    if node.kind == "set":
        return sympy.FiniteSet(*(_number(item) for item in node.items))
    if node.kind == "list":
        return _all(sympy.Union if r"\or" in node.marks else sympy.Intersection, node.items)
    if node.kind == "chain":
        return _solve(node)
    parts, marks = split(node.source, frozenset({r"\setminus", "-"}))
    if len(parts) == 2 and marks:
        return _all(sympy.Complement, tuple(parse(part) for part in parts))
    return None


def _all(combine: type[sympy.Set], items: tuple[Node, ...]) -> sympy.Set | None:
    converted = [_convert(item) for item in items]
    return None if any(item is None for item in converted) else combine(*converted)


def _interval(node: Node) -> sympy.Set | None:
    if len(node.items) != 2:
        return None
    low, high = (_number(item) for item in node.items)
    return sympy.Interval(low, high, node.marks[0] == "(", node.marks[1] == ")")


def _number(node: Node) -> sympy.Expr:
    value = algebra.read(re.sub(r"^\s*\+", "", node.source)).doit()
    if value.free_symbols:
        raise algebra.Unparsed(node.source)
    return value


def _solve(node: Node) -> sympy.Set | None:
    if set(node.marks) <= {"in", "="}:
        return _convert(node.items[-1])
    sides: list[Any] = [_side(item) if item.kind == "leaf" else None for item in node.items]
    if any(side is None for side in sides):
        return None
    variables = set().union(*(side.free_symbols for side in sides))
    if len(variables) != 1:
        return None
    variable = variables.pop()
    steps = zip(sides, node.marks, sides[1:], strict=False)
    return sympy.Intersection(*(_solution(a, mark, b, variable) for a, mark, b in steps))


def _side(item: Node) -> sympy.Expr:
    """A formula; a value like ``g(x)`` is the variable of which the inequality speaks."""
    called = re.fullmatch(r"[A-Za-z]'*(?:_\w)?\([A-Za-z](?:,[A-Za-z])*\)", item.text)
    return sympy.Symbol(item.text, real=True) if called else algebra.read(item.source)


def _solution(left: sympy.Expr, mark: str, right: sympy.Expr, variable: sympy.Symbol) -> sympy.Set:
    left, right = left.doit().subs(variable, _X), right.doit().subs(variable, _X)
    if mark == "!=":
        return sympy.Complement(sympy.Reals, sympy.solveset(left - right, _X, sympy.Reals))
    relation = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "=": sympy.Eq}[mark](left, right)
    return relation.as_set() if relation.free_symbols else (sympy.Reals if relation else sympy.EmptySet)
