r"""The shape of an answer: lists, tuples, sets, chains of relations, matrices, units; formulas are the leaves.

``parse`` reads the output of :func:`hcot_lmeval.answers.normalize.normalize`. It knows brackets and separators, no
algebra.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["leaf", "text", "list", "tuple", "set", "union", "chain", "matrix", "builder"]

_OPEN, _CLOSE = (
    ("(", "[", "{", r"\{", r"\lfloor", r"\lceil", r"\begin"),
    (")", "]", "}", r"\}", r"\rfloor", r"\rceil", r"\end"),
)
_TOKEN = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\[A-Za-z]+|\\.|.", re.DOTALL)
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", r"\in": "in", r"\equiv": "==",
    r"\approx": "~", r"\implies": "=>", r"\to": "->", r"\subset": "sub", r"\subseteq": "sub", r"\notin": "notin",
}  # fmt: skip
ORDER = frozenset({"<", ">", "<=", ">="})


@dataclass(frozen=True)
class Node:
    r"""One part of an answer.

    Attributes:
        kind: what it is; "text" is words, "leaf" a formula.
        text: its canonical source without spaces (words of a text are lower case and joined by one space).
        source: the source as LaTeX, for a leaf.
        items: the parts: of a list, tuple, set, union, chain; the cells of a matrix, row by row.
        marks: relations of a chain; brackets of a tuple; separators of a list; (rows, columns) of a matrix.
        unit: a unit or other words that followed a value ("cm^2"), without spaces; "%" and "deg" for those signs.
        modulus: ``\pmod{..}`` of a congruence; with the mark "mod", of the operator in ``5 \mod 3``.
        condition: "where .." or "for .." that followed, canonical.
    """

    kind: Kind
    text: str
    source: str = ""
    items: tuple[Node, ...] = ()
    marks: tuple[str, ...] = ()
    unit: str = ""
    modulus: str = ""
    condition: str = field(default="")


def parse(source: str) -> Node:
    """Parses a normalized answer. Every string has a parse: what has no shape is a leaf."""
    source = _strip_braces(source.strip())
    source, condition = _condition(source)
    node = _parse(source)
    return replace(node, condition=condition) if condition else node


def _parse(source: str) -> Node:
    source = _strip_braces(source.strip())
    for step in (
        _as_modular,
        _as_list,
        _as_chain,
        _as_union,
        _as_matrix,
        _as_text,
        _as_bracketed,
        _as_signs,
        _as_quantity,
    ):
        node = step(source)
        if node is not None:
            return node
    return Node("leaf", compact(source), source)


def compact(source: str) -> str:
    """`source` without spaces, and without braces around single characters of an exponent or index."""
    source = re.sub(r"\\cdot(?![A-Za-z])", "*", source)
    source = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1 ", source)
    source = re.sub(r"(?<=\d)\s+(?=\d)", "\0", source)
    source = re.sub(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])", "", source).replace("\0", " ")
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", source)


def split(source: str, separators: frozenset[str] | dict[str, str]) -> tuple[list[str], list[str]]:
    """Cuts `source` at top-level separators; returns the parts and the separators between them."""
    parts, marks, start, depth, bars = [], [], 0, 0, False
    for match in _TOKEN.finditer(source):
        token = match.group()
        head = token.split("{")[0] if token.startswith((r"\begin", r"\end")) else token
        if head in _OPEN:
            depth += 1
        elif head in _CLOSE:
            depth -= 1
        elif token == "|":
            bars = not bars
        elif token in separators and depth <= 0 and not (bars and token == ","):
            parts.append(source[start : match.start()])
            marks.append(token)
            start = match.end()
    return [*parts, source[start:]], marks


def _strip_braces(source: str) -> str:
    while source.startswith("{") and _closes_at_end(source) and len(split(source[1:-1], frozenset(",;"))[0]) == 1:
        source = source[1:-1].strip()
    return source


def _closes_at_end(source: str) -> bool:
    depth = 0
    for match in _TOKEN.finditer(source):
        head = match.group().split("{")[0] if match.group().startswith((r"\begin", r"\end")) else match.group()
        depth += (head in _OPEN) - (head in _CLOSE)
        if depth == 0:
            return match.end() == len(source)
    return False


_WORD = r"(?:where|for|with|if|when|such that)"
_WHERE = re.compile(rf"\\text\s*\{{[\s,]*+{_WORD}\b([^{{}}]*)\}}|(?<![A-Za-z\\]){_WORD}(?![A-Za-z])")


_RESTRICTS = re.compile(r"\\(?:leq|geq|neq|in)(?![A-Za-z])|[<>]")


def _condition(source: str) -> tuple[str, str]:
    found = _WHERE.search(source)
    if found and source[: found.start()].strip(" ,"):
        condition = (found.group(1) or "") + source[found.end() :]
        return source[: found.start()].strip(" ,"), compact(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", condition)).lower()
    parts, _ = split(source, frozenset({","}))
    kept = len(parts)
    while kept and r"\neq" in parts[kept - 1]:
        kept -= 1
    value = ",".join(parts[:kept]).strip(" ,")
    if kept < len(parts) and value and not _RESTRICTS.search(value):
        return value, compact(",".join(parts[kept:]))
    trailing = re.search(r"\(([^()]*)\)$", source)
    if trailing and source[: trailing.start()].strip() and _RESTRICTS.search(trailing.group(1)):
        return source[: trailing.start()].strip(), compact(trailing.group(1))
    return source, ""


def _as_list(source: str) -> Node | None:
    for separators in ({";"}, {r"\or"}, {",", r"\and"}, {r"\and"}):
        parts, marks = split(source, frozenset(separators))
        parts = [part for part in parts if part.strip()]
        if len(parts) > 1:
            items = tuple(_parse(part) for part in parts)
            items = items if ";" in marks else _grouped(_flat(items))
            return Node("list", ",".join(item.text for item in items), source, items, tuple(marks))
    return None


def _flat(items: tuple[Node, ...]) -> tuple[Node, ...]:
    r"""A list among the items, such as ``\pm 2``, contributes its own."""
    return tuple(piece for item in items for piece in (item.items if item.kind == "list" else (item,)))


def _grouped(items: tuple[Node, ...]) -> tuple[Node, ...]:
    """``p = 3, q = 2, p = 5, q = 2`` are two solutions of two values: names that come again begin a new one."""
    names = [item.items[0].text if item.kind == "chain" and item.marks == ("=",) else "" for item in items]
    width = names.index(names[0], 1) if names[0] in names[1:] else 0
    if width < 2 or not all(names) or names != names[:width] * (len(names) // width):
        return items
    groups = [items[at : at + width] for at in range(0, len(items), width)]
    return tuple(Node("list", ",".join(item.text for item in group), "", group, (",",)) for group in groups)


def has_variable(text: str) -> bool:
    """Whether a letter in `text` stands alone, or x, y, z stand together."""
    return (
        re.search(r"(?<![A-Za-z\\])[a-zA-Z](?![A-Za-z])|(?<!\\)\b[xyz]{2,3}\b", re.sub(r"\\[A-Za-z]+", " ", text))
        is not None
    )


def _as_modular(source: str) -> Node | None:
    found = re.search(
        r"(?<![({\s])[({\s]*+\\(?:pmod|mod|bmod)\s*(?:\{([^{}]*)\}|(\w+))\s*\)?$|\(mod\s*(\w+)\)$", source
    )
    if not found or not source[: found.start()].strip() or "mod" in source[: found.start()]:
        return None
    modulus = found[1] or found[2] or found[3] or ""
    node = replace(_parse(source[: found.start()]), modulus=compact(modulus))
    operator = node.kind == "leaf" and r"\mod" in found.group()
    return replace(node, marks=("mod",)) if operator else node


def _as_chain(source: str) -> Node | None:
    parts, marks = split(source, _RELATIONS)
    if not marks:
        return None
    if marks == ["="] and parts[0].strip() and has_variable(parts[1]) and not has_variable(parts[0]):
        parts = [parts[1], parts[0]]  # 3 = x
    items = tuple(_parse(part) if part.strip() else Node("leaf", "", "") for part in parts)
    relations = tuple(_RELATIONS[mark] for mark in marks)
    text = items[0].text + "".join(mark + item.text for mark, item in zip(relations, items[1:], strict=True))
    return Node("chain", text, source, items, relations)


def _as_union(source: str) -> Node | None:
    parts, marks = split(source, frozenset({r"\cup"}))
    if not marks:
        return None
    items = tuple(_parse(part) for part in parts)
    return Node("union", r"\cup".join(sorted(item.text for item in items)), source, items)


def _as_matrix(source: str) -> Node | None:
    if cases := re.fullmatch(r"\\begin\{(cases|aligned)\}(.*)\\end\{\1\}", source, re.DOTALL):
        return _as_list(re.sub(r"\\\\|&", lambda row: " ; " if row.group() != "&" else " ", cases.group(2)).strip(" ;"))
    inner = source[1:-1].strip() if re.match(r"[\[(]", source) and _closes_at_end(source) else source
    found = re.fullmatch(
        r"\\begin\{([pbBvV]?matrix|smallmatrix|array)\}(?:\s*\{[clr|\s]*\})?(.*)\\end\{\1\}", inner, re.DOTALL
    )
    if not found or r"\begin" in found.group(2):
        return None
    rows = [
        row.split("&")
        for row in re.split(r"\\\\(?:\[[^\[\]]*\])?", re.sub(r"\\hline", "", found.group(2)))
        if row.strip()
    ]
    items = tuple(_parse(cell) for row in rows for cell in row)
    shape = (str(len(rows)), "x".join(str(len(row)) for row in rows))
    determinant = ("det",) if "v" in found.group(1) else ()
    return Node("matrix", f"{shape}" + ",".join(item.text for item in items), source, items, shape + determinant)


def _as_text(source: str) -> Node | None:
    r"""Words: everything is in ``\text``, or it is a plain word, or a choice like (B)."""
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", source)
    choice = re.fullmatch(r"\(?\s*([A-Za-z])\s*\)|\(?\s*([A-J])\s*[).]\s(.*\S.*)", bare.strip(), re.DOTALL)
    if choice:
        rest = source[source.index(choice.group(2)) :].lstrip(str(choice.group(2)) + ").} ") if choice.group(2) else ""
        items = (_parse(_closed(rest)),) if rest else ()
        text = choice.group(1) or ":".join([choice.group(2), *(item.text for item in items)])
        return Node("text", text, source, items, ("choice",))
    if not re.fullmatch(r"[^\W\d_][^\\^_{}=<>+*/\d]*", bare.strip()):
        return None
    words = re.sub(r"[^\w\s]", " ", bare).split()
    if not any(len(word) > 1 for word in words) and r"\text" not in source:
        return None
    if r"\text" not in source and not (len(words) > 1 and any(len(word) > 2 for word in words)) and len(words[0]) < 3:
        return None
    kept = [word for word in words if word.lower() not in ("the", "a", "an")] or words
    if len(kept) == 2 and kept[0].lower() in ("option", "choice", "answer") and len(kept[1]) == 1:
        kept = kept[1:]
    words_text = " ".join(kept).lower() if len("".join(kept)) > 1 else kept[0]
    return Node("text", words_text, source)


def _closed(rest: str) -> str:
    r"""What follows the letter of a choice, ``Ellipse}`` with the ``\text{`` that it was in."""
    return rf"\text{{{rest}" if rest.count("}") > rest.count("{") else rest


def _as_bracketed(source: str) -> Node | None:
    opening = next((mark for mark in (r"\{", "{", "(", "[") if source.startswith(mark)), None)
    if opening is None or not _ends_with_its_bracket(source, opening):
        return None
    closing = r"\}" if source.endswith(r"\}") else source[-1]
    inner = source[len(opening) : -len(closing)].strip()
    if opening in (r"\{", "{"):
        return _as_set(inner, source)
    _, marks = split(inner, frozenset(",;"))
    if not marks:
        return None if (opening, closing) != ("(", ")") else _parse(inner)
    separators = frozenset(";") if ";" in marks else frozenset(",")
    items = tuple(_parse(part) for part in split(inner, separators)[0] if part.strip())
    return Node("tuple", opening + ",".join(item.text for item in items) + closing, source, items, (opening, closing))


def _ends_with_its_bracket(source: str, opening: str) -> bool:
    """Half-open intervals pair ( with ]: any bracket closes any."""
    return _closes_at_end(source) and source.endswith(
        (r"\}",) if opening == r"\{" else ("}",) if opening == "{" else (")", "]")
    )


def _as_set(inner: str, source: str) -> Node:
    if len(split(inner, frozenset({":", "|"}))[0]) == 2:
        return Node("builder", compact(source).replace(":", "|"), source)
    items = _flat(tuple(_parse(part) for part in split(inner, frozenset({",", ";", r"\and"}))[0] if part.strip()))
    return Node("set", "{" + ",".join(item.text for item in items) + "}", source, items)


def _as_signs(source: str) -> Node | None:
    r"""``a \pm b`` is the list of both; ``\mp`` takes the other sign."""
    bare = source
    if not re.search(r"\\pm(?![A-Za-z])", bare):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", bare))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", bare))
    items = (_parse(re.sub(r"^\s*\+", "", upper)), _parse(lower))
    return Node("list", ",".join(item.text for item in items), source, items, ("\\pm",))


_NAME = (
    r"(?:(?:square|cubic|sq|cu)\.?\s*)?(?:cm|mm|km|dm|m|kg|g|mg|lb|oz|ft|in|yd|mi|mph|s|hr|h|min|ml|l|"
    r"units?|meters?|metres?|centimeters?|centimetres?|kilometers?|inch(?:es)?|foot|feet|yards?|miles?|hours?|minutes?|"
    r"seconds?|days?|weeks?|months?|years?|dollars?|cents?|degrees?|percent(?:age)?|pct|pounds?|ounces?|grams?|liters?|"
    r"litres?|people|students|ways|points?|coins?|apples?|books?|[ap]\.?m|[AP]M)\.?"
)
_POWER = r"\s*\^\s*(?:\{\s*-?\d\s*\}|\d)"
_PLAIN_UNIT = re.compile(
    rf"(?<=[\d}})])\s*{_NAME}(?:{_POWER})?(?:\s*(?:/|\\cdot(?![A-Za-z]))\s*{_NAME}(?:{_POWER})?)*$"
)
_WORDS = r"\\text\s*\{(?:[^{}]|\^\{[^{}]*\})*\}"
_PIECE = re.compile(rf"{_WORDS}|{_POWER}|/|\\cdot(?![A-Za-z])|\s+|(?<=[/ ])[A-Za-z]{{1,3}}(?![A-Za-z(])")
_SIGNS = {"%": re.compile(r"\s*\\%$|(?<=[\d}])\s*%$"), "deg": re.compile(r"\s*\^\{\\circ\}\s*[CF]?$")}
_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_SAME_UNIT = {"percent": "%", "percentage": "%", "pct": "%", "degree": "deg", "degrees": "deg"}


def _as_quantity(source: str) -> Node | None:
    r"""A value and what it is measured in: ``5\text{ cm}^2``, ``90^{\circ}``, ``20\%``, ``20 percent``, ``3 m/s``."""
    for unit, pattern in _SIGNS.items():
        if found := pattern.search(source):
            value = source[: found.start()]
            last = split(value, frozenset("+-"))[0][-1]
            doubled = pattern.search(value) or (unit == "deg" and _ANGLE.search(last))  # \cos 60^\circ has no unit
            return replace(_parse(value), unit=unit) if _balanced(value) and not doubled else None
    start = _words_at_end(source)
    if start is None:
        plain = _PLAIN_UNIT.search(source)
        start = plain.start() if plain else None
    if start is None or not source[:start].strip(" ~") or not _balanced(source[:start]):
        return None
    words = re.sub(r"\\text\s*\{|\\cdot|[{}^]", lambda match: "" if match.group() in "{}^" else " ", source[start:])
    words = re.sub(r"\s*/\s*", "/", re.sub(r"[\s.]+", " ", words)).strip().lower()
    words = re.sub(r"\s+(?=-?\d)", "", re.sub(r"\b([ap]) m\b", r"\1m", words))
    return replace(_parse(source[:start]), unit=_SAME_UNIT.get(words, words))


def _words_at_end(source: str) -> int | None:
    r"""Where the words at the end of `source` begin: all of ``\text{ J kg}^{-1} \text{ K}^{-1}``."""
    start, end = None, 0
    for piece in _PIECE.finditer(source):
        if piece.start() != end:
            start = None
        if start is None and piece.group().startswith(r"\text"):
            start = piece.start()
        end = piece.end()
    return start if end == len(source) else None


def _balanced(source: str) -> bool:
    return source.count("{") == source.count("}") and bool(source.strip()) and not re.search(r"[-+*/^_=(]\s*$", source)
