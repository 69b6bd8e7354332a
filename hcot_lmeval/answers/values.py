r"""Whether two single values are equal: formulas with what may be attached to them, a unit, a numeral base, a ratio."""

from __future__ import annotations

import re
from fractions import Fraction

from hcot_lmeval.answers import algebra
from hcot_lmeval.answers.structure import Node, compact, split


def values_equal(gold: Node, answer: Node) -> bool:
    """Whether two leaves have the same value, in whatever unit, base or form of a ratio they are written."""
    if not (_bases_agree(gold.source, answer.source)):
        return False
    if {gold.unit, answer.unit} == {"am", "pm"}:
        return False
    if ":" in gold.source + answer.source:
        return _ratios_equal(gold.source, answer.source)
    factor = _unit_factor(gold, answer)
    if factor is None:
        return False
    if any(_scaled_equal(gold.source, answer.source, scale) for scale in factor):
        return True
    one, other = _unit_as_factor(gold, answer), _unit_as_factor(answer, gold)
    return (one, other) != (gold.source, answer.source) and algebra.formulas_equal(one, other)


def _unit_as_factor(node: Node, other: Node) -> str:
    r"""The source of ``\frac{5}{3} m``, with m a variable if the other side's formula holds it."""
    variable = (
        re.fullmatch("[a-z]", node.unit) and not other.unit and node.unit in re.sub(r"\\[A-Za-z]+", "", other.text)
    )
    return rf"({node.source})\cdot {node.unit}" if variable else node.source


def _scaled_equal(gold: str, answer: str, scale: str) -> bool:
    return algebra.formulas_equal(gold, answer if scale == "1" else f"({answer})\\cdot({scale})")


def _unit_factor(gold: Node, answer: Node) -> tuple[str, ...] | None:
    """What brings the answer's number to the gold's unit: alternatives; None when the units exclude each other."""
    if gold.unit == answer.unit:
        return ("1",)
    if "%" in (gold.unit, answer.unit) and not (gold.unit and answer.unit):
        asked = re.fullmatch(
            r"-?[1-9]\d*(?:\.\d+)?", gold.source.strip()
        )  # 28 may mean 28%, but 0.28 does not mean 0.28%
        return (("1",) if asked else ()) + (r"\frac{1}{100}",) if answer.unit else ("1", "100")
    if gold.unit == "deg" and not answer.unit:
        return ("1", r"\frac{180}{\pi}")
    if answer.unit == "deg" and not gold.unit:
        return ("1", r"\frac{\pi}{180}")
    if not gold.unit or not answer.unit:
        return ("1",)
    scale = conversion(gold.unit, answer.unit)
    return None if scale is None else (f"\\frac{{{scale.numerator}}}{{{scale.denominator}}}",)


_BASED = re.compile(r"\(?(\w+)\)?_(?:\{(\d+)\}|(\d+)|\{\\text\{\w+\}\})$")


def _bases_agree(gold: str, answer: str) -> bool:
    """Numerals with a base: the same digits, and the same base where both name one."""
    one, other = _BASED.match(compact(gold)), _BASED.match(compact(answer))
    if not (one and one.group(1)[0].isdigit()) and not (other and other.group(1)[0].isdigit()):
        return True
    digits = [match.group(1) if match else compact(source) for match, source in ((one, gold), (other, answer))]
    bases = [(match.group(2) or match.group(3)) if match else None for match in (one, other)]
    return digits[0] == digits[1] and (None in bases or bases[0] == bases[1])


