"""Protocol `refine`: a teacher says which further sentences are dead ends or redundant; they become blocks.

    protocol = Refine(Asking(load_prompt("refine"), teacher))
    tasks = protocol.tasks(row)                               # a PreparedRow that came from an outline
    outline = protocol.read(replies, row)                     # the old blocks, and new ones of the kind "backtrack"

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from hcot_lmeval.prepare.outline import Block, Outline, OutlineError
from hcot_lmeval.prepare.protocols.asking import NUMBER, TEXT, Asking, closed, many, numbered, require_good
from hcot_lmeval.prepare.protocols.segment import require_inside
from hcot_lmeval.prepare.protocols.windows import Window, merge
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.prepare.teacher.questions import Reply, Task, Unusable

SCHEMA = closed({"backtracks": many(closed({"start": NUMBER, "end": NUMBER, "solution": TEXT}))})


@dataclass(frozen=True)
class Refine:
    """The protocol.

    Attributes:
        asking: the words and the teacher.
        max_depth: blocks within each other, old ones and new ones.
    """

    asking: Asking
    max_depth: int = 3

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.asking.made_by, "options": {"max_depth": self.max_depth, **asdict(self.asking.options)}}

    def tasks(self, row: PreparedRow) -> list[Task]:
        """Returns the questions about a row, one for each window; none for a row that has no outline."""
        if row.outline is None or row.pieces is None:
            return []
        return [self._task(row, row.outline, row.pieces, window) for window in self.asking.windows(row.pieces)]

    def _task(self, row: PreparedRow, outline: Outline, pieces: Sequence[str], window: Window) -> Task:
        return self.asking.task(
            row.source.id,
            SCHEMA,
            partial(self._accept, outline=outline, window=window),
            {"max_depth": self.max_depth},
            {
                "question": row.source.question.strip(),
                "first": window[0],
                "last": window[1] - 1,
                "count": len(pieces),
                "sentences": numbered(pieces, window),
                "blocks": _listed(outline, window),
            },
            share=0.05,
        )

    def _accept(self, reply: Reply, outline: Outline, window: Window) -> list[Block]:
        try:
            blocks = [_block(each) for each in reply.data["backtracks"]]
            require_inside(blocks, window)
            self._added(outline, blocks)
        except OutlineError as error:
            raise Unusable(error.code, error.detail) from None
        return blocks

    def _added(self, outline: Outline, blocks: Sequence[Block]) -> Outline:
        known = {(block.start, block.stop) for block in outline.blocks}
        for block in blocks:
            if (block.start, block.stop) in known:
                raise OutlineError("overlap", f"{block} is there already")
            known.add((block.start, block.stop))
        added = Outline(outline.sentences, (*outline.blocks, *blocks))
        added.require_depth(max(self.max_depth, outline.depth))
        return added

    def read(self, replies: Sequence[Reply], row: PreparedRow) -> Outline:
        """Returns the outline with the new blocks.

        Args:
            replies: to the questions about all windows, in their order.
            row: the row.

        Raises:
            Unusable: one of the replies is of no use, or the row has no outline.
        """
        outline, pieces = row.outline, row.pieces
        if outline is None or pieces is None:
            raise Unusable("no_outline", f"it was made by {row.made_by.get('method', 'others')}")
        windows = self.asking.windows(pieces)
        for reply, window in zip(replies, windows, strict=True):
            require_good(reply, window, len(windows))
        found = [self._accept(reply, outline, window) for reply, window in zip(replies, windows, strict=True)]
        try:
            return self._added(outline, merge(windows, found))
        except OutlineError as error:
            raise Unusable(error.code, error.detail) from None


def _listed(outline: Outline, window: Window) -> str:
    """The blocks that reach into a window, those of it that are cut off included."""
    lines = []
    for block in outline.blocks:
        if block.start < window[1] and block.stop > window[0]:
            thought = block.thought
            stated = "" if block.split is None else f"; {block.split} to {block.stop - 1}"
            lines.append(f"{thought.start} to {thought.stop - 1}{stated}")
    return "\n".join(lines) or "none"


def _block(data: Mapping[str, Any]) -> Block:
    return Block(data["start"], data["end"] + 1, data["solution"].strip(), kind="backtrack")
