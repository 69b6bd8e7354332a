"""Protocol `judge`: a teacher says of each block whether its solution suffices for what follows.

    protocol = Judge(Asking(load_prompt("judge"), teacher), get_markup("hcot"))
    tasks = protocol.tasks(row)                               # a PreparedRow
    verdicts = protocol.read(replies, row)

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.measure import TEXT as WORDS
from hcot_lmeval.prepare.measure import Stretch, cut, is_legal, make_counter
from hcot_lmeval.prepare.protocols.asking import FLAG, NUMBER, TEXT, Asking, closed, many, require_good
from hcot_lmeval.prepare.protocols.windows import cut_windows
from hcot_lmeval.prepare.rows import PreparedRow
from hcot_lmeval.prepare.teacher.questions import Reply, Task, Unusable

SCHEMA = closed({"verdicts": many(closed({"block": NUMBER, "sufficient": FLAG, "reason": TEXT}))})


class Verdict(NamedTuple):
    """What the judge says of a block.

    Attributes:
        block: its number, in the order of opening.
        sufficient: whether its solution suffices.
        reason: why.
    """

    block: int
    sufficient: bool
    reason: str


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
    """The protocol.

    Attributes:
        asking: the words and the teacher.
        markup: the notation of the traces.
    """

    asking: Asking
    markup: Markup

    @property
    def made_by(self) -> dict[str, Any]:
        return {**self.asking.made_by, "options": asdict(self.asking.options)}

    def tasks(self, row: PreparedRow) -> list[Task]:
        """Returns the questions about a row; none where it has no blocks, or is malformed."""
        return [self._task(row, *each) for each in self._questions(row)]

    def _questions(self, row: PreparedRow) -> list[tuple[str, str, str, tuple[int, ...]]]:
        """Where it stands, the text with the blocks to be judged, what follows it, and their numbers."""
        found = list(parts(cut(row.trace, self.markup, make_counter(None)), self.markup))
        windows = cut_windows([part.tokens for part in found], self.asking.options.window_tokens, 0)
        made = []
        for number, (start, stop) in enumerate(windows):
            blocks = tuple(block for part in found[start:stop] for block in part.blocks)
            where = f", part {number + 1} of {len(windows)}" if len(windows) > 1 else ""
            text = "".join(part.text for part in found[start:stop])
            if blocks:
                made.append((where, text, self._following(found[stop:], row), blocks))
        return made

    def _following(self, rest: Sequence[Part], row: PreparedRow) -> str:
        """The beginning of what follows, which shows what is used later."""
        text, tokens = "", 0
        for part in rest:
            tokens += part.tokens
            if tokens > max(self.asking.options.overlap_tokens, rest[0].tokens):
                break
            text += part.text
        else:
            text += f"\n\nThe response:\n{row.source.response.strip()}" if row.source.response.strip() else ""
        return f"\nWhat follows, for your information:\n{text.strip()}\n" if text.strip() else ""

    def _task(self, row: PreparedRow, where: str, text: str, following: str, blocks: tuple[int, ...]) -> Task:
        return self.asking.task(
            row.source.id,
            SCHEMA,
            partial(_accept, blocks=blocks),
            {},
            {
                "question": row.source.question.strip(),
                "where": where,
                "text": text.strip(),
                "following": following,
                "blocks": ", ".join(map(str, blocks)),
            },
            share=0.15,
        )

    def read(self, replies: Sequence[Reply], row: PreparedRow) -> list[Verdict]:
        """Returns a verdict for each block, in the order of opening.

        Args:
            replies: to the questions about all parts, in their order.
            row: the row.

        Raises:
            Unusable: one of the replies is of no use.
        """
        found: list[Verdict] = []
        for reply, (_, _, _, blocks) in zip(replies, self._questions(row), strict=True):
            require_good(reply, (0, 0), 1)
            found += _accept(reply, blocks)
        return found


def _accept(reply: Reply, blocks: tuple[int, ...]) -> list[Verdict]:
    verdicts = sorted(Verdict(each["block"], each["sufficient"], each["reason"]) for each in reply.data["verdicts"])
    if (said := tuple(verdict.block for verdict in verdicts)) != blocks:
        raise Unusable("blocks_differ", f"there are verdicts for {said}; asked for were {blocks}")
    return verdicts


def parts(trace: Sequence[Stretch], markup: Markup) -> Iterator[Part]:
    """Yields the parts of a well-formed trace in their order; of any other one nothing."""
    if not is_legal(trace, markup):
        return
    part, open_, count = Part(), list[int](), 0
    for mark, text, tokens in trace:
        part.tokens += tokens
        if mark == markup.open:
            open_.append(count)
            part.blocks.append(count)
            part.text += f"<block {count}>"
            count += 1
        elif mark == markup.split:
            part.text += f"<solution {open_[-1]}>"
        elif mark == markup.close:
            part.text += f"</block {open_.pop()}>"
        elif mark == WORDS:
            part.text += text
        if not open_:
            yield part
            part = Part()
