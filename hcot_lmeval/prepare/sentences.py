r"""Where a text can be cut, and what role each sentence plays: turn, step, conclusion, plan, doubt.

Sentences, lines and items of lists are cut; never within mathematics, code or a table.

Cutting loses nothing: ``"".join(split_sentences(text)) == text``. White space stays with the sentence before it, so a
block that begins with a sentence begins with a word.

A cut is only ever made
    * at a line break, unless a hard-wrapped line goes on behind it;
    * behind ``.``, ``!``, ``?`` and what closes with them, in front of white space and of what can begin a sentence;
    * behind the full stops of scripts that write no space there (``。``) or no capital (``।``, ``؟``);
and never inside of a span that `whole_spans` names. Where a full stop might end an abbreviation, no cut is made: two
sentences in one piece do little harm.

A splitter made for prose (`sentencex`) was tried and not used: it cuts ``$f(x) = 1. \text{Next}$``, ``3! = 6`` and
``1. First``, asks for the language, and drops white space.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path

Span = tuple[int, int]

_CLOSERS = r"""["'”’»」』）】)\]}*_`]*"""
_MATH_CLOSERS = r"(?:[ \t]*(?:\$\$?|\\\)|\\\]))?"
_BREAK = r"\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]"
_END = re.compile(
    rf"(?P<line>(?<![^\S\n\r\x0b\x0c\x85\u2028\u2029])[^\S\n\r\x0b\x0c\x85\u2028\u2029]*+(?:{_BREAK})\s*)"
    rf"|(?P<stop>(?<![.!?])(?:\.{{3,}}|…|[.!?]+){_MATH_CLOSERS}{_CLOSERS})(?P<space>[^\S\n\r\x0b\x0c\x85\u2028\u2029]+)(?=\S)"
    rf"|(?P<wide>[。！？｡।॥؟۔։።។။]+[”’」』）】\"')\]*]*\s*)"
)
"""The candidates: a line break, a full stop with white space behind it, a full stop that needs none.

A run of spaces or stops is tried from its beginning alone, so that a long one is read once."""

_ITEM = re.compile(r"(?:[-*+•–]|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]|#{1,6}|\|)(?=\s)")
_ITEM_ALONE = re.compile(r"[\s*_#>(]*(?:[-*+•–]|(?:\d{1,3}|[A-Za-z]|[ivx]{2,4})[.)])[\s*_]*")
_WRAPPED = 60
"""Characters that a line has at least when the line break behind it comes from hard wrapping."""

_ABBREVIATIONS = frozenset(
    "approx ca cf col cor ch dept eg ex fig figs gen ie incl lem max min mr mrs ms prof resp rev sec sect st thm "
    "viz vol vs dr jr sr abb bzw bspw evtl ggf inkl nr vgl zb dh pág pag núm num sr sra dra cfr рис "
    "им см стр".split()
)
"""Words before a full stop that ends no sentence, lower case, without their own full stops."""
_REFERENCES = frozenset("eq eqs eqn eqns no nos fig figs prop props p pp art def alg ex ch sec thm lem cor".split())
"""The same, but only where a number follows: "Eq. (3)", but "The answer is no. So ..."."""
_SEEN = re.compile(r"\s*")
_LAST_WORD = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]+$")


def split_sentences(text: str) -> list[str]:
    """Cuts a text into sentences, lines and items of lists.

    Returns:
        Pieces that give the text when joined. Each but the only piece of a blank text holds something to read; an
        empty text has none.
    """
    cuts = [0, *_cuts(text), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts) if start < stop]


def _cuts(text: str) -> Iterator[int]:
    """Yields positions, ascending, at which a new piece begins."""
    whole = list(whole_spans(text))
    starts = [start for start, _ in whole]
    begin, words = 0, -1  # of the piece at hand, and where something is to be read in it
    for end in _END.finditer(text):
        at = end.end()
        inside = bisect_left(starts, at) - 1
        if at >= len(text) or (inside >= 0 and at < whole[inside][1]):
            continue
        if words < begin:
            words = _SEEN.match(text, begin).end()  # type: ignore[union-attr]
        if words >= end.start() or _ITEM_ALONE.fullmatch(text, begin, at):
            continue
        if end["wide"] or (_ends_line(text, begin, end) if end["line"] else _ends_sentence(text, end)):
            yield at
            begin = at


