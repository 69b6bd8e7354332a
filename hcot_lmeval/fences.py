r"""Stretches of text between an opening and a closing mark, found in time linear in the text, whatever the text holds.

A regular expression like ``\\\((.+?)\\\)`` reads on to the end of the text once for every mark that is never closed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Fenced(NamedTuple):
    """A stretch [start, stop) of a text, marks included, and what is between the marks."""

    start: int
    stop: int
    content: str


def fenced(text: str, marks: Mapping[str, str]) -> Iterator[Fenced]:
    """Yields the stretches of `text` between an opening and the next closing mark, leftmost first, none inside another.

    An opening mark that is never closed is text, and so is a mark that starts with ``$`` behind a backslash.

    Args:
        text: any text.
        marks: opening to closing mark; an opening mark comes before those that it begins with.
    """
    if not marks:
        return
    opening = re.compile("|".join(_pattern(mark) for mark in marks))
    closing = {mark: re.compile(_pattern(close)) for mark, close in marks.items()}
    missing: set[str] = set()  # closing marks that do not occur from here on
    at = 0
    while found := opening.search(text, at):
        mark = found.group()
        end = None if marks[mark] in missing else closing[mark].search(text, found.end())
        if end is None:
            missing.add(marks[mark])
            at = found.start() + 1
        else:
            yield Fenced(found.start(), end.end(), text[found.end() : end.start()])
            at = end.end()


def _pattern(mark: str) -> str:
    return rf"(?<!\\){re.escape(mark)}" if mark.startswith("$") else re.escape(mark)


def blanked(text: str, stretches: list[Fenced]) -> str:
    """Returns `text` with spaces in place of the stretches."""
    parts, at = [], 0
    for start, stop, _ in stretches:
        parts += [text[at:start], " " * (stop - start)]
        at = stop
    return "".join([*parts, text[at:]])
