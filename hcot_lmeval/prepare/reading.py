"""From the columns of data sets to rows.

    for row in read_rows(find_inputs(["traces.jsonl"])):     # SourceRow, or Unreadable where it holds none

Data sets are recognised by the names of their columns (`hcot_lmeval.columns`). Three forms are read:

    question, text                   text holds the thinking section: ``<think>…</think>``, or other models' strings
    question, reasoning, response    the thinking section has a column of its own
    messages                         a conversation: the last assistant's message, and the user's before it

A column may list several traces of one question: each becomes a row, and those that the data set calls wrong do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite
from typing import Any

from hcot_lmeval.columns import (
    OPTIONAL,
    ROLES,
    VERDICTS,
    Said,
    find_columns,
    is_conversation,
    read_content,
    read_message,
    read_verdict,
    speaker,
)
from hcot_lmeval.files import Input, Record
from hcot_lmeval.prepare.reasons import Refused
from hcot_lmeval.prepare.rows import (
    PreparedRow,
    SourceRow,
    Unreadable,
    given_id,
    refuse_surrogates,
    row_id,
    settle_answer,
)
from hcot_lmeval.vocabulary import PAIRS, changes

SOLUTION_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")
"""What OpenThoughts puts around the response; dropped."""
AROUND = {
    "<|channel|>analysis<|message|>": ("", "<|end|><|start|>assistant"),  # gpt-oss
    "<|channel>": ("thought\n", ""),  # Gemma 4
}
"""Beginning of thinking -> what some models write before and behind the words of a section; dropped."""
SWITCHES = frozenset({"on", "off", "none", "low", "medium", "high", *VERDICTS})
"""What a column called ``reasoning`` may say of how a model was asked."""
META_CHARS = 1000
"""Longer strings of columns that play no role are not kept as `SourceRow.meta`."""


def read_rows(
    inputs: Iterable[Input], columns: Mapping[str, str] | None = None, limit: int | None = None
) -> Iterator[SourceRow | Unreadable]:
    """Yields the rows of all inputs, one at a time.

    Args:
        inputs: see `hcot_lmeval.files.find_inputs`.
        columns: role -> name of the column, where `ROLES` does not know it.
        limit: stop behind so many records.

    Raises:
        ValueError: a role is unknown, or the first row of an input lacks the columns.
    """
    given = check_roles(columns or {})
    for first, record in _limited(inputs, limit):
        if first and record.data is not None:
            _check_optional(record.data, record.where, given)
        try:
            yield from [_read(each, given) for each in alternatives(record, given)]
        except Refused as error:
            if error.code == "no_column" and first:
                raise ValueError(f"{record.where}: {error.detail}") from None
            yield Unreadable(record.where, error.code, error.detail, record.data or {})


def _check_optional(data: Mapping[str, Any], where: str, given: Mapping[str, str]) -> None:
    """Raises `ValueError` if a column that was named for an optional role is not in the first row."""
    for role in OPTIONAL & given.keys():
        if given[role] and given[role] not in data:
            raise ValueError(f"{where}: there is no column for {role}={given[role]}. Present: {', '.join(data)}")


def _read(record: Record, columns: Mapping[str, str]) -> SourceRow | Unreadable:
    try:
        return read_row(record, columns)
    except Refused as error:
        return Unreadable(record.where, error.code, error.detail, record.data or {})


def read_prepared(inputs: Iterable[Input], limit: int | None = None) -> Iterator[PreparedRow | Unreadable]:
    """Yields the rows of all inputs that have a hierarchical_cot already.

    Raises:
        ValueError: the first row of an input lacks question or hierarchical_cot.
    """
    for first, record in _limited(inputs, limit):
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
        except Refused as error:
            yield Unreadable(record.where, error.code, error.detail, data)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            yield Unreadable(record.where, "broken_record", f"{type(error).__name__}: {error}", data)


def _limited(inputs: Iterable[Input], limit: int | None = None) -> Iterator[tuple[bool, Record]]:
    """Yields the records of all inputs, each with whether it is the first of its input."""
    found = ((place == 0, record) for each in inputs for place, record in enumerate(each.records()))
    return islice(found, limit)


def check_roles(columns: Mapping[str, str]) -> Mapping[str, str]:
    """Returns `columns`.

    Raises:
        ValueError: a role is unknown.
    """
    unknown = sorted(columns.keys() - ROLES.keys())
    if unknown:
        raise ValueError(f"--column {unknown[0]}=...: the role {unknown[0]!r} is unknown; known are {', '.join(ROLES)}")
    return columns


def alternatives(record: Record, columns: Mapping[str, str] = {}) -> list[Record]:
    """Returns a record for each trace that a record lists: one, where it holds texts.

    Raises:
        Refused: it has no columns, no trace, or as many traces as responses or verdicts are not.
    """
    data = record.data
    if data is None:
        raise Refused("broken_line", f"{record.line!r}")
    names = _columns(data, columns)
    listed = [names[role] for role in ("text", "reasoning", "response") if role in names and _lists(data[names[role]])]
    if not listed:
        return [record]
    listed += [name for name in _verdict_columns(data, names) if data[name] and _lists(data[name])]
    sizes = {name: len(data[name]) for name in listed}
    texts = [role for role in ("reasoning", "response", "text") if role in names and data[names[role]]]
    count = sizes[listed[0]]
    if not count:
        raise Refused("no_text", f"{listed[0]} is empty")
    if len(set(sizes.values())) > 1 or (count > 1 and any(names[role] not in sizes for role in texts)):
        raise Refused("uneven_lists", ", ".join(f"{name}: {size}" for name, size in sizes.items()))
    found = [data | {name: data[name][place] for name in listed} for place in range(count)]
    if count == 1:
        return [Record(record.where, found[0])]
    if name := given_id(data.get(names.get("id", ""))):
        found = [each | {names["id"]: f"{name}-{place}"} for place, each in enumerate(found, 1)]
    return [Record(f"{record.where}, trace {place}", each) for place, each in enumerate(found, 1)]


def _lists(value: Any) -> bool:
    """Whether a value lists texts; parts of a message are one text."""
    return isinstance(value, list) and not any(isinstance(each, Mapping) for each in value)


def _verdict_columns(data: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """The columns that say whether a trace is correct, the first to be asked first."""
    given = [names["verdict"]] if "verdict" in names else []
    return given + [name for name in ROLES["verdict"] if given and name in data and name not in given]


def read_row(record: Record, columns: Mapping[str, str] = {}) -> SourceRow:
    """Reads a record.

    Raises:
        Refused: with the code of what is wrong with it.
    """
    data = record.data
    if data is None:
        raise Refused("broken_line", f"{record.line!r}")
    names = _columns(data, columns)
    refuse_surrogates(data)
    try:
        question, said = _question(data, names), _said(data, names)
    except Refused:
        raise
    except ValueError as error:
        raise Refused("not_text", str(error)) from None
    asked = data.get(names.get("question", ""))
    if question is None and asked is not None and not isinstance(asked, (list, Mapping)):
        raise Refused("not_text", f"the question is {asked!r}")
    if not (question or "").strip():
        raise Refused("no_question", f"{question!r}")
    reasoning, response = _sections(said)
    response, answer = settle_answer(response, data.get(names.get("answer", "")))
    _refuse_tags(reasoning, response)
    if not reasoning.strip():
        raise Refused("empty_thinking", f"the text begins {(said.text or response)[:60]!r}")
    verdicts = ((name, read_verdict(data[name])) for name in _verdict_columns(data, names))
    name, correct = next(((name, found) for name, found in verdicts if found is not None), ("", True))
    if not correct:
        raise Refused("marked_wrong", f"{name}={data[name]!r}")
    return SourceRow(
        given_id(data.get(names.get("id", ""))) or row_id(question or "", reasoning),
        question or "",
        reasoning,
        response,
        answer,
        _meta(data, set(names.values())),
    )


def _question(data: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    value = data[names["question"]] if "question" in names else None
    if is_conversation(value):  # some data sets keep the prompt as messages
        value = _asked(value)
    elif isinstance(value, (list, Mapping)):
        if isinstance(value, list) and len(value) > 1 and all(isinstance(part, str) for part in value):
            raise Refused("not_text", f"a list of {len(value)} texts, where one question is needed")
        value = (read_message(value) if isinstance(value, Mapping) else read_content(value)).text
    if not isinstance(value, str) and "messages" in names:
        messages = data[names["messages"]]
        spoken = [speaker(message) for message in messages] if is_conversation(messages) else []
        answered = len(spoken) - spoken[::-1].index("assistant") if "assistant" in spoken else len(spoken)
        value = _asked(messages[:answered]) if spoken else None
    more = data.get("input") if names.get("question") == "instruction" else None
    if isinstance(value, str) and isinstance(more, str) and more.strip():  # what the instruction is about
        value = f"{value}\n\n{more}"
    return value if isinstance(value, str) else None


def _asked(messages: list[Any]) -> str | None:
    users = [message for message in messages if speaker(message) == "user"]
    if len(users) > 1:  # the last one alone would be another question
        raise Refused("several_turns", f"{len(users)} messages of the user")
    return read_message(users[0]).text if users else None


def _said(data: Mapping[str, Any], names: Mapping[str, str]) -> Said:
    """The reasoning that stands by itself, and the text or response."""
    said = [_read_value(data[names[role]]) for role in ("messages", "text", "response") if role in names]
    beside = _read_value(data[names["reasoning"]]).text if "reasoning" in names else None
    if (beside or "").strip().casefold() in SWITCHES:
        beside = None
    text = next((each.text for each in reversed(said) if (each.text or "").strip()), None)
    return Said(beside or next((each.reasoning for each in said if each.reasoning), ""), text)


def _read_value(value: Any) -> Said:
    if is_conversation(value):
        said = [message for message in value if speaker(message) == "assistant"]
        if len(said) > 1:  # calls of tools, for example: a row holds one
            raise Refused("several_turns", f"{len(said)} messages of the assistant")
        return read_message(said[0]) if said else Said("", None)
    if isinstance(value, Mapping):
        return read_message(value)
    return read_content(value) if isinstance(value, (str, list)) else Said("", None)


def _sections(said: Said) -> tuple[str, str]:
    """The thinking section and what follows it, wherever they stand; said twice is said once."""
    reasoning, text = said.reasoning, said.text or ""
    if reasoning.strip() and _first_pair(reasoning):
        reasoning, rest = split_thinking(reasoning)
        if rest.strip() and text.strip() not in ("", rest.strip()):
            raise Refused("several_thoughts", f"a response within the reasoning: {rest.strip()[:60]!r}")
        text = rest if rest.strip() else text
    if not reasoning.strip():
        if not text.strip():
            raise Refused("no_text", f"{said.text!r:.200}")
        return split_thinking(text)
    if _first_pair(text):
        repeated, rest = split_thinking(text)
        if repeated.strip() in ("", reasoning.strip()):
            return reasoning, rest
    return reasoning, _without_solution_tags(text)


def _first_pair(text: str) -> tuple[str, str] | None:
    """The strings around the thinking section that comes first."""
    found = ((at, pair) for pair in PAIRS for mark in pair if (at := text.find(mark)) >= 0)
    return min(found, default=(0, None))[1]


def split_thinking(text: str) -> tuple[str, str]:
    """Returns what stands in the thinking section of a text, and what follows it, both exactly.

    A section without its beginning counts, for many chat templates write the beginning into the prompt.

    Raises:
        Refused: there is none, it has no end, or several begin.
    """
    pair = _first_pair(text)
    if pair is None:
        raise Refused("no_thinking", f"neither {PAIRS[0][0]} nor what other models write in {text[:60]!r}")
    marks = list(changes(text, pair, opened=False))
    start = marks[0][1] if marks[0][0] else 0
    if before := text[: max(0, start - len(pair[0]))].strip():
        raise Refused("text_before_thinking", f"{before[:60]!r}")
    ends = [at for opens, at in marks if not opens]
    if not ends:
        raise Refused("unclosed_thinking", f"{pair[0]} without {pair[1]} in {len(text)} characters")
    before, behind = AROUND.get(pair[0], ("", ""))
    reasoning = text[start : ends[0] - len(pair[1])].removeprefix(before).removesuffix(behind)
    response = text[ends[0] :]
    _refuse_tags(reasoning, response)
    return reasoning, _without_solution_tags(response)


def _refuse_tags(*texts: str) -> None:
    for tag in (tag for pair in PAIRS for tag in pair):
        if any(tag in text for text in texts):
            raise Refused("several_thoughts", f"{tag} comes within or behind the thinking section")


def _without_solution_tags(response: str) -> str:
    begin, end = SOLUTION_TAGS
    inner = response.strip()
    if inner.startswith(begin) and inner.endswith(end):
        return "\n\n" + inner.removeprefix(begin).removesuffix(end).strip()
    return response


def _columns(data: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Role -> column. Where a table has rows of several forms, those of the others are empty in a row."""
    held = tuple(name for name, value in data.items() if value is not None)
    try:
        return resolve_columns(held, given)
    except Refused:
        return resolve_columns(tuple(data), given)


