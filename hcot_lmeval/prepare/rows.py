r"""A row before and after: a question with a flat chain of thought, and the same with blocks.

    row = SourceRow("7", "2 + 3?", "Two and three make 5.", "\n\nIt is 5.", "5")
    made = PreparedRow(row, "[THOUGHT]Two and three make 5.[SOLUTION]5[RETURN]")
    assert PreparedRow.from_record(made.record()) == made

How rows are found in the columns of data sets is a matter of `prepare.reading`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from hcot_lmeval.columns import is_prose, read_answer, surrogate_in
from hcot_lmeval.prepare.outline import Outline
from hcot_lmeval.prepare.reasons import Refused
from hcot_lmeval.vocabulary import PAIRS

THINK = PAIRS[0]
"""What stands around a thinking section in what is written here."""


@dataclass(frozen=True)
class SourceRow:
    """A question and a flat chain of thought.

    Attributes:
        id: the given one, or a digest of question and reasoning.
        question: the problem.
        reasoning: what stands in the thinking section, exactly, without the tags.
        response: what followed it, exactly.
        answer: the expected answer, if it is known.
        meta: the other columns that hold plain values.
    """

    id: str
    question: str
    reasoning: str
    response: str = ""
    answer: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The row as one text."""
        return tagged(self.reasoning, self.response)

    def record(self) -> dict[str, Any]:
        """Returns JSON values, in the columns of OpenMathReasoning."""
        found = {"id": self.id, "question": self.question, "expected_answer": self.answer}
        return {**found, "generated_solution": self.text, "meta": dict(self.meta)}


@dataclass(frozen=True)
class PreparedRow:
    """A row with blocks.

    Attributes:
        source: the row without; its `reasoning` is empty where nobody knows the original words.
        trace: its reasoning with markers and solutions.
        outline: where the blocks are; None where the trace did not come from one.
        pieces: the sentences that the outline numbers.
        made_by: the method, and all that its result depends on.
    """

    source: SourceRow
    trace: str
    outline: Outline | None = None
    pieces: tuple[str, ...] | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The trace and the response, as a model is to write them."""
        return tagged(self.trace, self.source.response)

    def record(self) -> dict[str, Any]:
        """Returns JSON values; training reads question, hierarchical_cot and expected_answer."""
        source = self.source
        return {
            "id": source.id,
            "question": source.question,
            "hierarchical_cot": self.text,
            "expected_answer": source.answer,
            "original": source.text if source.reasoning else None,
            "outline": None if self.outline is None else self.outline.to_json(),
            "sentences": None if self.pieces is None else [len(piece) for piece in self.pieces],
            "made_by": dict(self.made_by),
            "meta": dict(source.meta),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> PreparedRow:
        """Reads what `record` returned, or a row of any data set that has the columns of training.

        Raises:
            Refused: the question or the trace is missing, or the outline is none.
        """
        record = _decoded(record)
        refuse_surrogates(record)
        question, text = record.get("question"), record.get("hierarchical_cot")
        if not isinstance(question, str) or not question.strip():
            raise Refused("no_question", f"question={question!r:.100}")
        trace, response = untagged(text) if isinstance(text, str) else ("", "")
        if not isinstance(text, str) or not trace.strip():
            raise Refused("no_text", f"hierarchical_cot={text!r:.100}")
        original = record.get("original")
        if not isinstance(original, str | None):
            raise Refused("broken_record", f"original={original!r:.100}")
        reasoning = untagged(original or "")[0]
        response, answer = settle_answer(response, record.get("expected_answer"))
        source = SourceRow(
            given_id(record.get("id")) or row_id(question, text),
            question,
            reasoning,
            response,
            answer,
            _plain(record.get("meta")),
        )
        outline, lengths = record.get("outline"), record.get("sentences")
        pieces = None if lengths is None else tuple(reasoning[a:b] for a, b in pairwise(accumulate(lengths, initial=0)))
        made_by = _plain(record.get("made_by"))
        return cls(source, trace, Outline.from_json(outline) if outline else None, pieces, made_by)


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that cannot be read.

    Attributes:
        where: the file and line.
        code: a key of `reasons.READING`.
        detail: more about it.
        record: the row as it was found; empty for a line that is no JSON object.
    """

    where: str
    code: str
    detail: str
    record: Mapping[str, Any] = field(default_factory=dict)


def tagged(reasoning: str, response: str) -> str:
    """Puts thinking tags around `reasoning` where a response follows."""
    begin, end = THINK
    return f"{begin}{reasoning}{end}{response}" if response else reasoning


def untagged(text: str) -> tuple[str, str]:
    """The way back from `tagged`; a text without an end of thinking is all reasoning."""
    begin, end = THINK
    reasoning, found, response = text.partition(end)
    return (reasoning.removeprefix(begin), response) if found else (text.removeprefix(begin), "")


def row_id(question: str, reasoning: str) -> str:
    """Returns a digest to call a row by that has no name."""
    return hashlib.sha256(f"{question}\0{reasoning}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def given_id(value: Any) -> str | None:
    """Returns the name that a row brings; None for what is none, such as the NaN of an empty cell."""
    return str(value) if isinstance(value, (str, int)) and str(value).strip() else None


def settle_answer(response: str, value: Any) -> tuple[str, str | None]:
    r"""Returns the response and the expected answer, where a data set may call the whole response an answer.

    Whatever is called the answer is trained as ``\boxed{answer}`` where there is no response: a text that states the
    answer becomes the response, and the answer is what it states.

    Raises:
        Refused: the value is no answer.
    """
    try:
        answer = read_answer(value)
    except ValueError as error:
        raise Refused("no_answer", str(error)) from None
    if answer is None or not is_prose(answer):
        return response, answer
    from hcot_lmeval.answers import extract_answer

    stated = extract_answer(answer, fallback="answer" in answer.casefold())
    if not response.strip():
        return f"\n\n{answer}", stated
    return response, stated or answer


def refuse_surrogates(record: Mapping[str, Any]) -> None:
    """Raises a `Refused` where a column holds a lone surrogate: no step would get such a row to training."""
    try:
        place = surrogate_in(record)
    except RecursionError:
        raise Refused("broken_record", "values within values without an end") from None
    if place:
        raise Refused("lone_surrogate", f"in the column {place}")


def _plain(value: Any) -> dict[str, Any]:
    """The values of a mapping as JSON has them; dates and bytes, which parquet has, as texts."""
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{value!r:.100} is no object")
    return dict(json.loads(json.dumps(dict(value or {}), default=str, allow_nan=False)))


_NESTED = ("outline", "sentences", "made_by", "meta")


def _decoded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the columns decoded that parquet keeps as JSON texts."""
    return {
        key: json.loads(value) if key in _NESTED and isinstance(value, str) else value for key, value in record.items()
    }
