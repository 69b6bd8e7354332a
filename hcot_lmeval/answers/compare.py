r"""Whether an answer says what the gold answer says, shape by shape. Runs in worker processes (it imports `algebra`).

The rules are those of a reader who knows the question asked for the gold answer: a label, unit or sign that only one
side writes is dropped; where both write one it must agree. Brackets mean something, the order of a list does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product

import sympy

from hcot_lmeval.answers import algebra, regions
from hcot_lmeval.answers.literals import literals_equal
from hcot_lmeval.answers.normalize import normalize, readings
from hcot_lmeval.answers.structure import ORDER, Node, has_variable, parse, split
from hcot_lmeval.answers.values import values_equal

_ARGUMENT = r"\((?:[A-Za-z]|\\[A-Za-z]+ ?|\d+)(?:,[A-Za-z])*\)"
_NAME = (
    rf"(?:[A-Za-z]|\\[A-Za-z]+ ?)(?:_(?:\w|\{{[^{{}}]*\}}))?'*(?:{_ARGUMENT})?"
    r"|\|?[A-Z]{1,4}(?:_\w)?\|?|\|[A-Za-z]\|"
)
_SEGMENT = r"(?:[A-Z]{1,4}|S_\{?[A-Z]+\}?|[A-Z]_\{?\w+\}?|S)"
_SINGLE_LABEL = re.compile(
    rf"(?:{_NAME}|\\angle ?[A-Z]+|\\(?:hat|bar|overline|vec)\{{?\\?\w+\}}?"
    rf"|\\frac\{{{_SEGMENT}\}}\{{{_SEGMENT}\}}|{_SEGMENT}[:/]{_SEGMENT})"
)


def _is_label(text: str) -> bool:
    """Whether `text` is a name, or a tuple of names."""
    if text.startswith("(") and text.endswith(")") and "," in text:
        return all(_SINGLE_LABEL.fullmatch(name) for name in split(text[1:-1], frozenset(","))[0])
    return _SINGLE_LABEL.fullmatch(text) is not None


_CALL = re.compile(r"([A-Za-z])\(([a-z])\)$")


def answers_equal(gold: str, answer: str) -> bool:
    """Compares two answers under every pair of their readings.

    Raises:
        algebra.Unparsed: a formula that had to be compared is not known to the grammar, and nothing else decided; its
            `side` says whether the gold answer can be read at all.
        algebra.TooLarge: a number is too large to evaluate.
    """
    gold, answer = normalize(gold), normalize(answer)
    if (verdict := literals_equal(gold, answer)) is not None:
        return verdict
    pairs = product(readings(gold, answer, is_gold=True), readings(answer, gold))
    try:
        return _some(equal, ((parse(left), parse(right)) for left, right in pairs))
    except algebra.Unparsed as error:
        error.side = "answer" if any(_readable(parse(reading)) for reading in readings(gold, answer)) else "gold"
        raise


def _readable(node: Node) -> bool:
    """Whether every formula in `node` is known to the grammar."""
    if node.kind == "leaf":
        try:
            algebra.read(node.source)
        except algebra.Unparsed:
            return False
    return all(_readable(item) for item in node.items)


def _some(compare: Callable[[Node, Node], bool], pairs: Iterable[tuple[Node, Node]]) -> bool:
    """Whether any pair is equal; an unparsed formula counts only if no other pair decides."""
    failure: algebra.Unparsed | None = None
    for left, right in pairs:
        try:
            if compare(left, right):
                return True
        except algebra.Unparsed as error:
            failure = error
    if failure:
        raise failure
    return False


def _every(compare: Callable[[Node, Node], bool], pairs: Iterable[tuple[Node, Node]]) -> bool:
    """Whether all pairs are equal; a difference decides even where another pair is unparsed."""
    failure: algebra.Unparsed | None = None
    for left, right in pairs:
        try:
            if not compare(left, right):
                return False
        except algebra.Unparsed as error:
            failure = error
    if failure:
        raise failure
    return True


_VERDICTS = frozenset({"yes", "no", "true", "false"})


def equal(gold: Node, answer: Node) -> bool:
    """Whether two parsed answers are equal; `gold` is the reference."""
    if bool(gold.modulus) != bool(answer.modulus):
        gold, answer = _remainder(gold), _remainder(answer)
    if gold.modulus and gold.modulus != answer.modulus:
        return False
    if not _conditions_agree(gold.condition, answer.condition):
        return False
    if _same(gold, answer):
        return True
    said = [node.text.strip(" .").lower() for node in (gold, answer)]
    if all(word in _VERDICTS for word in said):  # the letters of "No" are no product
        return said[0] == said[1]
    if gold.modulus:
        return _congruent(gold, answer)
    if (either := _relations(gold, answer)) is not None:
        return either
    gold, answer = _spread(gold, answer), _spread(answer, gold)
    answer = _renamed(answer, gold)
    if not _names_agree(gold, answer):
        return False
    if (named := _named_values(gold, answer)) is not None:
        return named
    return _parts(_unlabel(gold), _unlabel(answer))


def _same(gold: Node, answer: Node) -> bool:
    return (
        gold.kind == answer.kind and gold.text == answer.text and (gold.unit, gold.marks) == (answer.unit, answer.marks)
    )


def _remainder(node: Node) -> Node:
    r"""``5 \mod 3`` as the number that it is; anything else as it is."""
    if node.marks != ("mod",) or not node.modulus.isdigit():
        return node
    value = algebra.read(node.source).doit()
    if value.is_Integer and int(node.modulus):
        return parse(str(value % int(node.modulus)))
    return Node("leaf", node.text, rf"({node.source}) \mod {node.modulus}")


_HARMLESS = re.compile(r"\\neq|\\in\\mathbb|integer|real|constant")


def _conditions_agree(gold: str, answer: str) -> bool:
    if not answer or (not gold and _HARMLESS.search(answer) and not re.search(r"[<>]|\\[lg]eq", answer)):
        return True  # the reference does not say what is left out; where a formula has no value, nothing is
    return gold == answer or _bag(gold) == _bag(answer)


def _bag(condition: str) -> list[str]:
    return sorted(
        part for part in re.split(r",|\\and|\\or", re.sub(r"any(?:constant)?|constant|all|\s", "", condition)) if part
    )


def _congruent(gold: Node, answer: Node) -> bool:
    """Residues modulo the same number, in any order."""
    sides = []
    for node in (gold, answer):
        values = _last(node)
        items = values.items if values.kind in ("list", "set") else (values,)
        numbers = [algebra.read(item.source) for item in (_last(item) for item in items)]
        modulus = int(node.modulus) if node.modulus.isdigit() else 0
        if not modulus or not all(number.is_Integer for number in (n.doit() for n in numbers)):
            return False
        sides.append({int(number.doit()) % modulus for number in numbers})
    return sides[0] == sides[1]


def _last(node: Node) -> Node:
    return node.items[-1] if node.kind == "chain" else node


# -- relations ---------------------------------------------------------------------------------------------------------


def _relations(gold: Node, answer: Node) -> bool | None:
    """Compares equations and inequalities; None when labels and values are all there is."""
    if _is_equation(gold) or (_is_equation(answer) and _is_assignment(gold)):
        return _is_assignment(answer) and _equations_equal(gold, answer)  # an equation is not one of its sides
    if regions.is_region(gold) or regions.is_region(answer):
        return _regions_equal(gold, answer)
    return None


def _regions_equal(gold: Node, answer: Node) -> bool | None:
    chains = gold.kind == answer.kind == "chain" and set(gold.marks) | set(answer.marks) <= ORDER
    if chains and _chains_equal(gold, answer):
        return True
    inside = [
        _last(node) if node.kind == "chain" and set(node.marks) <= {"in", "="} else node for node in (gold, answer)
    ]
    if inside[0].kind == inside[1].kind and inside[0].kind in ("tuple", "union", "set", "builder") and _parts(*inside):
        return True
    verdict = regions.equal(gold, answer)
    if verdict is None:
        return _parts(_unlabel(gold), _unlabel(answer)) if not chains else False
    return verdict


def _chains_equal(gold: Node, answer: Node) -> bool:
    """``c < a < b`` is ``b > a > c``; ``2x < 6`` is ``x < 3``."""
    (left, ops), (right, other) = _oriented(gold), _oriented(answer)
    if ops == other and _every(_try, zip(left, right, strict=True)):
        return True
    if len(ops) != 1 or ops != other:
        return False
    ratio = _ratio([(side[0].source, side[1].source) for side in (left, right)])
    return ratio is not None and bool(ratio > 0)


def _oriented(chain: Node) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    if all(mark in (">", ">=") for mark in chain.marks):
        flipped = tuple(mark.replace(">", "<") for mark in reversed(chain.marks))
        return tuple(reversed(chain.items)), flipped
    return chain.items, chain.marks


def _try(gold: Node, answer: Node) -> bool:
    try:
        return _parts(gold, answer)
    except algebra.Unparsed:
        return False


def _is_equation(node: Node) -> bool:
    """``2x + y = 3``, unlike the labelled value ``x = 3`` or the sum ``9 + 24 = 33``."""
    if node.kind != "chain" or set(node.marks) != {"="} or len(node.items) != 2 or _is_label(node.items[0].text):
        return False
    return has_variable(node.items[0].text)


def _is_assignment(node: Node) -> bool:
    return node.kind == "chain" and node.marks == ("=",)


def _equations_equal(gold: Node, answer: Node) -> bool:
    ratio = _ratio([(node.items[0].source, node.items[1].source) for node in (gold, answer)])
    return ratio is not None


def _ratio(sides: list[tuple[str, str]]) -> sympy.Expr | None:
    """The constant c with gold.left - gold.right = c (answer.left - answer.right), or None."""
    first, second = (algebra.read(left) - algebra.read(right) for left, right in sides)
    quotient = sympy.cancel(sympy.together(first) / sympy.together(second)) if second != 0 else sympy.S.Zero
    quotient = quotient if not quotient.free_symbols else sympy.simplify(quotient)
    return quotient if not quotient.free_symbols and quotient != 0 and quotient.is_finite else None


# -- labels ------------------------------------------------------------------------------------------------------------


def _labels(node: Node) -> tuple[str, ...]:
    """What each value is called; words like "area" call it nothing that could differ."""
    items = node.items if node.kind == "list" else (node,)
    named = [item.kind == "chain" and item.marks[0] in ("=", "in") and item.items[0].kind != "text" for item in items]
    return tuple(item.items[0].text if name else "" for item, name in zip(items, named, strict=True))


def _renamed(answer: Node, gold: Node) -> Node:
    """``f(t) = t + 1`` in the gold answer's variable."""
    calls = [_CALL.search(_labels(node)[0]) for node in (gold, answer)]
    if not all(calls) or calls[0][2] == calls[1][2]:  # type: ignore[index]
        return answer
    old, new = (rf"(?<![A-Za-z\\]){calls[1][2]}(?![A-Za-z])", calls[0][2])  # type: ignore[index]
    return parse(re.sub(old, new, answer.source))


