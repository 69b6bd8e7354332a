r"""Formulas within text: finds them, and turns LaTeX into trees of MathML that are safe to build in a browser.

Found are ``\(...\)``, ``\[...\]``, ``$$...$$``, ``$...$``, ``\begin{align}...\end{align}`` and its like, and a
``\boxed{...}`` that stands alone. `latex2mathml` does the conversion. It passes some input through as markup
(``\text{<b>}``, ``\href``, ``\style``), so its string output is never used: its element tree is copied into plain
lists, tags and attributes that are not on our lists are refused or left out, and the page builds elements from the
lists. A formula that cannot be shown in full stays source text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

LONGEST = 4000
"""Characters of a formula beyond which it stays text."""
LARGEST = 2000
"""Elements of a formula beyond which it stays text."""
DEEPEST = 60
"""Elements within elements; a browser lays formulas out recursively."""

ARITY = {"mfrac": 2, "mroot": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "msubsup": 3, "munderover": 3}
"""Elements with a fixed number of children; with another number a browser shows an error or nothing."""
TAGS = frozenset(ARITY) | {
    *("mrow", "mi", "mn", "mo", "mtext", "mspace", "msqrt", "mstyle", "mpadded", "menclose"),
    *("mtable", "mtr", "mtd", "mmultiscripts", "mprescripts"),
}
"""Elements that the page may build. Not among them: ``maction`` and ``mglyph``, which act or load; ``mphantom``, which
hides."""
WORD = re.compile(r"[a-z]{1,16}(?: [a-z]{1,16}){0,15}")
SIZE = re.compile(r"[+-]?(?:\d(?:\.\d{1,4})?|\.\d{1,4})(?:em|ex)?")
ATTRIBUTES: dict[str, re.Pattern[str]] = {
    **dict.fromkeys(("accent", "displaystyle", "fence", "form", "largeop", "movablelimits", "separator"), WORD),
    **dict.fromkeys(("stretchy", "symmetric", "mathvariant", "columnalign", "notation"), WORD),
    **dict.fromkeys(("lspace", "rspace", "width", "minsize", "maxsize", "scriptlevel", "linethickness"), SIZE),
}
"""Attributes that the page may set, with the values that they may have: words and sizes too small to cover the page."""

MACROS = re.compile(r"\\(?:new|renew|provide)(?:command|environment)|\\[egx]?def(?![a-z])|\\let(?![a-z])")
"""Definitions. They can be made to expand without end, so a formula that holds one stays text."""
ALIASES = (
    (re.compile(r"\\(begin|end)\{(?:aligned|alignat\*?|alignedat|flalign\*?|eqnarray\*?)\}"), r"\\\1{align*}"),
    (re.compile(r"\\(begin|end)\{(?:gather\*?|gathered|multline\*?)\}"), r"\\\1{matrix}"),
    (re.compile(r"\\(begin|end)\{(?:equation\*?|displaymath|math)\}"), ""),
    (re.compile(r"\\(?:nonumber|notag|displaylines|allowbreak|hfill)(?![a-zA-Z])"), ""),
)
"""What the library does not know, in terms that it does; the layout is the same or nearly so."""
_ENVIRONMENT = r"(?:align|aligned|equation|gather|multline|eqnarray|cases|[pbvBV]?matrix)\*?"
FORMULA = re.compile(
    r"(?<!\$\$)(?<!\$\$\s)\$\$(?:\s*\$\$)*+(?P<block>(?:[^$\\]|\\.)++)\$\$(?:\s*\$\$)*"
    r"|\\\[(?P<bracket>(?:[^\\]|\\[^\[\]])++)\\\]"
    r"|\\\((?P<paren>(?:[^\\]|\\[^()])++)\\\)"
    rf"|(?P<env>\\begin\{{(?P<name>{_ENVIRONMENT})\}}.{{1,{LONGEST}}}?\\end\{{(?P=name)\}})"
    r"|(?P<boxed>\\boxed\s*\{)"
    r"|(?<![\\$\w])\$(?P<inline>(?![\s$])(?:[^$\\\n]|\\.|\n(?!\s*\n))++)(?<![\s\\])\$(?![\d$])",
    re.DOTALL,
)
r"""One formula. Delimiters that enclose nothing (``$$ $$``) count as one. For ``$`` the rule is that of pandoc: no
space within, no digit behind, so that an amount of money is not a formula. Repetitions are possessive: a text of a
thousand openings without an end is read in one pass, and a run of ``$$`` is tried from its beginning alone."""


class Formula(NamedTuple):
    """A formula of a text: the characters [start, stop), its LaTeX, and whether it stands on a line of its own."""

    start: int
    stop: int
    latex: str
    display: bool


Tree = list[Any]
"""``[tag, attributes, child, ...]``; a child is a string or a tree."""


def formulas(text: str) -> Iterator[Formula]:
    """Yields the formulas of a text, in order and apart from each other."""
    place = 0
    while found := FORMULA.search(text, place):
        formula = _formula(text, found)
        place = found.end() if formula is None else formula.stop
        if formula is not None:
            yield formula


def _formula(text: str, found: re.Match[str]) -> Formula | None:
    start, stop = found.span()
    if found["boxed"]:
        end = closing_brace(text, stop)
        return None if end is None else Formula(start, end, text[start:end], False)
    latex = found["block"] or found["bracket"] or found["paren"] or found["env"] or found["inline"]
    if not latex.strip():
        return None
    return Formula(start, stop, latex, bool(found["block"] or found["bracket"] or found["env"]))


def closing_brace(text: str, start: int) -> int | None:
    """Returns the index behind the brace that closes the one before `start`, or None if it is far or deep."""
    depth = 1
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, start + LONGEST):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
        if depth > DEEPEST:
            return None
    return None


@lru_cache(maxsize=50_000)
def mathml(latex: str, display: bool) -> Tree | None:
    """Returns the MathML of a formula as a tree of plain lists, or None if it cannot be shown in full."""
    if len(latex) > LONGEST or MACROS.search(latex) or "%" in re.sub(r"\\%", "", latex):
        return None
    for pattern, replacement in ALIASES:
        latex = pattern.sub(replacement, latex)
    from latex2mathml.converter import convert_to_element

    shown = "block" if display else "inline"
    try:
        element = convert_to_element(latex.strip(), display=shown)
    except Exception:
        # The library has a dozen errors of its own and lets IndexError, KeyError and RecursionError through for input
        # that is not LaTeX. Whatever it was, the formula is shown as its source.
        return None
    try:
        return ["math", {"display": shown}, *_children(element, [LARGEST], 0)]
    except _Unfit:
        return None


class _Unfit(Exception):
    """The library's answer is not something that the page may show."""


def _children(element: Element, budget: list[int], depth: int) -> list[Any]:
    budget[0] -= 1
    if budget[0] < 0 or depth > DEEPEST:
        raise _Unfit
    children: list[Any] = [_text(element.text)] if element.text else []
    for child in element:
        within = _children(child, budget, depth + 1)
        unfit = child.tag not in TAGS or len(within) != ARITY.get(child.tag, len(within))
        if unfit or (child.tail and child.tail.strip()):
            raise _Unfit
        allowed = {k: v for k, v in child.attrib.items() if k in ATTRIBUTES and ATTRIBUTES[k].fullmatch(v)}
        children.append([child.tag, allowed, *within])
    return children


def _text(text: str) -> str:
    r"""The characters that the library's references stand for.

    Raises:
        _Unfit: the text holds a command that the library does not know, or ``&`` or ``#`` that mean nothing there.
    """
    plain = html.unescape(text)
    if plain.startswith("\\") or plain in ("&", "#"):
        raise _Unfit
    return plain
