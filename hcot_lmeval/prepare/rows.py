"""A row before and after: a question with a flat chain of thought, and the same with blocks.

    for row in read_rows(find_inputs(["traces.jsonl"])):     # SourceRow, or Unreadable where it holds none

Data sets are recognised by the names of their columns; `ROLES` lists them, the preferred first. Three forms are read:

    question, text                   text holds the thinking section: ``<think>…</think>``, or OpenThoughts' tags
    question, reasoning, response    the thinking section has a column of its own
    messages                         a conversation; the last user's and the last assistant's message count

This module imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from hcot_lmeval.prepare.inputs import Input, Record
from hcot_lmeval.prepare.outline import Outline, OutlineError

ROLES: dict[str, tuple[str, ...]] = {
    "id": ("id", "uuid", "ID", "row_id"),
    "question": ("question", "problem", "prompt", "instruction", "query", "Problem"),
    "text": ("generated_solution", "response", "generation", "output", "completion", "model_output"),
    "reasoning": ("reasoning_content", "reasoning", "thinking", "deepseek_reasoning", "thought"),
    "response": ("response", "deepseek_solution", "final_response", "content"),
    "answer": ("expected_answer", "answer", "final_answer", "ground_truth", "gold", "Answer"),
    "messages": ("messages", "conversations", "conversation"),
}
"""Role -> the names of columns that play it."""

TAGS = (("<think>", "</think>"), ("<|begin_of_thought|>", "<|end_of_thought|>"))
"""What stands around a thinking section."""
SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")
"""What OpenThoughts puts around the response; dropped."""
META_CHARS = 1000
"""Longer strings of columns that play no role are not kept as `SourceRow.meta`."""

READING = {
    "broken_line": "the line is no JSON object",
    "no_column": "the row lacks the columns of a question and a trace",
    "no_question": "the question is missing or blank",
    "no_text": "the trace is missing, blank or no text",
    "no_thinking": "the text has no thinking section",
    "unclosed_thinking": "the thinking section has no end",
    "several_thoughts": "thinking tags come more than once",
    "text_before_thinking": "there is text before the thinking section",
    "empty_thinking": "the thinking section is blank",
    "broken_record": "a column holds something else than prepared rows have there",
}
"""Code of a row that could not be read -> what it means."""


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
            ReadingError: the question or the trace is missing.
            OutlineError: the outline is none.
        """
        record = _decoded(record)
        question, text = (_text(record.get(name)) for name in ("question", "hierarchical_cot"))
        if not (question or "").strip():
            raise ReadingError("no_question", f"question={question!r}")
        if not (text or "").strip():
            raise ReadingError("no_text", f"hierarchical_cot={text!r}")
        trace, response = untagged(text or "")
        original = _text(record.get("original")) or ""
        reasoning = untagged(original)[0]
        answer = _answer(record.get("expected_answer"))
        given = record.get("id")
        source = SourceRow(
            row_id(question or "", text or "") if given is None else str(given),
            question or "",
            reasoning,
            response,
            answer,
            record.get("meta") or {},
        )
        outline, lengths = record.get("outline"), record.get("sentences")
        pieces = None if lengths is None else tuple(reasoning[a:b] for a, b in pairwise(accumulate(lengths, initial=0)))
        return cls(source, trace, Outline.from_json(outline) if outline else None, pieces, record.get("made_by") or {})


class ReadingError(ValueError):
    """A row that cannot be read; `code` is a key of `READING`."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{READING[code]}: {detail}")
        self.code = code
        self.detail = detail


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row that cannot be read.

    Attributes:
        where: the file and line.
        code: a key of `READING`.
        detail: more about it.
        record: the row as it was found; empty for a line that is no JSON object.
    """

    where: str
    code: str
    detail: str
    record: Mapping[str, Any] = field(default_factory=dict)


def tagged(reasoning: str, response: str) -> str:
    """Puts thinking tags around `reasoning` where a response follows."""
    begin, end = TAGS[0]
    return f"{begin}{reasoning}{end}{response}" if response else reasoning


def untagged(text: str) -> tuple[str, str]:
    """The way back from `tagged`; a text without an end of thinking is all reasoning."""
    begin, end = TAGS[0]
    reasoning, found, response = text.partition(end)
    return (reasoning.removeprefix(begin), response) if found else (text.removeprefix(begin), "")