def _ends_line(text: str, begin: int, end: re.Match[str]) -> bool:
    """Whether a line break is more than hard wrapping, judged by the lines around it."""
    at, last = end.end(), re.split(_BREAK, text[max(begin, end.start() - _WRAPPED - 1) : end.start()])[-1]
    breaks = re.findall(_BREAK, end["line"])
    goes_on = text[at].islower() and last[-1:] not in ".!?:;" and not _ITEM.match(text, at)
    return len(breaks) > 1 or len(last) < _WRAPPED or not goes_on


def _ends_sentence(text: str, end: re.Match[str]) -> bool:
    """Whether a full stop with white space behind it ends a sentence, judged by the words around it."""
    stop, after = end["stop"], text[end.end() : end.end() + 2]
    word = _LAST_WORD.search(text, max(0, end.start() - 24), end.start())
    before = word[0].replace(".", "").casefold() if word else ""
    name = after[0].islower() and not after[1:2].isalpha()  # a variable, which may begin a sentence
    if (
        not (after[0].isalnum() or after[0] in "\\$([{*_\"'“‘«「#-√∠∆≈¿¡")
        or text[end.start() - 1 : end.start()].isspace()
    ):
        return False  # "1 + ... + 9", "4! = 24"
    if stop.startswith("?"):
        return True
    if stop.startswith("!"):
        return len(before) > 1 or (after[0].isupper() and after[1:].islower())  # "n! ways", "5! C(5, 2)"
    if stop.startswith(("..", "…")):
        return after[0].isupper()
    if before in _ABBREVIATIONS or (word and "." in word[0]):
        return False
    if before in _REFERENCES and (after[0].isdigit() or after[0] in "([$\\"):
        return False
    return name or not after[0].islower()


_WHOLE = re.compile(
    r"(?P<skip>\\\\|\\\$|\\`)"
    r"|(?P<fence>^[ \t]*(?P<ticks>`{3,}|~{3,})[^\n]*$)"
    r"|(?P<table>^[ \t]*\|[^\n]*\|[ \t]*$(?:\n[ \t]*\|[^\n]*\|[ \t]*$)+)"
    r"|(?P<environment>\\begin\{[A-Za-z]+\*?\})"
    r"|(?P<display>\\\[(?:(?!\\\[).)*?\\\])"
    r"|(?P<inline>\\\((?:(?!\\\(|\n[ \t]*\n).)*?\\\))"
    r"|(?P<dollars>\$\$(?:(?!\$\$|\n[ \t]*\n).)+\$\$)"
    r"|(?P<dollar>\$(?=[^\s$])(?:\\.|(?!\n[ \t]*\n)[^$\\])*(?<!\s)\$(?!\d))"
    r"|(?P<code>(?<!`)`[^`\n]+`(?!`))"
    r"|(?P<group>\\[A-Za-z]+\*?\s*(?:\[[^\[\]\n]*\])?\{)"
    r"|(?P<aside>\((?=[^\s()])[^()\n]{0,300}\))",
    re.DOTALL | re.MULTILINE,
)

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\\(begin|end)\{([A-Za-z]+\*?)\}")
_BRACE = re.compile(r"\\[^\n]|[{}]|\n[ \t]*\n")


def whole_spans(text: str) -> Iterator[Span]:
    r"""Yields the spans [start, stop) that are never cut, ascending and apart from each other.

    They are fenced and inline code, tables, ``\begin{x}...\end{x}``, ``\[...\]``, ``\(...\)``, ``$$...$$``,
    ``$...$``, the braces behind a command, and asides in parentheses. What is never closed is no span: a stray dollar
    keeps nothing together. Inline mathematics and ``$$`` end with their paragraph.
    """
    at, fences, ends = 0, _fence_ends(text), _environment_ends(text) | _group_ends(text)
    while found := _WHOLE.search(text, at):
        if found["fence"] and found.end() not in fences:
            at = found.end("ticks")
            continue
        at = (fences if found["fence"] else ends).get(found.end(), found.end())
        if not found["skip"]:
            yield found.start(), at


def _fence_ends(text: str) -> dict[int, int]:
    """Where the line that opens a fenced block ends -> where the one ends that closes it, if there is one."""
    ends: dict[int, int] = {}
    closing: dict[str, int] = {}
    for found in reversed(list(_FENCE.finditer(text))):
        if found[1] in closing:
            ends[found.end()] = closing[found[1]]
        if not found[2].strip(" \t"):
            closing[found[1]] = found.end()
    return ends


