"""Text for readers: characters that one cannot see or that act on a terminal, and numbers of things."""

from __future__ import annotations

import re

ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb]"
)
"""Controls but tab and newline, line and paragraph separators, overrides of the direction of writing, and halves of
surrogate pairs. Joiners and direction marks, which ordinary text in many languages holds, are left alone."""


def visible(text: str) -> str:
    r"""Returns the text with every acting character as ``⟨U+001B⟩``, so that it can be printed whatever it holds."""
    return ACTING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def plural(count: int, noun: str) -> str:
    """Returns ``1 token`` or ``3 tokens``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
