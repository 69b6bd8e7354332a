r"""Whether two formulas are equal. Runs in worker processes only: it imports sympy and math-verify.

math-verify's grammar reads the LaTeX. Equality is decided here, because ``math_verify.verify`` rounds to six decimals
and lets open intervals pass for sets; it is asked last, for what neither exact arithmetic nor evaluation can settle.

1. Rationals are compared exactly. A decimal equals a value that it cannot spell out when it is that value, correctly
   rounded, with at least `ROUNDED_DIGITS` significant digits.
2. Constants are equal when their difference is zero to `DIGITS` digits.
3. Formulas are equal when they agree to `DIGITS` digits at random rational points: all positive ones, and those of
   mixed sign at which both are real. With floors, factorials or signs like (-1)^n, variables named like integers take
   integers. Formulas with functions that jump have to agree at the jumps too (:mod:`hcot_lmeval.answers.jumps`).
4. Matrices are equal when their entries are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from math_verify import verify

from hcot_lmeval.answers import jumps
from hcot_lmeval.answers.literals import ROUNDED_DIGITS

DIGITS = 40
_PRINTED_DIGITS = 15  # a decimal this long is a printed floating-point number, right to a few units of the last place
_PRINTED_ERROR = sympy.Rational(1, 10**15)
_TOLERANCE = sympy.Float(10) ** -30
_POINTS = 8
_MAX_BITS = 4_000_000  # size of an integer that is still worth evaluating; 2016! has 20,000 bits
_MAX_EXPONENT = 100_000  # of a variable; at a sampled point its power has ten times as many bits
_INTEGERS = frozenset("nmkpqlijNMK")
_CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)

# In this process, whose only task it is, the grammar builds our functions: sympy's answer 1 for gcd(a, b).
_Latex2Sympy.handle_gcd_lcm = lambda self, name, args: {"gcd": jumps.Gcd, "lcm": jumps.Lcm}[name](
    *map(sympy.nsimplify, args)
)

_Expr: TypeAlias = Any  # sympy.Basic or sympy.MatrixBase: sympy's own annotations do not cover what it returns


class Unparsed(ValueError):
    """The grammar does not know this formula; `side` tells whose it is, "gold" or "answer"."""

    side = "gold"


class TooLarge(ValueError):
    """A number in this formula is too large to be evaluated."""


@lru_cache(maxsize=512)
def read(source: str) -> _Expr:
    """Parses a normalized formula exactly: decimals become fractions, i the imaginary unit, degrees radians.

    Raises:
        Unparsed: the grammar refuses it.
        TooLarge: it holds a number of more than `_MAX_BITS` bits.
    """
    source = _INDEX.sub(_indexed, source)
    if re.search(r"(?<![\d_^])\d+\s+\d|\\text|\\ldots|\\or|\\and", source) or not source.strip():
        raise Unparsed(source)
    try:
        expr = latex2sympy(
            _prepare(source), is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONFIG
        )
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the grammar raises bare Exceptions
        raise Unparsed(source) from error
    if not isinstance(expr, (sympy.Expr, sympy.MatrixBase, sympy.Set, sympy.Tuple)):
        raise Unparsed(source)
    _check_size(expr)
    imaginary = [symbol for symbol in expr.free_symbols if symbol.name in ("i", "I")]
    expr = expr.xreplace(dict.fromkeys(imaginary, sympy.I))
    return expr.replace(sympy.UnevaluatedExpr, lambda inner: inner) if isinstance(expr, sympy.Expr) else expr


_MIXED = re.compile(r"(?<![\w.}^)])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}")


_INDEX = re.compile(
    r"(?<![A-Za-z\\])([A-Za-z]|\\(?!log|sum|prod|int|lim|max|min|ln)[A-Za-z]+)\s*_\s*"
    r"(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\\[A-Za-z]+|\w))"
)
_TAKEN = frozenset("EIei")  # constants of the grammar, unless they have an index


def _indexed(match: re.Match[str]) -> str:
    r"""``L_{\odot}``, ``T_{\text{eff}}``, ``E_1``: a symbol of its own whatever the index is made of."""
    index = re.sub(r"\\(?:text|circ\b)?|[^A-Za-z0-9]", "", match[2] or match[3] or "")
    if not index or (match[1].isalpha() and match[1] not in _TAKEN and match[0].isalnum()):
        return match.group()
    return rf"\Xi_{{{match[1]}{index}}} " if match[1] in _TAKEN else rf"{match[1]}_{{{index}}} "


def _degrees(source: str) -> str:
    r"""``60^{\circ}`` to radians, in brackets, so that a function without brackets takes all of it."""
    while (at := source.rfind(r"^{\circ}")) >= 0:
        head, tail = source[:at].rstrip(), source[at + len(r"^{\circ}") :]
        base = re.search(r"(?<![\d.])\d+(?:\.\d+)?$|\\[A-Za-z]+$|[A-Za-z]$", head[-40:])
        start = len(head) - len(base[0]) if base else _opening(head) if head.endswith(")") else len(head)
        value = head[start:]
        radians = rf"(\frac{{{value}\pi}}{{180}})" if value else r"\cdot\frac{\pi}{180}"
        source = head[:start] + radians + tail
    return source


def _opening(source: str) -> int:
    """Where the bracket opens that the last character closes; the length of `source` if nowhere."""
    depth = 0
    for at in range(len(source) - 1, -1, -1):
        depth += (source[at] == ")") - (source[at] == "(")
        if depth == 0:
            return at
    return len(source)


def _prepare(source: str) -> str:
    source = _MIXED.sub(lambda m: f"({m[1]}+\\frac{{{m[2]}}}{{{m[3]}}})" if int(m[2]) < int(m[3]) else m[0], source)
    source = re.sub(r"\\mathbb\{?([A-Z])\}?", r"\1", _degrees(source))
    return re.sub(r"(?<!\d)(\d*+)\.(\d++)", _decimal, source)


def _decimal(match: re.Match[str]) -> str:
    digits = len(match.group(2))
    return rf"(\frac{{{int(match.group(1) + match.group(2))}}}{{{10**digits}}})"


def _check_size(expr: _Expr) -> None:
    for node in sympy.preorder_traversal(expr):
        if isinstance(node, sympy.Pow) and _bits(node) > _MAX_BITS:
            raise TooLarge(f"a power of more than {_MAX_BITS} bits")
        if isinstance(node, sympy.Pow) and node.exp.is_Integer and node.free_symbols and abs(node.exp) > _MAX_EXPONENT:
            raise TooLarge(f"a power of a variable over {_MAX_EXPONENT}")
        if isinstance(node, sympy.factorial) and node.args[0].is_Integer and node.args[0] > 100_000:
            raise TooLarge("the factorial of a number over 100,000")


def _bits(node: _Expr) -> float:
    """An upper bound on log2 of a number without variables; 0 where there is nothing to bound."""
    if node.free_symbols or not node.args:
        return float(abs(int(node)).bit_length()) if node.is_Integer else 1.0
    sizes = [_bits(arg) for arg in node.args]
    if isinstance(node, sympy.Pow):
        return 2.0 ** min(sizes[1], 64) * max(sizes[0], 1.0) if sizes[1] > 1 else sizes[0]
    return sum(sizes) + len(sizes)


def formulas_equal(gold: str, answer: str) -> bool:
    """Whether two normalized formulas are equal; see the module's docstring. Raises what :func:`read` raises."""
    gold_constant, constant = (re.search(r"\+\s*([CcKk])\s*$", source) for source in (gold, answer))
    if gold_constant and constant:  # of integration, under any of its names
        answer = answer[: constant.start(1)] + gold_constant[1]
    left, right = read(gold), read(answer)
    if left == right:
        return True
    if (matrices := [_is_matrix(side) for side in (left, right)]) != [False, False]:
        return all(matrices) and _matrices_equal(left.doit(), right.doit())
    if not (isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr)):
        return bool(verify(left, right, timeout_seconds=None))
    if _infinite(left) or _infinite(right):
        return bool(left.doit() == right.doit())
    if equal(left, right) or _rounded(answer, left, right) or _rounded(gold, right, left):
        return True
    if (r"\log" in gold) != (r"\log" in answer) or r"\ln" in gold + answer:  # a bare log may be natural
        return r"\log" in gold + answer and equal(
            *(read(re.sub(r"\\log(?![_A-Za-z]|\s*_)", r"\\ln", s)) for s in (gold, answer))
        )
    return False