def _named_values(gold: Node, answer: Node) -> bool | None:
    """Compares values of which each has a name of its own, ``a = 1, b = 2``; None where that is not so.

    Names on both sides pair the values; names on one side order them. x_1 and x_2 are no names: roots have no order.
    """
    named = [_all_named(node) for node in (gold, answer)]
    if not named[0] and not (named[1] and gold.kind == "tuple"):
        return None  # names that the gold answer does not know tell nothing about its list
    values = [_unlabel(node) for node in (gold, answer)]
    if any(node.kind not in ("list", "tuple") for node in values) or len(values[0].items) != len(values[1].items):
        return None
    pairs = list(zip(values[0].items, values[1].items, strict=True))
    if all(named) and set(_labels(gold)) == set(_labels(answer)):
        order = [_labels(answer).index(label) for label in _labels(gold)]
        pairs = [(item, values[1].items[at]) for item, at in zip(values[0].items, order, strict=True)]
    elif not named[0]:  # a point, by coordinates: as written, or x before y
        order = sorted(range(len(pairs)), key=lambda at: _labels(answer)[at])
        pairs = [(item, values[1].items[at]) for item, at in zip(values[0].items, order, strict=True)]
    return _every(_parts, pairs)


def _names_agree(gold: Node, answer: Node) -> bool:
    """Whether values that both sides name have a name in common, where a name may lack an index."""
    one, other = ({_name(label) for label in _labels(node) if re.search("[A-Za-z]", label)} for node in (gold, answer))
    if not one or not other:
        return True
    if gold.kind == answer.kind == "list" and _all_named(gold) and _all_named(answer) and len(one) == len(other):
        return all(any(_same_name(a, b) for b in other) for a in one)
    stems = gold.kind == answer.kind == "list"  # x_1 = 2, x_2 = 3: roots have no order
    return any(_same_name(a, b, stems) for a in one for b in other)


