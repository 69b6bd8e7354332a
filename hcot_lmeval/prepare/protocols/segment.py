"""Protocol `segment`: a teacher is shown numbered sentences and says where blocks are.

    protocol = Segment(Asking(load_prompt("segment"), teacher), SegmenterOptions())
    tasks = protocol.tasks(row, pieces)                       # one for each window
    outline = protocol.read(replies, pieces)                  # replies in the order of the tasks

The teacher only names numbers, and solutions where the text has none; so the words of a trace cannot change.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from hcot_lmeval.prepare.outline import KINDS, Block, Outline, OutlineError
from hcot_lmeval.prepare.protocols.asking import (
    NUMBER,
    TEXT,
    Asking,
    closed,
    many,
    maybe,
    numbered,
    one_of,
    require_good,
)
from hcot_lmeval.prepare.protocols.windows import Window, merge
from hcot_lmeval.prepare.rows import SourceRow
from hcot_lmeval.prepare.segmenter import SegmenterOptions
from hcot_lmeval.prepare.teacher.questions import Reply, Task, Unusable

STATED = {"solution_from": maybe(NUMBER), "solution": maybe(TEXT)}
BLOCK = closed({"start": NUMBER, "end": NUMBER, "kind": one_of(*KINDS), **STATED})
SCHEMA = closed({"blocks": many(BLOCK)})
TOLD = ("max_depth", "target_tokens", "min_tokens", "max_tokens")
"""Options of the blocks that the teacher is told."""


@dataclass(frozen=True)
class Segment:
    """The protocol.

    Attributes:
        asking: the words and the teacher.
        blocks: how long blocks are to be, and how deep.
    """

    asking: Asking
    blocks: SegmenterOptions = field(default_factory=SegmenterOptions)

    @property
    def made_by(self) -> dict[str, Any]:
        told = {name: getattr(self.blocks, name) for name in TOLD}
        return {**self.asking.made_by, "options": {**told, **asdict(self.asking.options)}}

    def tasks(self, row: SourceRow, pieces: Sequence[str]) -> list[Task]:
        """Returns the questions about a row, one for each window."""
        return [self._task(row, pieces, window) for window in self.asking.windows(pieces)]

    def _task(self, row: SourceRow, pieces: Sequence[str], window: Window) -> Task:
        return self.asking.task(
            row.id,
            SCHEMA,
            partial(self._accept, window=window),
            {name: getattr(self.blocks, name) for name in TOLD},
            {
                "question": row.question.strip(),
                "first": window[0],
                "last": window[1] - 1,
                "count": len(pieces),
                "sentences": numbered(pieces, window),
            },
            share=0.2,
        )

    def _accept(self, reply: Reply, window: Window) -> tuple[Block, ...]:
        try:
            blocks = [_block(each) for each in reply.data["blocks"]]
            outline = Outline(window[1], tuple(blocks))
            outline.require_depth(self.blocks.max_depth)
        except OutlineError as error:
            raise Unusable(error.code, error.detail) from None
        require_inside(blocks, window)
        return outline.blocks

    def read(self, replies: Sequence[Reply], pieces: Sequence[str]) -> Outline:
        """Returns the outline that the replies amount to.

        Args:
            replies: to the questions about all windows, in their order.
            pieces: the sentences.

        Raises:
            Unusable: one of the replies is of no use.
        """
        windows = self.asking.windows(pieces)
        for reply, window in zip(replies, windows, strict=True):
            require_good(reply, window, len(windows))
        found = [self._accept(reply, window) for reply, window in zip(replies, windows, strict=True)]
        return Outline(len(pieces), tuple(merge(windows, found)))


def require_inside(blocks: Sequence[Block], window: Window) -> None:
    """Raises an `Unusable` for a block over sentences that were not shown."""
    for block in blocks:
        if block.start < window[0] or block.stop > window[1]:
            raise Unusable("out_of_range", f"{block}; shown were {window[0]} to {window[1] - 1}")


def _block(data: Mapping[str, Any]) -> Block:
    solution = (data["solution"] or "").strip() or None
    return Block(data["start"], data["end"] + 1, solution, data["solution_from"], data["kind"])
