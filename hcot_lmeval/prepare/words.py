"""Are the words of the source still there? Markers and solutions may be added; nothing else may change.

A trace that came from an outline is taken apart again, exactly. Any other one, such as a rewriting, is compared word by
word: what is missing from the original counts as changed, and so does what was added outside of solutions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.measure import TEXT, Stretch, whole_blocks

WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d]+|[^\w\s]|_")
"""A number, a word, or a sign; a marker may stand between any two."""
FORMULA = re.compile(r"[\d\\^_=+*/<>≤≥≠×÷√∑∫−-]")
"""What a word or sign of a formula holds."""
EXACT_WORDS = 20_000
"""Longer texts are aligned without words that are very frequent, which could take minutes otherwise."""


@dataclass(frozen=True)
class Changes:
    """What differs between the original and a trace.

    Attributes:
        words: of the original.
        lost: words of the original that are missing.
        added: words that are new, outside of solutions.
    """

    words: int
    lost: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Changed words, over the words of the original."""
        return max(len(self.lost), len(self.added)) / max(1, self.words)

    @property
    def formulas(self) -> list[str]:
        """Numbers and parts of formulas that are lost or added, and not merely at another place."""
        lost, added = (Counter(word for word in side if FORMULA.search(word)) for side in (self.lost, self.added))
        return sorted(((lost - added) + (added - lost)).elements())


def compare(original: str, stretches: Sequence[Stretch], markup: Markup) -> Changes:
    """Compares a trace with the words that it was made of.

    A solution is either words of the original, which stand there next, or added as a whole; where that explains the
    trace, nothing was changed. Otherwise the two are aligned. Space does not count.
    """
    before, parts = WORD.findall(original), _parts(stretches, markup)
    if _explained(original, parts):
        return Changes(len(before))
    after = [(word, inside) for text, inside in parts for word in WORD.findall(text)]
    matcher = SequenceMatcher(
        None, before, [word for word, _ in after], autojunk=len(before) + len(after) > EXACT_WORDS
    )
    lost: list[str] = []
    added: list[str] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind != "equal":
            lost += before[i1:i2]
            added += [word for word, inside in after[j1:j2] if not inside]
    return Changes(len(before), tuple(lost), tuple(added))


def _parts(stretches: Sequence[Stretch], markup: Markup) -> list[tuple[str, bool]]:
    """The texts, and whether each is part of a solution."""
    blocks = whole_blocks(stretches, markup)
    begins, ends = {block.split for block in blocks}, {block.close for block in blocks}
    parts, solutions = list[tuple[str, bool]](), 0
    for place, stretch in enumerate(stretches):
        solutions += (place in begins) - (place in ends)
        if stretch.mark == TEXT:
            parts.append((stretch.text, solutions > 0))
    return parts


def _explained(original: str, parts: Sequence[tuple[str, bool]]) -> bool:
    """Whether the texts, less some that are solutions, are the original."""
    letters = "".join(original.split())
    ways = {0}  # how much of the original the texts so far may have used
    for text, inside in parts:
        said = "".join(text.split())
        used = {at + len(said) for at in ways if letters.startswith(said, at)}
        ways = ways | used if inside else used
    return len(letters) in ways