def _name(label: str) -> str:
    """The name without what is around it; f(x) and S(n) are names with an index, as S_n is."""
    label = re.sub(r"^([A-Za-z]'*)\(([^()]+)\)$", r"\1_\2", label)
    label = re.sub(r"\\(?:angle|overline|vec|hat|bar|left|right)(?![A-Za-z])|[(){}|\s]", "", label)
    return "".join(sorted(label)) if re.fullmatch("[A-Z]{2}", label) else label


def _same_name(one: str, other: str, stems: bool = False) -> bool:
    (stem, _, index), (other_stem, _, other_index) = one.partition("_"), other.partition("_")
    if stem == other_stem:
        return stems or index == other_index or not (index and other_index)
    function = other if one == "y" else one if other == "y" else ""
    return bool(re.fullmatch(r"[A-Za-z]'*_[a-z]", function))  # y is f(x)


def _spread(node: Node, other: Node) -> Node:
    """``(x, y) = (1, 2)`` as the list ``x = 1, y = 2``, where the other side names its values like that."""
    if not (_is_assignment(node) and other.kind == "list" and _all_named(other)):
        return node
    names, values = node.items
    if names.kind != "tuple" or values.kind != "tuple" or len(names.items) != len(values.items):
        return node
    pairs = zip(names.items, values.items, strict=True)
    return Node("list", node.text, node.source, tuple(Node("chain", "", "", pair, ("=",)) for pair in pairs), (",",))


