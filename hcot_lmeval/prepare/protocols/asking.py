"""What all protocols share: how long a question may be, how sentences are shown, how a question is put together.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcot_lmeval.prepare.outline import CODES
from hcot_lmeval.prepare.protocols.prompts import Prompt
from hcot_lmeval.prepare.protocols.windows import Window, cut_windows
from hcot_lmeval.prepare.segmenter import count_tokens
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import FAILURES, Message, Reply, Task

UNUSABLE = {
    "no_outline": "the row has no outline that a teacher could add to",
    "words_differ": "the rewriting changes more words than is allowed",
    "formulas_differ": "the rewriting changes a number or formula",
    "blocks_differ": "the reply is about other blocks than it was asked about",
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

    def windows(self, pieces: Sequence[str], *, overlap: int | None = None) -> list[Window]:
        """Returns the parts of a trace that get a question each."""
        lengths = [count_tokens(piece) for piece in pieces]
        overlap = self.options.overlap_tokens if overlap is None else overlap
        return cut_windows(lengths, self.options.window_tokens, overlap)

    def task(
        self,
        row_id: str,
        schema: Mapping[str, Any] | None,
        accept: Callable[[Reply], object],
        system: Mapping[str, object],
        user: Mapping[str, object],
    ) -> Task:
        """Returns a question.

        Args:
            row_id: of the row.
            schema: of the reply.
            accept: raises `Unusable` for a reply that is of no use.
            system: what is filled into the section of that name.
            user: the same.
        """
        messages = (
            Message("system", self.prompt.render("system", **system)),
            Message("user", self.prompt.render("user", **user)),
        )
        depends = {"prompt": self.prompt.label, **self.teacher.identity}
        repair = self.prompt.sections["repair"] if self.options.ask_again else None
        return Task.make(self.prompt.name, row_id, messages, schema, depends, accept, repair)


def numbered(pieces: Sequence[str], window: Window) -> str:
    """Returns the sentences of a window with their numbers."""
    start, stop = window
    return "\n".join(f"[{number}] {pieces[number].strip()}" for number in range(start, stop))


def meaning(code: str) -> str:
    """Returns what a code of a teacher means."""
    return TEACHING.get(code) or CODES.get(code) or "a fault of the teacher's reply"
