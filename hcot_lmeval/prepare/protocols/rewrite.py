"""Protocol `rewrite`: a teacher writes the trace out again, with markers; then every word is compared.

    protocol = Rewrite(Asking(load_prompt("rewrite"), teacher), get_markup("hcot"))
    tasks = protocol.tasks(row, pieces)
    trace = protocol.read(replies, pieces)

Nothing but the comparison keeps the words; `segment` cannot change them and costs a fraction. A long trace is rewritten
part by part, and no block reaches from one part into the next.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.measure import block_sizes, cut, faults_of, is_legal, make_counter
from hcot_lmeval.prepare.protocols.asking import Asking, require_good
from hcot_lmeval.prepare.protocols.windows import Window, cut_windows
from hcot_lmeval.prepare.rows import SourceRow
from hcot_lmeval.prepare.segmenter import count_tokens
from hcot_lmeval.prepare.teacher.questions import Reply, Task, Unusable
from hcot_lmeval.prepare.words import compare

SHOWN = 5
"""Changed words that a message names."""


@dataclass(frozen=True)
class Rewrite:
    """The protocol.

    Attributes:
        asking: the words and the teacher.
        markup: the notation that the teacher writes.
        max_depth: blocks within each other.
        max_changed: share of the words that may be changed; never a number or formula.
    """

    asking: Asking
    markup: Markup
    max_depth: int = 2
    max_changed: float = 0.01

    @property
    def made_by(self) -> dict[str, Any]:
        told = {"markup": self.markup.name, "max_depth": self.max_depth, "max_changed": self.max_changed}
        return {**self.asking.made_by, "options": {**told, **asdict(self.asking.options)}}

    def windows(self, pieces: Sequence[str]) -> list[Window]:
        """Returns the parts of a trace that get a question each; a part fits twice into a reply."""
        size = min(self.asking.options.window_tokens, self.asking.teacher.output_tokens // 2)
        return cut_windows([count_tokens(piece) for piece in pieces], size, 0)

    def tasks(self, row: SourceRow, pieces: Sequence[str]) -> list[Task]:
        """Returns the questions about a row, one for each part."""
        windows = self.windows(pieces)
        return [self._task(row, pieces, windows, part) for part in range(len(windows))]

    def _task(self, row: SourceRow, pieces: Sequence[str], windows: Sequence[Window], part: int) -> Task:
        text = "".join(pieces[slice(*windows[part])])
        marks = {"open": self.markup.open, "split": self.markup.split + (self.markup.lead or "")}
        return self.asking.task(
            row.id,
            None,
            partial(self._accept, text=text),
            {**marks, "close": self.markup.close, "max_depth": self._depth},
            {"question": row.question.strip(), "part": part + 1, "parts": len(windows), "text": text.strip()},
            share=0.8,
        )

    @property
    def _depth(self) -> int:
        return self.max_depth if self.markup.nested else 1

    def _accept(self, reply: Reply, text: str) -> str:
        """Returns the rewriting with the space around it that the text has."""
        stretches = cut(reply.text.strip(), self.markup, make_counter(None))
        if not is_legal(stretches, self.markup):
            raise Unusable("malformed", ", ".join(faults_of(stretches, self.markup)) or "a marker at a wrong place")
        if (depth := max((size.depth for size in block_sizes(stretches, self.markup)), default=0)) > self._depth:
            raise Unusable("too_deep", f"blocks have depth {depth}, allowed is {self._depth}")
        changes = compare(text, stretches, self.markup)
        if changes.formulas:
            raise Unusable("formulas_differ", f"these are lost or new: {' '.join(changes.formulas[:SHOWN])}")
        if changes.share > self.max_changed:
            told = f"lost: {' '.join(changes.lost[:SHOWN])}; new: {' '.join(changes.added[:SHOWN])}"
            raise Unusable("words_differ", f"{changes.share:.1%} of {changes.words} words, {told}")
        begin = len(text) - len(text.lstrip())
        return text[:begin] + reply.text.strip() + text[len(text.rstrip()) :]

    def read(self, replies: Sequence[Reply], pieces: Sequence[str]) -> str:
        """Returns the trace.

        Args:
            replies: to the questions about all parts, in their order.
            pieces: the sentences.

        Raises:
            Unusable: one of the replies is of no use.
        """
        windows = self.windows(pieces)
        for reply, window in zip(replies, windows, strict=True):
            require_good(reply, window, len(windows))
        texts = ("".join(pieces[slice(*window)]) for window in windows)
        return "".join(self._accept(reply, text) for reply, text in zip(replies, texts, strict=True))