def _environment_ends(text: str) -> dict[int, int]:
    """Where the beginning of an environment ends -> where the environment does; only for those that are closed."""
    ends: dict[int, int] = {}
    waiting: dict[str, list[int]] = {}
    for found in _ENVIRONMENT.finditer(text):
        begun = waiting.setdefault(found[2], [])
        if found[1] == "begin":
            begun.append(found.end())
        elif begun:
            ends[begun.pop()] = found.end()
    return ends


def _group_ends(text: str) -> dict[int, int]:
    """Behind the brace that opens a group -> behind the one that closes it, if that is in the same paragraph."""
    ends: dict[int, int] = {}
    waiting: list[int] = []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            waiting.append(found.end())
        elif found[0] == "}" and waiting:
            ends[waiting.pop()] = found.end()
        elif "\n" in found[0]:
            waiting.clear()
    return ends


# --- what role a sentence plays ---------------------------------------------------------------------------------------

# The words are data (`discourse.json`), per language and role:
#
#     turn      begins a check or another attempt        shift    begins something a little different
#     step      begins the next part                     hold     goes on with the sentence before
#     conclude  begins a result                          final    begins the answer to the whole problem
#     plan      begins what is only an intention         doubt    stands anywhere in what is not certain
#     define    stands anywhere in what introduces a name
#
# A trace is read in the one language whose words begin most of its sentences.

_WORDS = Path(__file__).with_name("discourse.json")
_ANYWHERE = ("doubt", "define")
_LED = ("turn", "plan", "final")
"""Roles that other words may lead in: "But wait", "So, let me", "Therefore, the answer is"."""
_LEAD_INS = ("turn", "shift", "step", "conclude", "hold")
_ROLES = ("turn", "shift", "step", "conclude", "final", "hold", "plan", *_ANYWHERE)
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\W]")
"""A character beside which no word has to end: scripts without spaces, Korean with its particles, punctuation."""

_BEFORE = r"[\s>#*_\-•]*"
_HEADER = re.compile(r"\s*(?:#{1,6}\s|(?:\*\*|__)[^*_\n]{1,80}(?:\*\*|__):?\s*$)")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•–]|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)])\s")
_RELATION = re.compile(r"[=<>≤≥≈≡≠→⇒∈|±]|\\(?:leq?|geq?|equiv|approx|implies|in|boxed|to)\b|\\boxed")
_MATHEMATICS = re.compile(r"[\d$√∞]|\\[a-zA-Z(\[]")
_VALUE_CHARS = 500
"""A value that a sentence ends with is looked for in so many characters at its end."""
_VALUE = re.compile(
    r"(?:[=≈]|\\approx|(?<!\w)(?:is|are|be|by|of|to|gives?|equals?|get)(?!\w)|:)[^=a-zA-Z]*\d[^=,.]{0,24}\W*$"
)
"""A sentence that ends with a value."""
_LONG_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{3,}")
_MIDDLE = re.compile(r"\s*(?:[=≈<>≤≥⇒→+*/]|(?!\w+\()[a-zß-ÿа-яё]{2,})")


@dataclass(frozen=True)
class Cues:
    """The words of one language, by role."""

    language: str

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        words = {role: _words()[self.language].get(role, []) for role in _ROLES}
        lead_in = _any_of([word for role in _LEAD_INS for word in words[role]])
        starts = {role: rf"{_BEFORE}(?:(?:{lead_in})[\s,]+){{0,3}}" if role in _LED else _BEFORE for role in _ROLES}
        return {
            role: _stems(words[role]) if role in _ANYWHERE else _compiled(f"{starts[role]}(?:{_any_of(words[role])})")
            for role in _ROLES
        }

    def plays(self, role: str, sentence: str) -> bool:
        """Whether the words of `sentence` give it a role."""
        pattern = self._patterns[role]
        return bool(pattern.search(sentence) if role in _ANYWHERE else pattern.match(sentence))


