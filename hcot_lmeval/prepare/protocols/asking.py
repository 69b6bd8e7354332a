"""What all protocols share: the words of a question, the windows that a long trace goes in, and how both become a task.

    windows = cut_windows(lengths, size=6000, overlap=800)        # (0, 130), (114, 251), ...
    blocks = merge(windows, blocks_of_each_window)

A protocol gives the `questions` about a row and makes the `entry` of the journal from the replies, in their order.

The words are text files, ``prompts/NAME.md``: a line ``version: N``, then a section for each part of the conversation,
which begins with ``# name``. ``{{name}}`` is replaced by a value, once: what values hold is left alone. A changed
question needs a higher version, which is part of the key of every task and of `made_by` of every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import accumulate, pairwise
from typing import Any, Protocol

from pydantic import Field, model_validator

from hcot_lmeval.prepare.outline import Block
from hcot_lmeval.prepare.segmenter import count_tokens
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import FAILURES, Form, Message, Reply, Task, Unusable
from hcot_lmeval.settings import Section

UNUSABLE = {
    "no_outline": "the row has no outline that a teacher could add to",
    "words_differ": "the rewriting changes more words than is allowed",
    "formulas_differ": "the rewriting changes a number or formula",
    "blocks_differ": "the judge speaks of other blocks than it was asked about",
}
"""Code of a reply that a protocol cannot use -> what it means; those of outlines come on top."""
TEACHING: dict[str, str] = {**FAILURES, **UNUSABLE}
"""Every code that a row may have for its teacher's sake, those of outlines apart."""

Window = tuple[int, int]
"""First sentence, and one past the last."""


class AskingProtocol(Protocol):
    """What a teacher is asked about a row, and what is made of the replies."""

    @property
    def made_by(self) -> dict[str, Any]:
        """What the rows depend on."""
        ...

    def questions(self, row: Any) -> list[Task]:
        """Returns the questions about a row; none where it needs none.

        Raises:
            Unusable: the row is not worth a question, for it would be rejected whatever the reply.
        """
        ...

    def entry(self, row: Any, replies: Sequence[Reply]) -> dict[str, Any]:
        """Returns the entry of the journal.

        Raises:
            Unusable: a reply is of no use.
            OutlineError: the replies together make no outline.
        """
        ...


class AskingOptions(Section, title="questions"):
    """How questions are put together."""

    window_tokens: int = Field(8000, description="tokens of a trace that go into one question, about")
    overlap_tokens: int = Field(1000, description="tokens that two questions about a trace share")
    ask_again: bool = Field(True, description="tell the teacher the fault of a reply and ask once more")

    @model_validator(mode="after")
    def _check(self) -> AskingOptions:
        cut_windows([], self.window_tokens, self.overlap_tokens)
        return self


@dataclass(frozen=True)
class Asking:
    """Puts the questions of a protocol together."""

    prompt: Prompt
    teacher: TeacherOptions
    options: AskingOptions = field(default_factory=AskingOptions)

    def made_by(self, **options: Any) -> dict[str, Any]:
        """What a row remembers of its making; `options` are those of the protocol."""
        made_by = {"method": "teacher", "prompt": self.prompt.label, **self.teacher.identity}
        return {**made_by, "options": {**options, **self.options.model_dump()}}

    def windows(self, pieces: Sequence[str]) -> list[Window]:
        """Returns the parts of a trace that get a question each."""
        lengths = [count_tokens(piece) for piece in pieces]
        return cut_windows(lengths, self.options.window_tokens, self.options.overlap_tokens)

    def task(
        self,
        form: type[Form] | None,
        accept: Callable[[Any], object],
        system: Mapping[str, object],
        user: Mapping[str, object],
        share: float,
    ) -> Task:
        """Returns a question; `system` and `user` are filled into the sections of that name. See `Task`."""
        messages = [Message("system", self.prompt.render("system", **system))]
        messages.append(Message("user", self.prompt.render("user", **user)))
        depends = {"prompt": self.prompt.label, **self.teacher.identity}
        repair = self.prompt.sections["repair"] if self.options.ask_again else None
        return Task(self.prompt.name, messages, form, depends, accept, repair, share)


def numbered(pieces: Sequence[str], window: Window) -> dict[str, object]:
    """Returns what a prompt says of a window: its numbered sentences, the first, the last, how many there are."""
    start, stop = window
    shown = "\n".join(f"[{number}] {pieces[number].strip()}" for number in range(start, stop))
    return {"first": start, "last": stop - 1, "count": len(pieces), "sentences": shown}


def require_inside(blocks: Sequence[Block], window: Window) -> None:
    """Raises an `Unusable` for a block over sentences that were not shown."""
    for block in blocks:
        if block.start < window[0] or block.stop > window[1]:
            raise Unusable("out_of_range", f"{block}; shown were {window[0]} to {window[1] - 1}")


