"""What role a sentence plays in a chain of thought, judged by its words: turn, step, conclusion, plan, doubt.

The words are data (`discourse.json`), per language and role:

    turn      begins a check or another attempt        shift    begins something a little different
    step      begins the next part                     hold     goes on with the sentence before
    conclude  begins a result                          final    begins the answer to the whole problem
    plan      begins what is only an intention         doubt    stands anywhere in what is not certain
    define    stands anywhere in what introduces a name

A trace is read in the one language whose words begin most of its sentences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

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
_ITEM = re.compile(r"\s*(?:[-*+•–]|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)])\s")
_RELATION = re.compile(r"[=<>≤≥≈≡≠→⇒∈|±]|\\(?:leq?|geq?|equiv|approx|implies|in|boxed|to)\b|\\boxed")
_MATHEMATICS = re.compile(r"[\d$√∞]|\\[a-zA-Z(\[]")
_VALUE_CHARS = 500
"""A value that a sentence ends with is looked for in so many characters at its end."""
_VALUE = re.compile(
    r"(?:[=≈]|\\approx|(?<!\w)(?:is|are|be|by|of|to|gives?|equals?|get)(?!\w)|:)[^=a-zA-Z]*\d[^=,.]{0,24}\W*$"
)
"""A sentence that ends with a value."""
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{3,}")
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
        return bool(_ITEM.match(self.text))

    @cached_property
    def is_display(self) -> bool:
        """Whether it is a formula on lines of its own."""
        return self.breaks > 0 and bool(_RELATION.search(self.text)) and len(_WORD.findall(self.text)) < 3

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
