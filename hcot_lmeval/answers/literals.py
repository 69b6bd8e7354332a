"""Answers that are literal numbers: what can be decided without algebra, in the process that asks."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

ROUNDED_DIGITS = (
    6  # significant digits of a decimal that may stand for a longer number; as many as math-verify asks for
)
_LABEL = re.compile(r"([A-Za-z])\s*=\s*")  # a gold answer x = 3 asks for 3; a + b = 3 may be a line
_SUM = re.compile(r"([A-Za-z]\w?(?:\s*[+*]\s*[A-Za-z]\w?)*)\s*=\s*")
_NUMBER = re.compile(
    r"([-+]?)\s*(?:(\d+)(?:\.(\d+))?(?:(?:[eE]|\s*\\cdot\s*10\s*\^)\s*\{?([-+]?\d{1,3})\}?)?"
    r"|\\frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+))"
)


class Literal(NamedTuple):
    """The value of a literal number, and the size of its last decimal place (0: not written as a decimal)."""

    value: Fraction
    place: Fraction


def literals_equal(gold: str, answer: str) -> bool | None:
    """Compares two normalized answers that are the same text, or literal numbers with labels; None for all others."""
    if not answer:
        return False
    if gold == answer:
        return True
    labels = _LABEL.match(gold), _SUM.match(answer)
    if all(labels) and labels[0][1] != labels[1][1]:  # type: ignore[index]
        return None  # two names: whether they are names of one thing is not a question about numbers
    one, other = (
        literal(text[label.end() :] if label else text) for text, label in zip((gold, answer), labels, strict=True)
    )
    if one is None or other is None:
        return None
    return one.value == other.value or _rounds(one, other.value) or _rounds(other, one.value)


def literal(text: str) -> Literal | None:
    r"""Reads ``033``, ``-1.50``, ``2e-4``, ``2\cdot 10^{-4}``, ``3/4``, ``45^{\circ}``; None for all others."""
    text = re.sub(r"\s*\^\{\\circ\}$", "", text)
    text = re.sub(r"^-?[1-9]\d{0,2}(?:,\d{3})+$", lambda match: match.group().replace(",", ""), text)
    found = _NUMBER.fullmatch(text.strip("{} ") if "^" not in text else text.strip())
    if not found:
        return None
    sign, whole, decimals, exponent, *ratio = found.groups()
    if whole is not None:
        place = Fraction(10) ** (int(exponent or 0) - len(decimals or ""))
        value = int(whole + (decimals or "")) * place
    else:
        place = Fraction(0)
        top, bottom = (int(part) for part in ratio if part is not None)
        if bottom == 0:
            return None
        value = Fraction(top, bottom)
    return Literal(-value if sign == "-" else value, place if decimals else Fraction(0))


def _rounds(decimal: Literal, value: Fraction) -> bool:
    """Whether `value`, which no decimal spells out, is `decimal` when rounded to its places."""
    bottom = value.denominator
    for prime in (2, 5):
        while bottom % prime == 0:
            bottom //= prime
    if not decimal.place or bottom == 1 or abs(decimal.value) < 10 ** (ROUNDED_DIGITS - 1) * decimal.place:
        return False
    return abs(decimal.value - value) <= decimal.place / 2