def values(replies: Sequence[Reply], windows: Sequence[Window]) -> list[Any]:
    """Returns what was made of the replies to the questions about some windows.

    Raises:
        Unusable: one of them is of no use; the message says about which sentences.
    """
    for reply, (start, stop) in zip(replies, windows, strict=True):
        if reply.failure is not None:
            where = f" (sentences {start} to {stop - 1})" if len(windows) > 1 else ""
            raise Unusable(reply.failure.code, reply.failure.detail + where)
    return [reply.value for reply in replies]


# --- prompts ----------------------------------------------------------------------------------------------------------

_SECTION = re.compile(r"^# (\w+)$", re.MULTILINE)
_PLACE = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        name: of its file.
        version: raised whenever its words change.
        sections: name -> text.
    """

    name: str
    version: int
    sections: Mapping[str, str]

    @property
    def label(self) -> str:
        """Name and version, for records."""
        return f"{self.name}/{self.version}"

    def render(self, section: str, **values: object) -> str:
        """Returns a section with its places filled.

        Raises:
            KeyError: a value is missing or is used nowhere, or there is no such section.
        """
        text = self.sections[section]
        if unused := values.keys() - set(_PLACE.findall(text)):
            raise KeyError(f"{self.name}: {section} has no place for {', '.join(sorted(unused))}")
        return _PLACE.sub(lambda place: str(values[place[1]]), text)


@lru_cache(maxsize=16)
def load_prompt(name: str) -> Prompt:
    """Reads a question."""
    return parse_prompt(name, files("hcot_lmeval.prepare.protocols").joinpath(f"prompts/{name}.md").read_text("utf-8"))


def parse_prompt(name: str, text: str) -> Prompt:
    """Takes the text of a file apart.

    Raises:
        ValueError: it has no version.
    """
    head, *parts = _SECTION.split(text)
    found = re.fullmatch(r"version: (\d+)", head.strip())
    if found is None:
        raise ValueError(f"{name}.md has to begin with `version: N`")
    sections = {title: body.strip() for title, body in zip(parts[::2], parts[1::2], strict=True)}
    return Prompt(name, int(found[1]), sections)


# --- windows ----------------------------------------------------------------------------------------------------------


def cut_windows(lengths: Sequence[int], size: int, overlap: int) -> list[Window]:
    """Cuts sentences into windows.

    Args:
        lengths: tokens of the sentences.
        size: tokens of a window; a longer sentence is a window by itself.
        overlap: tokens that two windows share, about; none where a sentence is too long for it.

    Returns:
        Windows that cover all sentences, each beginning and ending behind the one before.

    Raises:
        ValueError: `overlap` is not below half of `size`, so that three windows could meet.
    """
    if not 0 <= 2 * overlap < size:
        raise ValueError(f"an overlap of {overlap} tokens needs windows of more than {2 * overlap}; they have {size}")
    ends = [0, *accumulate(lengths)]
    windows: list[Window] = []
    start, count = 0, len(lengths)
    while start < count:
        stop = max(start + 1, _last(ends, start, size))
        windows.append((start, stop))
        if stop == count:
            break
        begin = max(_first(ends, stop, overlap), *(end for _, end in windows[-2:-1]), 0)  # three never meet
        start = begin if begin > start and _last(ends, begin, size) > stop else stop
    return windows


def _last(ends: Sequence[int], start: int, size: int) -> int:
    """One past the last sentence such that those from `start` on have at most `size` tokens."""
    stop = start
    while stop < len(ends) - 1 and ends[stop + 1] - ends[start] <= size:
        stop += 1
    return stop


def _first(ends: Sequence[int], stop: int, size: int) -> int:
    """The first sentence such that those up to `stop` have at most `size` tokens."""
    start = stop
    while start > 0 and ends[stop] - ends[start - 1] <= size:
        start -= 1
    return start


def merge(windows: Sequence[Window], found: Sequence[Sequence[Block]]) -> list[Block]:
    """Returns the blocks of all windows that are kept.

    Within an overlap two windows have a say. The place where the one hands over to the other is chosen so that it lies
    within as few blocks as possible; then as near to the middle as possible. Blocks that it does lie within are left
    out. The same replies always give the same outline.

    Args:
        windows: as `cut_windows` made them.
        found: the blocks of each, properly nested and within it; numbers count from the first sentence of the trace.
    """
    places = [0]
    for (one, other), (before, after) in zip(pairwise(windows), pairwise(found), strict=True):
        places.append(_handover(other[0], one[1], before, after))
    places += [stop for _, stop in windows[-1:]]
    return [
        block
        for (low, high), blocks in zip(pairwise(places), found, strict=True)
        for block in blocks
        if low <= block.start and block.stop <= high
    ]


def _handover(low: int, high: int, before: Sequence[Block], after: Sequence[Block]) -> int:
    """The place, from `low` to `high`, up to which the first of two windows is believed."""

    def cost(place: int) -> tuple[int, float, int]:
        crossed = sum(block.start < place < block.stop for block in (*before, *after))
        return crossed, abs(place - (low + high) / 2), place

    return min(range(low, high + 1), key=cost)