def _all_named(node: Node) -> bool:
    stems = [label.split("_")[0] for label in _labels(node)]
    return len(stems) > 1 and all(stems) and len(set(stems)) == len(stems)


def _unlabel(node: Node) -> Node:
    r"""``x = 3`` to 3, ``n = 1, 2, 3`` to the list; ``x = 5 + 6 = 11`` to 11; ``1/3 \approx 0.33`` to 1/3."""
    if node.kind == "list":
        return replace(node, items=tuple(item if item.kind == "list" else _unlabel(item) for item in node.items))
    if node.kind != "chain":
        return node
    items, marks = list(node.items), list(node.marks)
    if "=>" in marks:
        cut = len(marks) - marks[::-1].index("=>")
        return _unlabel(_chain(items[cut:], marks[cut:], node))
    if "~" in marks:
        cut = marks.index("~")
        keep = items[: cut + 1]
        if cut == 0 and not _is_label(keep[0].text) and not _approximates(*items[cut : cut + 2]):
            return node
        if len(keep) > 1 or not _is_label(keep[0].text):
            return _unlabel(_chain(keep, marks[:cut], node))
        return items[-1]
    named = marks == ["=="] and _is_label(items[0].text)  # x \equiv 7
    return items[-1] if named or set(marks) <= {"=", "in"} else node


def _approximates(value: Node, shown: Node) -> bool:
    r"""Whether ``value \approx shown`` is a rounding, unlike the range ``41 \sim 60``; True for what is no decimal."""
    found = re.fullmatch(r"-?(\d+)(?:\.(\d+))?", shown.text)
    if value.kind != "leaf" or not found:
        return True
    exact = algebra.read(value.source)
    if exact.free_symbols:
        return True
    zeros = len(found[1]) - len(found[1].rstrip("0"))
    place = sympy.Rational(10) ** -len(found[2]) if found[2] else sympy.Rational(10) ** zeros / 2
    gap = sympy.N(abs(exact - algebra.read(shown.source)), 15)
    return bool(gap.is_Float or gap.is_Rational) and bool(gap <= place) and bool(4 * gap <= abs(exact))


