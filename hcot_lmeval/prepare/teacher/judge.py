"""Protocol `judge`: a teacher says of each block whether its solution suffices for what follows.

Rows that pass all checks are judged; a block whose solution is not enough is opened up, or rejects its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.checks import Checker, Fault, check_and_repair
from hcot_lmeval.prepare.measure import TEXT, Stretch, cut, is_legal, make_counter, whole_blocks
from hcot_lmeval.prepare.reasons import TEMPORARY, Refused
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.prepare.steps import checked_entry
from hcot_lmeval.prepare.teacher.protocols import Asking, cut_windows
from hcot_lmeval.prepare.teacher.questions import Form, Reply, Task

FOLLOWING = 1000
"""Tokens of what follows a window that are shown beside it, about."""


class VerdictForm(Form):
    """Whether the solution of a block suffices for what follows, and why."""

    block: int
    sufficient: bool
    reason: str


class VerdictsForm(Form):
    """A verdict for each block."""

    verdicts: list[VerdictForm]


@dataclass
class Part:
    """An outermost block, or text between two of them, as it is shown.

    Attributes:
        text: with tags in the place of markers.
        blocks: the numbers of the blocks in it.
        tokens: about how many.
    """

    text: str = ""
    blocks: list[int] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Judge:
    """The protocol; a row is a `PreparedRow`.

    Attributes:
        check: what a row has to pass before it is judged.
    """

    asking: Asking
    check: Checker

    @property
    def made_by(self) -> dict[str, Any]:
        return self.asking.made_by()

    def questions(self, row: PreparedRow) -> list[Task]:
        """Returns the questions about a row; none where it does not pass, or has no blocks."""
        repaired, faults, _ = check_and_repair(row, self.check)
        return [] if self._is_rejected(faults) else self.about(repaired)

    def about(self, row: PreparedRow) -> list[Task]:
        """Returns the questions about a row that has passed."""
        markup, options = self.check.markup, self.asking.options
        found = list(parts(cut(row.trace, markup, make_counter(None)), markup))
        windows = cut_windows([part.tokens for part in found], options.window_tokens)
        tasks = []
        for number, (start, stop) in enumerate(windows, 1):
            where = f", part {number} of {len(windows)}" if len(windows) > 1 else ""
            blocks = tuple(block for part in found[start:stop] for block in part.blocks)
            if blocks:
                tasks.append(self._task(row, where, found[start:stop], found[stop:], blocks))
        return tasks

    def _task(
        self, row: PreparedRow, where: str, shown: Sequence[Part], rest: Sequence[Part], blocks: tuple[int, ...]
    ) -> Task:
        user = {
            "question": row.source.question.strip(),
            "where": where,
            "text": "".join(part.text for part in shown).strip(),
            "following": self._following(rest, row),
            "blocks": ", ".join(map(str, blocks)),
        }
        return self.asking.task(VerdictsForm, partial(_accept, blocks=blocks), {}, user, share=0.15)

    def _following(self, rest: Sequence[Part], row: PreparedRow) -> str:
        """The beginning of what follows, which shows what is used later."""
        text, tokens = "", 0
        for part in rest:
            tokens += part.tokens
            if tokens > max(FOLLOWING, rest[0].tokens):
                break
            text += part.text
        else:
            text += f"\n\nThe response:\n{row.source.response.strip()}" if row.source.response.strip() else ""
        return f"\nWhat follows, for your information:\n{text.strip()}\n" if text.strip() else ""

    def entry(self, row: PreparedRow, replies: Sequence[Reply]) -> dict[str, Any]:
        repaired, faults, repairs = check_and_repair(row, self.check)
        if self._is_rejected(faults):
            return checked_entry(self.check, repaired, faults, repairs)
        again, faults, more = check_and_repair(repaired, self.check, judged(replies))
        if more and repairs:
            again = replace(again, made_by={**again.made_by, "repairs": [*repairs, *more]})
        return checked_entry(self.check, again, faults, [*repairs, *more])

    def _is_rejected(self, faults: Sequence[Fault]) -> bool:
        return any(fault.code not in self.check.options.tolerated for fault in faults)


def judged(replies: Sequence[Reply]) -> list[Fault]:
    """Returns the faults that the judge finds in the blocks of a row.

    Raises:
        Refused: there is no reply yet.
    """
    for failure in (reply.failure for reply in replies if reply.failure):
        if failure.code in TEMPORARY:
            raise Refused(*failure)
        return [Fault("unjudged", f"{failure.code}: {failure.detail}")]
    return [
        Fault("solution_insufficient", f"block {verdict.block}: {verdict.reason}", verdict.block)
        for reply in replies
        for verdict in reply.value
        if not verdict.sufficient
    ]


def _accept(form: VerdictsForm, blocks: tuple[int, ...]) -> list[VerdictForm]:
    verdicts = sorted(form.verdicts, key=lambda verdict: verdict.block)
    if (said := tuple(verdict.block for verdict in verdicts)) != blocks:
        raise Refused("blocks_differ", f"there are verdicts for {said}; asked for were {blocks}")
    return verdicts


def parts(trace: Sequence[Stretch], markup: Markup) -> Iterator[Part]:
    """Yields the parts of a well-formed trace in their order; of any other one nothing."""
    if not is_legal(trace, markup):
        return
    tags: dict[int, str] = {}
    for number, (begin, split, close) in enumerate(blocks := whole_blocks(trace, markup)):
        tags |= {begin: f"<block {number}>", split: f"<solution {number}>", close: f"</block {number}>"}
    numbers, ends = {block.open: number for number, block in enumerate(blocks)}, {block.close for block in blocks}
    part, depth = Part(), 0
    for place, (mark, text, tokens) in enumerate(trace):
        part.text += text if mark == TEXT else tags.get(place, "")
        part.tokens += tokens
        part.blocks += [numbers[place]] if place in numbers else []
        depth += (place in numbers) - (place in ends)
        if not depth:
            yield part
            part = Part()