def resolve_columns(present: Sequence[str], given: Mapping[str, str] = {}) -> dict[str, str]:
    """Returns role -> column for a record with the columns `present`; those of `given` come before the usual names.

    Raises:
        Refused: ``no_column``; the message names those present and those that are needed, or two that could be
            the same one.
    """
    absent = [f"{role}={name}" for role, name in given.items() if name not in present and role not in OPTIONAL]
    names = find_columns(present, given)
    _settle(names, given)
    for role, name in names.items():
        alike = [each for each in present if each.strip().casefold() == name.strip().casefold()]
        if len(alike) > 1 and role not in given:
            which = f"the columns {' and '.join(alike)} differ in case alone"
            raise Refused("no_column", f"{which}; name one of them with --column {role}={name}")
    asked = "question" in names and names.keys() & {"text", "reasoning", "response"}
    if absent or not (asked or "messages" in names):
        wrong = f"there is no column for {', '.join(absent)}" if absent else "no columns of a question and a trace"
        raise Refused("no_column", f"{wrong}. Present: {', '.join(present)}. {_NEEDED}")
    return names


_NEEDED = (
    "Needed: a question ("
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


def _settle(names: dict[str, str], given: Mapping[str, str]) -> None:
    """A row may fit several forms: a column of reasoning is preferred, then messages unless a text was named."""
    if "reasoning" in names:
        if "response" not in names and "text" in names:  # `response` plays the text where there is no reasoning
            names["response"] = names.pop("text")
        if "question" in names and "response" in names and not given.keys() & {"text", "messages"}:
            names.pop("text", None)
            names.pop("messages", None)
        return
    if "text" in names and "question" in names and "messages" not in given:
        names.pop("messages", None)
    elif "messages" in names and "text" not in given:
        names.pop("text", None)
    if names.keys() & {"text", "messages"} and "response" not in given:
        names.pop("response", None)


def _meta(data: Mapping[str, Any], used: set[str]) -> dict[str, Any]:
    """The other columns that hold plain values; no file of JSON could hold a number that is none."""
    return {
        key: value
        for key, value in data.items()
        if key not in used
        and isinstance(value, (str, int, float, bool))
        and not (isinstance(value, str) and len(value) > META_CHARS)
        and not (isinstance(value, float) and not isfinite(value))
    }
