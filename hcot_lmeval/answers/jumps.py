"""Functions that jump, at whose jumps alone two formulas may differ: floor, ceiling, remainder, gcd, lcm.

Random points miss such differences, so formulas that hold them are compared at all small integers, on a fine grid, and
where the argument of a floor or ceiling is an integer. In floating point: what differs there is asked again, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice, product
from typing import Any

import sympy

POINTS = 6000  # of a grid
_SUSPECTS = 24  # points at which floating point differs and exact arithmetic is asked

Point = dict[sympy.Symbol, sympy.Rational]


class Gcd(sympy.Function):
    """The greatest common divisor; sympy's own is that of polynomials, by which gcd(a, b) is 1."""

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """Evaluates at integers."""
        return sympy.igcd(*args) if all(arg.is_Integer for arg in args) else None


class Lcm(sympy.Function):
    """The least common multiple; see `Gcd`."""

    @classmethod
    def eval(cls, *args: Any) -> Any:
        """Evaluates at integers."""
        return sympy.ilcm(*args) if len(args) > 1 and all(arg.is_Integer for arg in args) else None


_DIVISORS = (Gcd, Lcm)
_STEPS = (sympy.floor, sympy.ceiling)
_CALLS = [{"Gcd": math.gcd, "Lcm": math.lcm, "Mod": lambda a, b: a % b, "floor": math.floor, "ceiling": math.ceil}]


def integers(exprs: Iterable[sympy.Expr]) -> set[sympy.Symbol]:
    """The variables that can only be integers: those of a gcd or lcm."""
    calls = (call for expr in exprs for call in expr.atoms(*_DIVISORS))
    return {symbol for call in calls for symbol in call.free_symbols}


def suspects(left: sympy.Expr, right: sympy.Expr, whole: set[sympy.Symbol]) -> list[Point]:
    """Returns points at which the formulas seem to differ; none if neither holds a function that jumps.

    Args:
        left: a formula.
        right: the other.
        whole: the variables that take positive integers only.
    """
    if not (left.has(*_STEPS, *_DIVISORS, sympy.Mod) or right.has(*_STEPS, *_DIVISORS, sympy.Mod)):
        return []
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    one, other = (sympy.lambdify(symbols, expr, [*_CALLS, "math"]) for expr in (left, right))
    points = (*_jumps((left, right), symbols, whole), *_grid(symbols, whole))
    found = (point for point in points if _differ(one, other, [_plain(value) for value in point]))
    return [dict(zip(symbols, map(sympy.Rational, point), strict=True)) for point in islice(found, _SUSPECTS)]


def _plain(value: sympy.Rational) -> float | int:
    return int(value) if value == int(value) else float(value)


def _differ(one: Any, other: Any, point: list[float | int]) -> bool:
    try:
        return not math.isclose(one(*point), other(*point), rel_tol=1e-9, abs_tol=1e-12)
    except (ArithmeticError, ValueError, TypeError):
        return False  # not defined there, or not real


def _grid(symbols: list[sympy.Symbol], whole: set[sympy.Symbol]) -> Iterator[tuple[Any, ...]]:
    side = int(POINTS ** (1 / len(symbols)))
    steps = 12 if len(symbols) == 1 else 2
    natural = range(1, side + 1)
    fine = [sympy.Rational(k, steps) for k in range(-side // 4, side * 3 // 4)]
    yield from product(*(natural if symbol in whole else fine for symbol in symbols))
    yield from product(*(natural for _ in symbols))


def _jumps(
    exprs: tuple[sympy.Expr, ...], symbols: list[sympy.Symbol], whole: set[sympy.Symbol]
) -> Iterator[tuple[Any, ...]]:
    """Where a linear argument of a floor or ceiling is an integer, the other variables being small integers."""
    steps = {call.args[0] for expr in exprs for call in expr.atoms(*_STEPS)}
    for argument, symbol, seed in product(sorted(steps, key=str), symbols, range(1, 4)):
        others = {other: sympy.Integer(seed + at) for at, other in enumerate(symbols) if other != symbol}
        if symbol in whole or not argument.has(symbol):
            continue
        slope, rest = sympy.Wild("slope", exclude=[symbol]), sympy.Wild("rest", exclude=[symbol])
        line = sympy.expand(argument.subs(others)).match(slope * symbol + rest)
        if line and line[slope].is_Rational and line[rest].is_Rational and line[slope]:
            for level in range(-3, 8):
                at = (level - line[rest]) / line[slope]
                yield tuple(at if other == symbol else others[other] for other in symbols)
