"""From the columns of data sets to rows.

    for row in read_rows(find_inputs(["traces.jsonl"])):     # SourceRow, or Unreadable where it holds none

Data sets are recognised by the names of their columns; `ROLES` lists them, the preferred first. Three forms are read:

    question, text                   text holds the thinking section: ``<think>…</think>``, or OpenThoughts' tags
    question, reasoning, response    the thinking section has a column of its own
    messages                         a conversation; the last user's and the last assistant's message count

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from hcot_lmeval.prepare.inputs import Input, Record
from hcot_lmeval.prepare.outline import OutlineError
from hcot_lmeval.prepare.rows import (
    TAGS,
    PreparedRow,
    ReadingError,
    SourceRow,
    Unreadable,
    answer_or_none,
    row_id,
    text_or_none,
)

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

SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")
"""What OpenThoughts puts around the response; dropped."""
META_CHARS = 1000
"""Longer strings of columns that play no role are not kept as `SourceRow.meta`."""


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
    if "reasoning" in names and text_or_none(data[names["reasoning"]]):
        reasoning, response = str(data[names["reasoning"]]), text_or_none(data.get(names.get("response", ""))) or ""
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
        answer_or_none(data.get(names.get("answer", ""))),
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
        if "question" in names and (own := text_or_none(data[names["question"]])):
            question = own
        return question, text
    question = data[names["question"]] if "question" in names else None
    if isinstance(question, list):  # some data sets keep the prompt as messages
        question = _last(question, "user")
    return text_or_none(question), data.get(names["text"]) if "text" in names else None


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
                return text_or_none(message.get("content", message.get("value")))
    return None


def _meta(data: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    return {
        key: value
        for key, value in data.items()
        if key not in used
        and isinstance(value, (str, int, float, bool))
        and not (isinstance(value, str) and len(value) > META_CHARS)
    }
