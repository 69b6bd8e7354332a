"""What a teacher is asked in each step: to find blocks, to write them, to find dead ends, to judge solutions.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hcot_lmeval.markup import PRESETS, Markup
from hcot_lmeval.prepare.checking import checked_entry
from hcot_lmeval.prepare.checks import Checker, Fault
from hcot_lmeval.prepare.outline import assemble
from hcot_lmeval.prepare.protocols.judge import Judge
from hcot_lmeval.prepare.protocols.refine import Refine
from hcot_lmeval.prepare.protocols.rewrite import Rewrite
from hcot_lmeval.prepare.protocols.segment import Segment
from hcot_lmeval.prepare.repair import check_and_repair
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow, Unreadable
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.spelled import find_spelled, marks_of
from hcot_lmeval.prepare.steps import refused, unread
from hcot_lmeval.prepare.teacher.questions import TEMPORARY, Reply, Task, Unusable


@dataclass(frozen=True)
class RewriteOptions:
    """Whether the teacher writes the traces out, which costs more and has to be compared word by word."""

    rewrite: bool = field(default=False, metadata={"help": "let the teacher write traces out in place of numbers"})
    rewrite_changed: float = field(default=0.01, metadata={"help": "share of the words that may change then"})

    def __post_init__(self) -> None:
        if not 0 <= self.rewrite_changed < 1:
            raise ValueError(f"rewrite_changed={self.rewrite_changed} is a share; give a number from 0 up to 1")


@dataclass(frozen=True)
class RefineOptions:
    """What may become of blocks."""

    markup: str = field(default="hcot", metadata={"help": "notation of the blocks", "choices": tuple(PRESETS)})
    max_depth: int = field(default=3, metadata={"help": "blocks within each other, old and new"})


@dataclass(frozen=True)
class SegmentLesson:
    """Flat rows get their blocks from the teacher, as numbers of sentences or written out."""

    protocol: Segment | Rewrite
    markup: Markup

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.protocol.made_by, "markup": self.markup.name}

    def questions(self, row: SourceRow | Unreadable) -> list[Task]:
        if isinstance(row, Unreadable) or self._spelled(row):
            return []  # it will be rejected: not worth a question
        return self.protocol.tasks(row, split_sentences(row.reasoning))

    def entry(self, row: SourceRow | Unreadable, replies: Sequence[Reply]) -> dict[str, Any]:
        if isinstance(row, Unreadable):
            return unread(row)
        if mark := self._spelled(row):
            return refused(row, [Fault("marker_in_source", f"{mark} in question, reasoning or response")])
        pieces = tuple(split_sentences(row.reasoning))
        if isinstance(self.protocol, Rewrite):
            made = PreparedRow(row, self.protocol.read(replies, pieces), made_by=self.made_by)
        else:
            outline = self.protocol.read(replies, pieces)
            made = PreparedRow(row, assemble(pieces, outline, self.markup), outline, pieces, self.made_by)
        return {"row": made.record()}

    def _spelled(self, row: SourceRow) -> str | None:
        return find_spelled("\n".join((row.question, row.reasoning, row.response)), marks_of(self.markup))


@dataclass(frozen=True)
class RefineLesson:
    """Rows get further blocks over dead ends. One whose reply is of no use stays as it was, and says so."""

    protocol: Refine
    markup: Markup

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.protocol.made_by, "markup": self.markup.name}

    def questions(self, row: PreparedRow | Unreadable) -> list[Task]:
        return [] if isinstance(row, Unreadable) else self.protocol.tasks(row)

    def entry(self, row: PreparedRow | Unreadable, replies: Sequence[Reply]) -> dict[str, Any]:
        if isinstance(row, Unreadable):
            return unread(row)
        try:
            outline = self.protocol.read(replies, row)
        except Unusable as error:
            if error.code in TEMPORARY:
                raise
            told = {"code": error.code, "detail": error.detail}
            return {"row": self._remembered(row, failure=told).record(), "remark": error.code}
        added = len(outline.blocks) - len(row.outline.blocks if row.outline else ())
        trace = assemble(row.pieces or (), outline, self.markup)
        return {"row": self._remembered(replace(row, trace=trace, outline=outline), added=added).record()}

    def _remembered(self, row: PreparedRow, **more: Any) -> PreparedRow:
        return replace(row, made_by={**row.made_by, "refined": {**self.protocol.made_by, **more}})


@dataclass(frozen=True)
class CheckLesson:
    """Rows that pass all checks are judged; a block whose solution is not enough is opened up, or rejects its row."""

    protocol: Judge
    check: Checker

    @property
    def made_by(self) -> dict[str, Any]:
        return self.protocol.made_by

    def questions(self, row: PreparedRow | Unreadable) -> list[Task]:
        if isinstance(row, Unreadable):
            return []
        mended, faults, _ = check_and_repair(row, self.check)
        return [] if self._grave(faults) else self.protocol.tasks(mended)

    def entry(self, row: PreparedRow | Unreadable, replies: Sequence[Reply]) -> dict[str, Any]:
        if isinstance(row, Unreadable):
            return unread(row)
        mended, faults, repairs = check_and_repair(row, self.check)
        if self._grave(faults):
            return checked_entry(self.check, mended, faults, repairs)
        judged = self._judged(replies, mended)
        again, faults, more = check_and_repair(mended, self.check, judged)
        if more and repairs:
            again = replace(again, made_by={**again.made_by, "repairs": [*repairs, *more]})
        return checked_entry(self.check, again, faults, [*repairs, *more])

    def _grave(self, faults: Sequence[Fault]) -> bool:
        return any(fault.code not in self.check.options.tolerated for fault in faults)

    def _judged(self, replies: Sequence[Reply], row: PreparedRow) -> list[Fault]:
        try:
            verdicts = self.protocol.read(replies, row)
        except Unusable as error:
            if error.code in TEMPORARY:
                raise
            return [Fault("unjudged", f"{error.code}: {error.detail}")]
        return [
            Fault("solution_insufficient", f"block {verdict.block}: {verdict.reason}", verdict.block)
            for verdict in verdicts
            if not verdict.sufficient
        ]
