"""Protocol `rewrite`: a teacher writes the trace out again, with markers; then every word is compared.

Nothing but the comparison keeps the words; `segment` cannot change them and costs a fraction. A long trace is rewritten
part by part, and no block reaches from one part into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import Field

from hcot_lmeval.markup import Markup
from hcot_lmeval.prepare.measure import block_sizes, cut, faults_of, is_legal, make_counter
from hcot_lmeval.prepare.protocols.asking import Asking, Window, cut_windows, values
from hcot_lmeval.prepare.protocols.segment import refuse_marks
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow
from hcot_lmeval.prepare.segmenter import count_tokens
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.teacher.questions import Reply, Task, Unusable
from hcot_lmeval.prepare.words import compare
from hcot_lmeval.settings import Section

SHOWN = 5
"""Changed words that a message names."""


class RewriteOptions(Section, title="rewriting"):
    """Whether the teacher writes the traces out, which costs more and has to be compared word by word."""

    rewrite: bool = Field(False, description="let the teacher write traces out in place of numbers")
    rewrite_changed: float = Field(0.01, ge=0, lt=1, description="share of the words that may change then")


@dataclass(frozen=True)
class Rewrite:
    """The protocol; a row is a `SourceRow`.

    Attributes:
        max_changed: share of the words that may be changed; never a number or formula.
    """

    asking: Asking
    markup: Markup
    max_depth: int = 2
    max_changed: float = 0.01

    @property
    def made_by(self) -> dict[str, Any]:
        options = {"markup": self.markup.name, "max_depth": self.max_depth, "max_changed": self.max_changed}
        return {**self.asking.made_by(**options), "markup": self.markup.name}

    def windows(self, pieces: Sequence[str]) -> list[Window]:
        """Returns the parts of a trace that get a question each; a part fits twice into a reply."""
        size = min(self.asking.options.window_tokens, self.asking.teacher.output_tokens // 2)
        return cut_windows([count_tokens(piece) for piece in pieces], size, 0)

    def questions(self, row: SourceRow) -> list[Task]:
        """Returns the questions about a row, one for each part."""
        refuse_marks(row, self.markup)
        pieces = split_sentences(row.reasoning)
        windows = self.windows(pieces)
        return [self._task(row, "".join(pieces[slice(*w)]), n, len(windows)) for n, w in enumerate(windows, 1)]

    def _task(self, row: SourceRow, text: str, part: int, parts: int) -> Task:
        markup = self.markup
        marks = {"open": markup.open, "split": markup.split + (markup.lead or ""), "close": markup.close}
        user = {"question": row.question.strip(), "part": part, "parts": parts, "text": text.strip()}
        accept = partial(self._accept, text=text)
        return self.asking.task(None, accept, {**marks, "max_depth": self._depth}, user, share=0.8)

    @property
    def _depth(self) -> int:
        return self.max_depth if self.markup.nested else 1

    def _accept(self, written: str, text: str) -> str:
        """Returns the rewriting with the space around it that the text has."""
        stretches = cut(written.strip(), self.markup, make_counter(None))
        if not is_legal(stretches, self.markup):
            raise Unusable("malformed", ", ".join(faults_of(stretches, self.markup)) or "a marker at a wrong place")
        if (depth := max((size.depth for size in block_sizes(stretches, self.markup)), default=0)) > self._depth:
            raise Unusable("too_deep", f"blocks have depth {depth}, allowed is {self._depth}")
        changes = compare(text, stretches, self.markup)
        if changes.formulas:
            raise Unusable("formulas_differ", f"these are lost or new: {' '.join(changes.formulas[:SHOWN])}")
        if changes.share > self.max_changed:
            changed = f"lost: {' '.join(changes.lost[:SHOWN])}; new: {' '.join(changes.added[:SHOWN])}"
            raise Unusable("words_differ", f"{changes.share:.1%} of {changes.words} words, {changed}")
        begin = len(text) - len(text.lstrip())
        return text[:begin] + written.strip() + text[len(text.rstrip()) :]

    def entry(self, row: SourceRow, replies: Sequence[Reply]) -> dict[str, Any]:
        parts = values(replies, self.windows(split_sentences(row.reasoning)))
        return {"row": PreparedRow(row, "".join(parts), made_by=self.made_by).record()}
