"""Units that may follow a value: which are the same, and how one converts into another. Exact factors."""

from __future__ import annotations

import re
from fractions import Fraction

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
