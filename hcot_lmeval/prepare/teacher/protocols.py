"""What a teacher is asked about a row, and what is made of its replies: the protocols `segment` and `refine`.

    segment   a teacher is shown numbered sentences and says where blocks are
    refine    it says which further sentences are dead ends or redundant; they become blocks of the kind "backtrack"

The teacher only names numbers, and solutions where the text has none; so the words of a trace cannot change. A protocol
gives the `questions` about a row and makes the `entry` of the journal from the replies, in their order. A long trace
goes in windows.

The words are text files, ``prompts/NAME.md``: a line ``version: N``, then a section for each part of the conversation,
which begins with ``# name``. ``{{name}}`` is replaced by a value, once: what values hold is left alone. A changed
question needs a higher version, which is part of the key of every task and of `made_by` of every row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib.resources import files
from itertools import chain
from typing import Any, Literal, Protocol

from pydantic import Field

from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.prepare.outline import Block, Outline, assemble, spelled_markers
from hcot_lmeval.prepare.reasons import TEMPORARY, Refused
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.prepare.segmenter import SegmenterOptions, count_tokens
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.questions import Form, Message, Reply, Task
from hcot_lmeval.settings import MarkupName, Section

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
            Refused: the row is not worth a question, for it would be rejected whatever the reply.
        """
        ...

    def entry(self, row: Any, replies: Sequence[Reply]) -> dict[str, Any]:
        """Returns the entry of the journal.

        Raises:
            Refused: a reply is of no use, or the replies together make no outline.
        """
        ...


class AskingOptions(Section, title="questions"):
    """How questions are put together."""

    window_tokens: int = Field(8000, ge=1, description="tokens of a trace that go into one question, about")
    ask_again: bool = Field(True, description="tell the teacher the fault of a reply and ask once more")


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
        return cut_windows(lengths, self.options.window_tokens)

    def task(
        self,
        form: type[Form],
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
    """Raises a `Refused` for a block over sentences that were not shown."""
    for block in blocks:
        if block.start < window[0] or block.stop > window[1]:
            raise Refused("out_of_range", f"{block}; shown were {window[0]} to {window[1] - 1}")


def values(replies: Sequence[Reply], windows: Sequence[Window]) -> list[Any]:
    """Returns what was made of the replies to the questions about some windows.

    Raises:
        Refused: one of them is of no use; the message says about which sentences.
    """
    for reply, (start, stop) in zip(replies, windows, strict=True):
        if reply.failure is not None:
            where = f" (sentences {start} to {stop - 1})" if len(windows) > 1 else ""
            raise Refused(reply.failure.code, reply.failure.detail + where)
    return [reply.value for reply in replies]


def cut_windows(lengths: Sequence[int], size: int) -> list[Window]:
    """Cuts sentences of so many tokens each into windows of at most `size`; a longer sentence is one by itself."""
    windows: list[Window] = []
    start, tokens = 0, 0
    for number, length in enumerate(lengths):
        if number > start and tokens + length > size:
            windows.append((start, number))
            start, tokens = number, 0
        tokens += length
    return [*windows, (start, len(lengths))] if lengths else []


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
    return parse_prompt(name, files("hcot_lmeval.prepare.teacher").joinpath(f"prompts/{name}.md").read_text("utf-8"))


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


# --- segment ----------------------------------------------------------------------------------------------------------


class BlockForm(Form):
    """A run of sentences that form a block."""

    start: int
    end: int
    kind: Literal["subproblem", "backtrack"]
    solution_from: int | None
    solution: str | None


class BlocksForm(Form):
    """The blocks of a chain of thought."""

    blocks: list[BlockForm]


PROMPTED = ("max_depth", "target_tokens", "min_tokens", "max_tokens")
"""Options of the blocks that the teacher is told."""


@dataclass(frozen=True)
class Segment:
    """The protocol; a row is a `SourceRow`."""

    asking: Asking
    markup: Markup
    blocks: SegmenterOptions = field(default_factory=SegmenterOptions)

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.asking.made_by(**self._prompted), "markup": self.markup.name}

    @property
    def _prompted(self) -> dict[str, Any]:
        return {name: getattr(self.blocks, name) for name in PROMPTED}

    def questions(self, row: SourceRow) -> list[Task]:
        """Returns the questions about a row, one for each window."""
        if found := spelled_markers("\n".join((row.question, row.reasoning, row.response)), self.markup):
            raise Refused("marker_in_source", f"{', '.join(found)} in question, reasoning or response")
        pieces = split_sentences(row.reasoning)
        return [self._task(row, pieces, window) for window in self.asking.windows(pieces)]

    def _task(self, row: SourceRow, pieces: Sequence[str], window: Window) -> Task:
        accept = partial(self._accept, window=window)
        user = {"question": row.question.strip(), **numbered(pieces, window)}
        return self.asking.task(BlocksForm, accept, self._prompted, user, share=0.2)

    def _accept(self, form: BlocksForm, window: Window) -> tuple[Block, ...]:
        outline = Outline(window[1], tuple(_block(each) for each in form.blocks))
        outline.require_depth(self.blocks.max_depth)
        require_inside(outline.blocks, window)
        return outline.blocks

    def entry(self, row: SourceRow, replies: Sequence[Reply]) -> dict[str, Any]:
        pieces = tuple(split_sentences(row.reasoning))
        windows = self.asking.windows(pieces)
        outline = Outline(len(pieces), tuple(chain.from_iterable(values(replies, windows))))
        return {"row": PreparedRow(row, assemble(pieces, outline, self.markup), outline, pieces, self.made_by).record()}


