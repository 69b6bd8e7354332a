"""Protocol `segment`: a teacher is shown numbered sentences and says where blocks are.

The teacher only names numbers, and solutions where the text has none; so the words of a trace cannot change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.outline import Block, Outline, OutlineError, assemble
from hcot_lmeval.prepare.protocols.asking import Asking, Window, merge, numbered, require_inside, values
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.prepare.segmenter import SegmenterOptions
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.spelled import spelled_markers
from hcot_lmeval.prepare.teacher.questions import Form, Reply, Task, Unusable


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
        refuse_marks(row, self.markup)
        pieces = split_sentences(row.reasoning)
        return [self._task(row, pieces, window) for window in self.asking.windows(pieces)]

    def _task(self, row: SourceRow, pieces: Sequence[str], window: Window) -> Task:
        accept = partial(self._accept, window=window)
        user = {"question": row.question.strip(), **numbered(pieces, window)}
        return self.asking.task(BlocksForm, accept, self._prompted, user, share=0.2)

    def _accept(self, form: BlocksForm, window: Window) -> tuple[Block, ...]:
        try:
            outline = Outline(window[1], tuple(_block(each) for each in form.blocks))
            outline.require_depth(self.blocks.max_depth)
        except OutlineError as error:
            raise Unusable(error.code, error.detail) from None
        require_inside(outline.blocks, window)
        return outline.blocks

    def entry(self, row: SourceRow, replies: Sequence[Reply]) -> dict[str, Any]:
        pieces = tuple(split_sentences(row.reasoning))
        windows = self.asking.windows(pieces)
        outline = Outline(len(pieces), tuple(merge(windows, values(replies, windows))))
        return {"row": PreparedRow(row, assemble(pieces, outline, self.markup), outline, pieces, self.made_by).record()}


def refuse_marks(row: SourceRow, markup: Markup) -> None:
    """Raises an `Unusable` for a row that spells a marker anywhere."""
    if found := spelled_markers("\n".join((row.question, row.reasoning, row.response)), markup):
        raise Unusable("marker_in_source", f"{', '.join(found)} in question, reasoning or response")


def _block(form: BlockForm) -> Block:
    solution = (form.solution or "").strip() or None
    return Block(form.start, form.end + 1, solution, form.solution_from, form.kind)
