"""What one generation hands to a benchmark: a plain string with the whole story attached.

A benchmark compares strings, so a `Response` *is* the answer as a string and passes through filters, caches and JSON
as one. What else is known about the generation rides along as attributes. Anything that makes a new string of it
(``strip``, slicing, a filter) yields a plain ``str`` without them.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Parts(NamedTuple):
    """A generated text cut into its thinking and its answer."""

    thinking: str
    answer: str


def split_thinking(text: str, think: tuple[str, str] | None, *, opened: bool = False) -> Parts:
    """Cuts a generated text behind its thinking section.

    The answer begins after the last end of thinking. While the thinking is still open there is no answer: it is empty.
    A text that never opened a thinking section is all answer. An end of thinking without its beginning counts, for many
    chat templates write the beginning into the prompt.

    Args:
        text: the generated text.
        think: the strings around a thinking section, or None for a model without one.
        opened: the prompt ends inside a thinking section.
    """
    if think is None:
        return Parts("", text)
    begin, end = think
    start, stop = text.rfind(begin), text.rfind(end)
    still_open = start > stop or (opened and stop < 0)
    if still_open:
        return Parts(_without(text, think), "")
    if stop < 0:
        return Parts("", text)
    return Parts(_without(text[:stop], think), text[stop + len(end) :].lstrip())


def _without(text: str, think: tuple[str, str]) -> str:
    """The thinking without the strings around it."""
    for mark in think:
        text = text.replace(mark, "")
    return text


class Response(str):
    """The answer part of a generation.

    Attributes:
        stats: the statistics of the generation, keys as in `hcot_lmeval.events.Statistics.as_dict`.
        thinking: the text of the thinking section, markers kept.
        raw: everything as generated, markers kept.
        finish_reason: ``eos``, ``stop``, ``length`` or ``context``; None if unknown.
    """

    stats: dict[str, Any]
    thinking: str
    raw: str
    finish_reason: str | None

    def __new__(
        cls,
        answer: str,
        *,
        stats: Mapping[str, Any] | None = None,
        thinking: str = "",
        raw: str | None = None,
        finish_reason: str | None = None,
    ) -> Response:
        self = super().__new__(cls, answer)
        self.stats = dict(stats or {})
        self.thinking = thinking
        self.raw = str(answer) if raw is None else raw
        self.finish_reason = finish_reason
        return self

    def __getnewargs__(self) -> tuple[str]:
        # pickle and copy rebuild the string from this and restore the attributes from __dict__
        return (str(self),)

    def as_dict(self) -> dict[str, Any]:
        """Returns what `from_dict` needs, as JSON types."""
        return {"answer": str(self), **vars(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Response:
        """Builds the response that `as_dict` described.

        Raises:
            TypeError: a key is missing or unknown.
        """
        return cls(**data)
