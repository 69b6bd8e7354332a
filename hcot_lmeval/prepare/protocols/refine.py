"""Protocol `refine`: a teacher says which further sentences are dead ends or redundant; they become blocks.

The old blocks stay, and the new ones are of the kind "backtrack". A row whose reply is of no use stays as it was, and
says so in its `made_by`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import Field

from hcot_lmeval.markup import get_markup
from hcot_lmeval.prepare.outline import Block, Outline, OutlineError, assemble
from hcot_lmeval.prepare.protocols.asking import Asking, Window, merge, numbered, require_inside, values
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.prepare.teacher.questions import TEMPORARY, Form, Reply, Task, Unusable
from hcot_lmeval.settings import MarkupName, Section


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
        try:
            blocks = [Block(b.start, b.end + 1, b.solution.strip(), kind="backtrack") for b in form.backtracks]
            require_inside(blocks, window)
            self._added(outline, blocks)
        except OutlineError as error:
            raise Unusable(error.code, error.detail) from None
        return blocks

    def _added(self, outline: Outline, blocks: Sequence[Block]) -> Outline:
        spans = {(block.start, block.stop) for block in outline.blocks}
        for block in blocks:
            if (block.start, block.stop) in spans:
                raise OutlineError("overlap", f"{block} is there already")
            spans.add((block.start, block.stop))
        added = Outline(outline.sentences, (*outline.blocks, *blocks))
        added.require_depth(max(self.options.max_depth, outline.depth))
        return added

    def entry(self, row: PreparedRow, replies: Sequence[Reply]) -> dict[str, Any]:
        try:
            outline, pieces = self._refined(row, replies)
        except (Unusable, OutlineError) as error:
            if error.code in TEMPORARY:
                raise
            failure = {"code": error.code, "detail": error.detail}
            return {"row": self._remembered(row, failure=failure).record(), "remark": error.code}
        added = len(outline.blocks) - len(row.outline.blocks if row.outline else ())
        trace = assemble(pieces, outline, get_markup(self.options.markup))
        return {"row": self._remembered(replace(row, trace=trace, outline=outline), added=added).record()}

    def _refined(self, row: PreparedRow, replies: Sequence[Reply]) -> tuple[Outline, Sequence[str]]:
        if row.outline is None or row.pieces is None:
            raise Unusable("no_outline", f"it was made by {row.made_by.get('method', 'others')}")
        windows = self.asking.windows(row.pieces)
        return self._added(row.outline, merge(windows, values(replies, windows))), row.pieces

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
