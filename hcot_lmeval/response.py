"""What one generation hands to a benchmark: a plain string with the whole story attached.

A benchmark compares strings, so a `Response` *is* the answer as a string and passes through filters, caches and JSON
as one. What else is known about the generation rides along as attributes. Anything that makes a new string of it
(``strip``, slicing, a filter) yields a plain ``str`` without them.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