def _is_matrix(expr: _Expr) -> bool:
    return isinstance(expr, (sympy.MatrixBase, sympy.MatrixExpr))


def _matrices_equal(left: _Expr, right: _Expr) -> bool:
    if not (isinstance(left, sympy.MatrixBase) and isinstance(right, sympy.MatrixBase)):
        return bool(left == right)
    return left.shape == right.shape and all(equal(one, other) for one, other in zip(left, right, strict=True))


def _infinite(expr: sympy.Expr) -> bool:
    return not expr.free_symbols and _done(expr) in (sympy.oo, -sympy.oo, sympy.zoo)


def equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether two expressions are equal as functions of their variables."""
    difference = left - right
    if not difference.free_symbols:
        return _constants_equal(left, right)
    if _done(difference) == 0:
        return True
    verdict = _sampled(left, right)
    if verdict is None:
        verdict = sympy.simplify(difference) == 0 or bool(verify(left, right, float_rounding=15, timeout_seconds=None))
    return verdict


def _done(expr: sympy.Expr) -> sympy.Expr:
    """Evaluates, but for series: those are summed numerically, as sympy takes very long over their closed forms."""
    return expr if expr.has(sympy.Sum) else expr.doit()


def _constants_equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    left, right = _done(left), _done(right)
    if left.is_Rational and right.is_Rational:
        return bool(left == right)
    zero = _is_zero(left, right)
    if zero is None:
        zero = sympy.simplify(left - right) == 0
    return bool(zero)


def _is_zero(left: sympy.Expr, right: sympy.Expr) -> bool | None:
    """Whether the values agree to `DIGITS` digits; None where they cannot be evaluated."""
    a, b = sympy.N(left, DIGITS), sympy.N(right, DIGITS)
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return None
    if not (all(part.is_Float or part.is_Rational for value in (a, b) for part in value.as_real_imag())):
        return None
    return bool(abs(a - b) <= _TOLERANCE * max(abs(a), abs(b)))


def _rounded(source: str, value: sympy.Expr, exact: sympy.Expr) -> bool:
    """Whether `source` is a decimal, `exact` its value, and `value` a longer number that rounds to it."""
    found = re.fullmatch(r"-?\s*(\d*)\.(\d+)(?:\s*(?:\\cdot|\\times)\s*10\s*\^\s*\{?(-?\d+)\}?)?", source.strip())
    if not found or value.free_symbols or not exact.doit().is_Rational or value.doit().is_Integer:
        return False
    if len((found.group(1) + found.group(2)).lstrip("0")) < ROUNDED_DIGITS:
        return False
    ulp = sympy.Rational(10) ** (int(found.group(3) or 0) - len(found.group(2)))
    gap = sympy.N(abs(value - exact), DIGITS)
    printed = len((found.group(1) + found.group(2)).lstrip("0")) >= _PRINTED_DIGITS
    return bool(gap.is_Float and (gap <= ulp / 2 or (printed and gap <= abs(exact) * _PRINTED_ERROR)))


def _sampled(left: sympy.Expr, right: sympy.Expr) -> bool | None:
    """Compares at random points; None when too few points could be evaluated."""
    left, right = _done(left), _done(right)  # first, as limits and integrals bind variables
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    whole = jumps.integers((left, right))
    if _needs_integers(left) or _needs_integers(right):
        whole |= {symbol for symbol in symbols if symbol.name[0] in _INTEGERS}
    usable = 0
    for point in _points(symbols, whole, small=left.has(sympy.Sum) or right.has(sympy.Sum)):
        pair = _done(left.subs(point)), _done(right.subs(point))
        positive = all(value > 0 for value in point.values())
        if any(value.has(sympy.nan, sympy.zoo) or value in (sympy.oo, -sympy.oo) for value in pair):
            continue
        agree = _is_zero(*pair)
        if agree is None or (not positive and not all(sympy.N(value, 15).is_real for value in pair)):
            continue
        if not agree:
            return False
        usable += 1
    if usable < _POINTS // 2:
        return None
    return not any(
        _is_zero(_done(left.subs(at)), _done(right.subs(at))) is False for at in jumps.suspects(left, right, whole)
    )


def _needs_integers(expr: sympy.Expr) -> bool:
    discrete = expr.has(sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Mod)
    return discrete or any(power.base.is_negative for power in expr.atoms(sympy.Pow) if not power.exp.is_number)


def _points(
    symbols: list[sympy.Symbol], whole: set[sympy.Symbol], small: bool
) -> Iterable[dict[sympy.Symbol, sympy.Rational]]:
    generator = random.Random(0)  # the same points every time: a grade must not depend on the run
    for index in range(2 * _POINTS):
        signed = index >= _POINTS
        point = {}
        for symbol in symbols:
            integer = symbol in whole
            value = (
                generator.randint(2, 30)
                if integer
                else sympy.Rational(generator.randint(20, 400), 450 if small else 97)
            )
            point[symbol] = -value if signed and not integer and generator.random() < 0.6 else sympy.sympify(value)
        yield point