def _block(form: BlockForm) -> Block:
    solution = (form.solution or "").strip() or None
    return Block(form.start, form.end + 1, solution, form.solution_from, form.kind)


# --- refine -----------------------------------------------------------------------------------------------------------


class BacktrackForm(Form):
    """A run of sentences that is a dead end or redundant."""

    start: int
    end: int
    solution: str


class BacktracksForm(Form):
    """The dead ends and redundant branches of a chain of thought."""

    backtracks: list[BacktrackForm]


class RefineOptions(Section, title="blocks"):
    """What may become of blocks."""

    markup: MarkupName = "hcot"
    max_depth: int = Field(3, description="blocks within each other, old and new")


@dataclass(frozen=True)
class Refine:
    """The protocol; a row is a `PreparedRow`, and one without an outline gets no question."""

    asking: Asking
    options: RefineOptions = field(default_factory=RefineOptions)

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self._prompted, "markup": self.options.markup}

    @property
    def _prompted(self) -> dict[str, Any]:
        return self.asking.made_by(max_depth=self.options.max_depth)

    def questions(self, row: PreparedRow) -> list[Task]:
        """Returns the questions about a row, one for each window."""
        if row.outline is None or row.pieces is None:
            return []
        return [self._task(row, row.outline, row.pieces, window) for window in self.asking.windows(row.pieces)]

    def _task(self, row: PreparedRow, outline: Outline, pieces: Sequence[str], window: Window) -> Task:
        accept = partial(self._accept, outline=outline, window=window)
        user = {"question": row.source.question.strip(), **numbered(pieces, window), "blocks": _listed(outline, window)}
        system = {"max_depth": self.options.max_depth}
        return self.asking.task(BacktracksForm, accept, system, user, share=0.05)

    def _accept(self, form: BacktracksForm, outline: Outline, window: Window) -> list[Block]:
        blocks = [Block(b.start, b.end + 1, b.solution.strip(), kind="backtrack") for b in form.backtracks]
        require_inside(blocks, window)
        self._added(outline, blocks)
        return blocks

    def _added(self, outline: Outline, blocks: Sequence[Block]) -> Outline:
        spans = {(block.start, block.stop) for block in outline.blocks}
        for block in blocks:
            if (block.start, block.stop) in spans:
                raise Refused("overlap", f"{block} is there already")
            spans.add((block.start, block.stop))
        added = Outline(outline.sentences, (*outline.blocks, *blocks))
        added.require_depth(max(self.options.max_depth, outline.depth))
        return added

    def entry(self, row: PreparedRow, replies: Sequence[Reply]) -> dict[str, Any]:
        try:
            outline, pieces = self._refined(row, replies)
        except Refused as error:
            if error.code in TEMPORARY:
                raise
            failure = {"code": error.code, "detail": error.detail}
            return {"row": self._remembered(row, failure=failure).record(), "remark": error.code}
        added = len(outline.blocks) - len(row.outline.blocks if row.outline else ())
        trace = assemble(pieces, outline, get_markup(self.options.markup))
        return {"row": self._remembered(replace(row, trace=trace, outline=outline), added=added).record()}

    def _refined(self, row: PreparedRow, replies: Sequence[Reply]) -> tuple[Outline, Sequence[str]]:
        if row.outline is None or row.pieces is None:
            raise Refused("no_outline", f"it was made by {row.made_by.get('method', 'others')}")
        windows = self.asking.windows(row.pieces)
        return self._added(row.outline, list(chain.from_iterable(values(replies, windows)))), row.pieces

    def _remembered(self, row: PreparedRow, **more: Any) -> PreparedRow:
        return replace(row, made_by={**row.made_by, "refined": {**self._prompted, **more}})


def _listed(outline: Outline, window: Window) -> str:
    """The blocks that reach into a window, those of it that are cut off included."""
    lines = []
    for block in outline.blocks:
        if block.start < window[1] and block.stop > window[0]:
            thought = block.thought
            stated = "" if block.split is None else f"; {block.split} to {block.stop - 1}"
            lines.append(f"{thought.start} to {thought.stop - 1}{stated}")
    return "\n".join(lines) or "none"