def _chain(items: list[Node], marks: list[str], node: Node) -> Node:
    return replace(node, items=tuple(items), marks=tuple(marks)) if marks else items[0]


# -- parts -------------------------------------------------------------------------------------------------------------


def _parts(gold: Node, answer: Node) -> bool:
    if _same(gold, answer):
        return True
    kinds = {gold.kind, answer.kind}
    if "text" in kinds:
        return _texts_equal(gold, answer)
    if gold.kind == answer.kind == "tuple":
        return _tuples_equal(gold, answer)
    if "matrix" in kinds:
        return _matrices_equal(gold, answer)
    if kinds & {"list", "set"}:
        return _collections_equal(gold, answer)
    if kinds == {"leaf"}:
        return values_equal(gold, answer)
    if kinds == {"chain"}:
        return gold.marks == answer.marks and _every(_parts, zip(gold.items, answer.items, strict=True))
    return False


_NEGATIONS = frozenset(
    ("no solution", "no solutions", "no real solution", "no real solutions", "none", "does not exist", "dne")
) | {r"\emptyset", "{}"}


def _texts_equal(gold: Node, answer: Node) -> bool:
    if any("choice" in node.marks and node.items for node in (gold, answer)):
        return _choices_equal(gold, answer)
    if gold.text in _NEGATIONS and answer.text in _NEGATIONS:
        return True
    words = [re.sub(r"[\s*]", "", node.text) for node in (gold, answer)]
    choice = "choice" in gold.marks + answer.marks
    if len(words[0]) == 1 and not choice:
        return words[0] == words[1]
    if choice and len(words[0]) == 1 and answer.kind == "list" and answer.items:
        return False
    return words[0].lower() == words[1].lower()


def _choices_equal(gold: Node, answer: Node) -> bool:
    """A choice with its text is the choice, and is the text; where both sides write both, both agree."""
    texts = [node.items[0] if "choice" in node.marks and node.items else None for node in (gold, answer)]
    letters = [node.text.strip("()").split(":")[0].upper() for node in (gold, answer)]
    if texts[0] and texts[1]:
        return letters[0] == letters[1] and equal(texts[0], texts[1])
    if letters[0] == letters[1]:
        return True
    if "choice" in gold.marks and "choice" in answer.marks:
        return False
    return equal(texts[0] or gold, texts[1] or answer)


def _tuples_equal(gold: Node, answer: Node) -> bool:
    if len(gold.items) != len(answer.items):
        return False
    if len(gold.items) == 2 and gold.marks != answer.marks:
        return False  # an open end is not a closed one, a point not a closed interval
    return _every(equal, zip(gold.items, answer.items, strict=True))


def _matrices_equal(gold: Node, answer: Node) -> bool:
    """Entry by entry; a column is also the tuple of its entries."""
    if gold.kind == answer.kind:
        return gold.marks == answer.marks and _every(_parts, zip(gold.items, answer.items, strict=True))
    matrix, other = (gold, answer) if gold.kind == "matrix" else (answer, gold)
    if other.kind == "tuple" and len(other.items) == len(matrix.items):
        vector = matrix.marks[0] == "1" or set(matrix.marks[1].split("x")) == {"1"}
        return vector and _every(_parts, zip(gold.items, answer.items, strict=True))
    return algebra.formulas_equal(gold.source, answer.source) if other.kind == "leaf" else False


def _collections_equal(gold: Node, answer: Node) -> bool:
    """Lists and sets in any order; against a tuple, or values that carry names on one side only, in order."""
    if "tuple" in (gold.kind, answer.kind):
        if "set" in (gold.kind, answer.kind):
            return False
        one, other = gold.items, answer.items
        return len(one) == len(other) and _every(_parts, zip(one, other, strict=True))
    one = gold.items if gold.kind in ("list", "set") else (gold,)
    other = answer.items if answer.kind in ("list", "set") else (answer,)
    found = _every(lambda item, _: _some(_members, ((item, value) for value in other)), ((item, item) for item in one))
    return found and _every(lambda value, _: _some(_members, ((item, value) for item in one)), ((v, v) for v in other))


def _members(gold: Node, answer: Node) -> bool:
    return equal(gold, answer) if "list" in (gold.kind, answer.kind) else _parts(gold, answer)
