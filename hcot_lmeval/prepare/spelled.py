"""Text that spells a control token, in whatever characters: it would open a block, or end one, where nobody meant to.

A text is searched as it stands and in its compatibility form (NFKC) without characters that cannot be seen: full-width
brackets, mathematical letters and zero-width spaces hide nothing.
"""

from __future__ import annotations

import re
import unicodedata

from hcot_lmeval.markup import PRESETS, Markup

CONTROL = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn)>")
"""What control tokens look like: ``<|im_end|>``, in their compatibility form DeepSeek's, ``<pad>``, ``</s>``."""
UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
"""Characters without a glyph that are not of the category Cf; variation selectors are found by their range."""


def spelled_markers(text: str, markup: Markup | None = None) -> list[str]:
    """Returns the markers and thinking tokens that a text spells: of `markup`, or of any preset."""
    markups = PRESETS.values() if markup is None else (markup,)
    marks = dict.fromkeys(mark for each in markups for mark in (*each.markers, *each.think))
    folded = fold(text)
    return [mark for mark in marks if mark in text or fold(mark) in folded]


def find_control(text: str) -> str | None:
    """Returns the first text that looks like a control token of some vocabulary, or None."""
    found = CONTROL.search(fold(text))
    return found.group() if found else None


def fold(text: str) -> str:
    """Returns the compatibility form of a text without what cannot be seen."""
    if text.isascii():
        return text
    seen = "".join(char for char in text if not _is_unseen(char))
    return "".join(char for char in unicodedata.normalize("NFKC", seen) if not _is_unseen(char))


def _is_unseen(char: str) -> bool:
    if char.isascii():
        return False
    return (
        char in UNSEEN
        or "\ufe00" <= char <= "\ufe0f"
        or "\U000e0100" <= char <= "\U000e01ef"
        or unicodedata.category(char) == "Cf"
    )
