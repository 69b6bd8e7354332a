"""What all protocols share: how long a question may be, how sentences are shown, how a question is put together.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hcot_lmeval.prepare.protocols.prompts import Prompt
from hcot_lmeval.prepare.protocols.windows import Window, cut_windows
from hcot_lmeval.prepare.segmenter import count_tokens
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import FAILURES, Message, Reply, Task, Unusable

UNUSABLE = {
    "no_outline": "the row has no outline that a teacher could add to",
    "words_differ": "the rewriting changes more words than is allowed",
    "formulas_differ": "the rewriting changes a number or formula",
    "blocks_differ": "the judge speaks of other blocks than it was asked about",
}
"""Code of a reply that a protocol cannot use -> what it means; those of outlines come on top."""
TEACHING: dict[str, str] = {**FAILURES, **UNUSABLE}
"""Every code that a row may have for its teacher's sake, those of outlines apart."""


@dataclass(frozen=True)
class AskingOptions:
    """How questions are put together.

    Raises:
        ValueError: the numbers make no sense together.
    """

    window_tokens: int = field(default=8000, metadata={"help": "tokens of a trace that go into one question, about"})
    overlap_tokens: int = field(default=1000, metadata={"help": "tokens that two questions about a trace share"})
    ask_again: bool = field(
        default=True,
        metadata={"help": "tell the teacher the fault of a reply and ask once more", "negative": "--no-ask-again"},
    )

    def __post_init__(self) -> None:
        cut_windows([], self.window_tokens, self.overlap_tokens)


@dataclass(frozen=True)
class Asking:
    """Puts the questions of a protocol together.

    Attributes:
        prompt: the words.
        teacher: who is asked.
        options: how.
    """

    prompt: Prompt
    teacher: TeacherOptions
    options: AskingOptions = AskingOptions()

    @property
    def made_by(self) -> dict[str, Any]:
        """What a row remembers of its making."""
        return {"method": "teacher", "prompt": self.prompt.label, **self.teacher.identity}

    def windows(self, pieces: Sequence[str]) -> list[Window]:
        """Returns the parts of a trace that get a question each."""
        lengths = [count_tokens(piece) for piece in pieces]
        return cut_windows(lengths, self.options.window_tokens, self.options.overlap_tokens)

    def task(
        self,
        row_id: str,
        schema: Mapping[str, Any] | None,
        accept: Callable[[Reply], object],
        system: Mapping[str, object],
        user: Mapping[str, object],
        share: float,
    ) -> Task:
        """Returns a question.

        Args:
            row_id: of the row.
            schema: of the reply.
            accept: raises `Unusable` for a reply that is of no use.
            system: what is filled into the section of that name.
            user: the same.
            share: output tokens to be expected, over those of the input.
        """
        messages = (
            Message("system", self.prompt.render("system", **system)),
            Message("user", self.prompt.render("user", **user)),
        )
        depends = {"prompt": self.prompt.label, **self.teacher.identity}
        repair = self.prompt.sections["repair"] if self.options.ask_again else None
        return replace(Task.make(self.prompt.name, row_id, messages, schema, depends, accept, repair), share=share)


def numbered(pieces: Sequence[str], window: Window) -> str:
    """Returns the sentences of a window with their numbers."""
    start, stop = window
    return "\n".join(f"[{number}] {pieces[number].strip()}" for number in range(start, stop))


def require_good(reply: Reply, window: Window, windows: int) -> None:
    """Passes a good reply.

    Args:
        reply: to the question about a window.
        window: the sentences it is about, for the message.
        windows: how many there are of the row.

    Raises:
        Unusable: the reply has a failure.
    """
    if reply.failure is not None:
        where = f" (sentences {window[0]} to {window[1] - 1})" if windows > 1 else ""
        raise Unusable(reply.failure.code, reply.failure.detail + where)


def closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


NUMBER = {"type": "integer"}
TEXT = {"type": "string"}
FLAG = {"type": "boolean"}


def one_of(*values: str) -> dict[str, Any]:
    """Returns the schema of one of some words."""
    return {"type": "string", "enum": list(values)}


def many(items: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of a list of such items."""
    return {"type": "array", "items": dict(items)}


def maybe(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of such a value or null, in the one form that all servers take."""
    return {"anyOf": [dict(kind), {"type": "null"}]}