def _ratios_equal(gold: str, answer: str) -> bool:
    """``7:32`` is ``14:64`` and 7/32; ``12:00`` is a time and only itself."""
    if (
        re.search(r":0\d|:[0-5]\d$", gold)
        and re.fullmatch(r"[\d:\s]+", gold)
        and len(split(gold, frozenset(":"))[0][-1].strip()) == 2
    ):
        if compact(gold).lstrip("0") == compact(answer).lstrip("0"):
            return True
        if re.search(r":00$", gold):
            return False
    one, other = (split(source, frozenset(":"))[0] for source in (gold, answer))
    if len(one) == len(other) > 2:
        return all(
            algebra.formulas_equal(f"({a})\\cdot({other[0]})", f"({b})\\cdot({one[0]})")
            for a, b in zip(one, other, strict=True)
        )
    if max(len(one), len(other)) > 2:
        return False
    sides = [f"\\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 else parts[0] for parts in (one, other)]
    return algebra.formulas_equal(*sides)


# -- units: which are the same, and how one converts into another; exact factors ---------------------------------------

# name -> (dimension, size in the dimension's base unit). International definitions: the inch is 2.54 cm, the pound
# 0.45359237 kg, the US gallon 231 cubic inches.
_INCH, _POUND = Fraction(254, 10_000), Fraction(45_359_237, 100_000_000)
_UNITS: dict[str, tuple[str, Fraction]] = {
    "m": ("length", Fraction(1)), "cm": ("length", Fraction(1, 100)), "mm": ("length", Fraction(1, 1000)),
    "dm": ("length", Fraction(1, 10)), "km": ("length", Fraction(1000)), "in": ("length", _INCH),
    "ft": ("length", 12 * _INCH), "yd": ("length", 36 * _INCH), "mi": ("length", 63_360 * _INCH),
    "g": ("mass", Fraction(1, 1000)), "kg": ("mass", Fraction(1)), "mg": ("mass", Fraction(1, 10**6)),
    "lb": ("mass", _POUND), "oz": ("mass", _POUND / 16),
    "s": ("time", Fraction(1)), "min": ("time", Fraction(60)), "h": ("time", Fraction(3600)),
    "day": ("time", Fraction(86_400)), "week": ("time", Fraction(604_800)),
    "cent": ("money", Fraction(1, 100)), "dollar": ("money", Fraction(1)),
    "l": ("volume", Fraction(1)), "ml": ("volume", Fraction(1, 1000)), "deg": ("angle", Fraction(1)),
    "%": ("share", Fraction(1)),
}  # fmt: skip
_LONG = {
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm",
    "kilometer": "km", "kilometre": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "second": "s", "sec": "s",
    "minute": "min", "hour": "h", "hr": "h", "liter": "l", "litre": "l",
}  # fmt: skip
_SQUARED = re.compile(r"^(square|sq|cubic|cu) ?(.*)")


def conversion(gold: str, answer: str) -> Fraction | None:
    """Returns how many `gold` units one `answer` unit is: 1 for unknown words, None if the dimensions differ."""
    one, other = _size(gold), _size(answer)
    if one is None or other is None:
        return Fraction(1)
    return other[1] / one[1] if one[0] == other[0] else None


_Size = tuple[tuple[tuple[str, int], ...], Fraction]  # dimensions with their powers, and the factor


def _size(unit: str) -> _Size | None:
    factor = Fraction(1)
    dimensions: dict[str, int] = {}
    for index, side in enumerate(re.split(r"/| per ", "mi/h" if unit == "mph" else unit)):
        whole = _single(side.strip())
        parts = [whole] if whole else [_single(part) for part in side.split()]
        for part in parts:
            if part is None:
                return None
            dimension, power, size = part
            sign = 1 if index == 0 else -1
            factor *= size**sign
            dimensions[dimension] = dimensions.get(dimension, 0) + power * sign
    return tuple(sorted(item for item in dimensions.items() if item[1])), factor


def _single(unit: str) -> tuple[str, int, Fraction] | None:
    found = re.fullmatch(r"(.*?)(-?\d?)", unit)
    name, power = found.group(1).strip(), int(found.group(2).strip("-") or 1) * (-1 if "-" in found.group(2) else 1)  # type: ignore[union-attr]
    if worded := _SQUARED.match(name):
        name, power = worded.group(2), 2 if worded.group(1).startswith("sq") else 3
    name = name if name in _UNITS else name.removesuffix("s")
    known = _UNITS.get(_LONG.get(name, name))
    return None if known is None else (known[0], power, known[1] ** power)