@dataclass(frozen=True)
class Sentence:
    """A sentence and what can be told from its words.

    Attributes:
        text: as it stands, white space behind it included.
        cues: the words of its language.
    """

    text: str
    cues: Cues

    def plays(self, role: str) -> bool:
        """Whether the sentence has a role; see the module's docstring."""
        return self.cues.plays(role, self.text) or (role == "final" and "\\boxed" in self.text)

    @cached_property
    def announces(self) -> bool:
        """Whether it ends in a colon, so that what follows belongs to it."""
        return bool({":", "："} & set(self._end)) or self.is_header

    @cached_property
    def _end(self) -> str:
        """The characters behind the last word."""
        stop = len(self.text)
        while stop and not (self.text[stop - 1].isalnum() or self.text[stop - 1] == "_"):
            stop -= 1
        return self.text[stop:]

    @cached_property
    def breaks_off(self) -> bool:
        """Whether it ends in a comma or the like, so that the next line goes on with it."""
        return self.text.rstrip().endswith((",", ";", "，", "、", "-", "→"))

    @cached_property
    def goes_on(self) -> bool:
        """Whether it begins in the middle of something: with a small letter that is no variable, or with a relation."""
        return bool(_MIDDLE.match(self.text))

    @cached_property
    def asks(self) -> bool:
        """Whether it is a question."""
        return self.text.rstrip().endswith(("?", "？", "؟"))

    @cached_property
    def is_header(self) -> bool:
        return bool(_HEADER.match(self.text))

    @cached_property
    def is_item(self) -> bool:
        """Whether it is an item of a list."""
        return bool(_LIST_ITEM.match(self.text))

    @cached_property
    def is_display(self) -> bool:
        """Whether it is a formula on lines of its own."""
        return self.breaks > 0 and bool(_RELATION.search(self.text)) and len(_LONG_WORD.findall(self.text)) < 3

    @cached_property
    def breaks(self) -> int:
        """Line breaks behind it; two and more end a paragraph."""
        return self.text[len(self.text.rstrip()) :].count("\n")

    @cached_property
    def result(self) -> float:
        """How much it looks like a result: about 3 for a conclusion with a value, negative for a plan or a question."""
        mathematics = bool(_MATHEMATICS.search(self.text))
        score = 1.5 * self.plays("conclude") + 1.0 * bool(_RELATION.search(self.text)) + 0.5 * mathematics
        text = self.text.rstrip()
        score += 0.75 * bool(_VALUE.search(text, max(0, len(text) - _VALUE_CHARS)))
        score += 1.0 * self.plays("define") + 2.0 * ("\\boxed" in self.text)
        score -= 1.5 * self.plays("doubt") + 0.5 * self.plays("turn") + 2.0 * self.asks + 0.5 * self.is_item
        score -= 0.5 * self.plays("step")
        score -= 1.5 * (self.plays("plan") and not self.plays("define"))
        score -= 0.0 if mathematics else 1.0 + 0.5 * (len(self.text) < 40)  # "So that works."
        return score


def read_sentences(pieces: Sequence[str]) -> list[Sentence]:
    """Returns the pieces as sentences of the language that they are in."""
    cues = Cues(guess_language(pieces))
    return [Sentence(piece, cues) for piece in pieces]


def guess_language(pieces: Sequence[str]) -> str:
    """Returns the language of `discourse.json` whose words begin most of up to 200 pieces; English where none does."""
    sample = pieces[:: max(1, len(pieces) // 100)]

    def hits(language: str) -> int:
        cues = Cues(language)
        return sum(any(cues.plays(role, piece) for role in ("turn", "step", "conclude", "plan")) for piece in sample)

    return max(_words(), key=hits)


@cache
def _words() -> dict[str, dict[str, list[str]]]:
    """Language -> role -> words; English comes first, so that it wins ties."""
    words: dict[str, dict[str, list[str]]] = json.loads(_WORDS.read_text(encoding="utf-8"))
    return words


def _any_of(words: Sequence[str]) -> str:
    """A pattern of whole words; one that never matches without any."""
    longest_first = sorted(words, key=len, reverse=True)
    return (
        "|".join(re.escape(word) + ("" if _UNSPACED.match(word[-1]) else r"(?!\w)") for word in longest_first) or "(?!)"
    )


def _stems(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern of beginnings of words: "contradict" is in "contradiction"."""
    return _compiled("|".join(("" if _UNSPACED.match(w[0]) else r"(?<!\w)") + re.escape(w) for w in words) or "(?!)")


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)