def row_id(question: str, reasoning: str) -> str:
    """Returns a digest to call a row by that has no name."""
    return hashlib.sha256(f"{question}\0{reasoning}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


# --- from columns to rows ---------------------------------------------------------------------------------------------


def read_rows(
    inputs: Iterable[Input], columns: Mapping[str, str] | None = None, limit: int | None = None
) -> Iterator[SourceRow | Unreadable]:
    """Yields the rows of all inputs, one at a time.

    Args:
        inputs: see `prepare.inputs.find_inputs`.
        columns: role -> name of the column, where `ROLES` does not know it.
        limit: stop behind so many rows.

    Raises:
        ValueError: a role is unknown, or the first row of an input lacks the columns.
    """
    given = tuple(sorted(check_roles(columns or {}).items()))
    for record in limited(inputs, limit):
        first, record_ = record
        try:
            yield read_row(record_, given)
        except ReadingError as error:
            if error.code == "no_column" and first:
                raise ValueError(f"{record_.where}: {error.detail}") from None
            yield Unreadable(record_.where, error.code, error.detail, record_.data or {})


def read_prepared(inputs: Iterable[Input], limit: int | None = None) -> Iterator[PreparedRow | Unreadable]:
    """Yields the rows of all inputs that have a hierarchical_cot already.

    Raises:
        ValueError: the first row of an input lacks question or hierarchical_cot.
    """
    for first, record in limited(inputs, limit):
        data = record.data
        if data is None:
            yield Unreadable(record.where, "broken_line", repr(record.line))
            continue
        if first and not {"question", "hierarchical_cot"} <= data.keys():
            raise ValueError(
                f"{record.where}: prepared rows have the columns question and hierarchical_cot; present: "
                f"{', '.join(data)}. Flat traces go through `segment` first."
            )
        try:
            yield PreparedRow.from_record(data)
        except (ReadingError, OutlineError) as error:
            yield Unreadable(record.where, error.code, error.detail, data)
        except (TypeError, ValueError, AttributeError) as error:
            yield Unreadable(record.where, "broken_record", f"{type(error).__name__}: {error}", data)


def limited(inputs: Iterable[Input], limit: int | None = None) -> Iterator[tuple[bool, Record]]:
    """Yields the records of all inputs, each with whether it is the first of its input."""
    number = 0
    for each in inputs:
        for place, record in enumerate(each.records()):
            if limit is not None and number >= limit:
                return
            number += 1
            yield place == 0, record


def check_roles(columns: Mapping[str, str]) -> Mapping[str, str]:
    """Returns `columns`.

    Raises:
        ValueError: a role is unknown.
    """
    unknown = sorted(columns.keys() - ROLES.keys())
    if unknown:
        raise ValueError(f"--column {unknown[0]}=...: the role {unknown[0]!r} is unknown; known are {', '.join(ROLES)}")
    return columns


def read_row(record: Record, columns: tuple[tuple[str, str], ...] = ()) -> SourceRow:
    """Reads a record.

    Raises:
        ReadingError: with the code of what is wrong with it.
    """
    data = record.data
    if data is None:
        raise ReadingError("broken_line", f"{record.line!r}")
    names = resolve_columns(tuple(data), columns)
    question, text = _question_and_text(data, names)
    if not (question or "").strip():
        raise ReadingError("no_question", f"{question!r}")
    if "reasoning" in names and _text(data[names["reasoning"]]):
        reasoning, response = str(data[names["reasoning"]]), _text(data.get(names.get("response", ""))) or ""
        _refuse_tags(reasoning, response)
    elif not isinstance(text, str) or not text.strip():
        raise ReadingError("no_text", f"{text!r}"[:200])
    else:
        reasoning, response = split_thinking(text)
    if not reasoning.strip():
        raise ReadingError("empty_thinking", f"the text begins {(text or response)[:60]!r}")
    given = data.get(names["id"]) if "id" in names else None
    return SourceRow(
        row_id(question or "", reasoning) if given is None else str(given),
        question or "",
        reasoning,
        response,
        _answer(data.get(names.get("answer", ""))),
        _meta(data, set(names.values())),
    )


def split_thinking(text: str) -> tuple[str, str]:
    """Returns what stands in the thinking section of a text, and what follows it.

    A section without its beginning counts, for many chat templates write the beginning into the prompt.

    Raises:
        ReadingError: there is none, it has no end, or several begin.
    """
    for begin, end in TAGS:
        if begin not in text and end not in text:
            continue
        before, _, rest = text.partition(begin) if begin in text else ("", "", text)
        if before.strip():
            raise ReadingError("text_before_thinking", f"{before.strip()[:60]!r}")
        reasoning, closed, response = rest.partition(end)
        if not closed:
            raise ReadingError("unclosed_thinking", f"{begin} without {end} in {len(text)} characters")
        _refuse_tags(reasoning, response)
        return reasoning, _without_solution_tags(response)
    raise ReadingError("no_thinking", f"neither {TAGS[0][0]} nor {TAGS[1][0]} in {text[:60]!r}")


def _refuse_tags(*texts: str) -> None:
    for tag in (tag for pair in TAGS for tag in pair):
        if any(tag in text for text in texts):
            raise ReadingError("several_thoughts", f"{tag} comes within or behind the thinking section")


def _without_solution_tags(response: str) -> str:
    begin, end = SOLUTION_TAGS
    inner = response.strip()
    if inner.startswith(begin) and inner.endswith(end):
        return "\n\n" + inner.removeprefix(begin).removesuffix(end).strip()
    return response


@lru_cache(maxsize=1024)
def resolve_columns(present: tuple[str, ...], columns: tuple[tuple[str, str], ...] = ()) -> dict[str, str]:
    """Returns role -> column for a record with these columns.

    Args:
        present: the columns of the record.
        columns: pairs of role and column that come before the usual names.

    Raises:
        ReadingError: ``no_column``; the message names those present and those wanted.
    """
    given = dict(columns)
    absent = [f"{role}={name}" for role, name in given.items() if name not in present and role not in ("id", "answer")]
    names = {role: name for role, name in given.items() if name in present}
    for role, usual in ROLES.items():
        found = [name for name in usual if name in present and name not in names.values()]
        if role not in given and found:
            names[role] = found[0]
    _settle(names, given, present)
    if absent or not ("messages" in names or {"question", "text"} <= names.keys() or "reasoning" in names):
        wrong = f"there is no column for {', '.join(absent)}" if absent else "no columns of a question and a trace"
        raise ReadingError("no_column", f"{wrong}. Present: {', '.join(present)}. {_WANTED}")
    return names


_WANTED = (
    "Wanted: a question ("
    + ", ".join(ROLES["question"])
    + ") with a text that holds <think>...</think> ("
    + ", ".join(ROLES["text"])
    + ") or with a reasoning of its own ("
    + ", ".join(ROLES["reasoning"])
    + "); or messages ("
    + ", ".join(ROLES["messages"])
    + "). For other names give --column ROLE=NAME, ROLE one of "
    + ", ".join(ROLES)
    + "."
)


def _settle(names: dict[str, str], given: Mapping[str, str], present: tuple[str, ...]) -> None:
    """A row may fit several forms: a column of reasoning is preferred, then messages unless a text was named."""
    if "reasoning" in names:
        if "response" not in names and "text" in names:  # `response` plays the text where there is no reasoning
            names["response"] = names.pop("text")
        if "question" in names and not given.keys() & {"text", "messages"}:
            names.pop("text", None)
            names.pop("messages", None)
    elif "text" in names and "question" in names and "messages" not in given:
        names.pop("messages", None)
    elif "messages" in names and "text" not in given:
        names.pop("text", None)


def _question_and_text(data: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str | None, Any]:
    if "messages" in names:
        question, text = _conversation(data[names["messages"]])
        if "question" in names and (own := _text(data[names["question"]])):
            question = own
        return question, text
    question = data[names["question"]] if "question" in names else None
    if isinstance(question, list):  # some data sets keep the prompt as messages
        question = _last(question, "user")
    return _text(question), data.get(names["text"]) if "text" in names else None


_ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant"}


def _conversation(messages: Any) -> tuple[str | None, str | None]:
    if not isinstance(messages, list):
        return None, None
    return _last(messages, "user"), _last(messages, "assistant")


def _last(messages: list[Any], wanted: str) -> str | None:
    for message in reversed(messages):
        if isinstance(message, Mapping):
            role = message.get("role", message.get("from"))
            if _ROLE_NAMES.get(str(role), role) == wanted:
                return _text(message.get("content", message.get("value")))
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _answer(value: Any) -> str | None:
    return None if value is None else str(value).strip() or None


def _meta(data: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    return {
        key: value
        for key, value in data.items()
        if key not in used
        and isinstance(value, (str, int, float, bool))
        and not (isinstance(value, str) and len(value) > META_CHARS)
    }


_NESTED = ("outline", "sentences", "made_by", "meta")


def _decoded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the columns decoded that parquet keeps as JSON texts."""
    return {
        key: json.loads(value) if key in _NESTED and isinstance(value, str) else value for key, value in record.items()
    }
