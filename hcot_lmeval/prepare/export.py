"""Prepared rows in the form in which they are trained on: JSONL, as columns or as chats.

    columns   id, question, hierarchical_cot, expected_answer
    chat      id, messages (the question, the trace), expected_answer

Training reads both as they are (`hcot_lmeval.training.data.sources`). Rows pass through one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hcot_lmeval.columns import BOXED, surrogate_in
from hcot_lmeval.files import Input
from hcot_lmeval.prepare.rows import THINK, PreparedRow, Unreadable
from hcot_lmeval.settings import Section
from hcot_lmeval.store import replacing, write_json


class ExportOptions(Section, title="export"):
    """What is written."""

    form: Literal["columns", "chat"] = Field("columns", description="a column for each part, or a conversation")
    extras: tuple[Literal["original", "outline", "sentences", "made_by", "meta"], ...] = Field(
        (), description="further columns"
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are written, in their order."""
        main = ("question", "hierarchical_cot") if self.form == "columns" else ("messages",)
        return ("id", *main, "expected_answer", *self.extras)


def exported(row: PreparedRow, options: ExportOptions) -> dict[str, Any]:
    """Returns the record that is written for a row."""
    record = row.record()
    begin, end = THINK
    if options.form == "chat":  # whole: nothing but the message says where the thinking ends, and what the answer is
        answer = BOXED.format(row.source.answer) if row.source.answer else ""
        said = record["hierarchical_cot"] if row.source.response else f"{begin}{row.trace}{end}{answer}"
        record["messages"] = [
            {"role": "user", "content": row.source.question},
            {"role": "assistant", "content": said},
        ]
    return {name: record[name] for name in options.columns}


def export(
    rows: Iterable[PreparedRow | Unreadable],
    path: Path,
    options: ExportOptions,
    tick: Callable[[], Any] = lambda: None,
    inputs: Sequence[Input] = (),
    history: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, list[Unreadable]]:
    """Writes rows as one file, which is there as a whole or not at all, with a manifest beside it.

    Args:
        rows: read as they are needed.
        path: the file.
        options: the form.
        tick: is called after each row.
        inputs: where the rows are from, for the manifest.
        history: manifests of the steps that made them, for the same.

    Returns:
        The number of rows that were written, and those that could not be read.

    Raises:
        ValueError: the path has another suffix than .jsonl, there is no row, or a row cannot be written; the message
            names it.
        OSError: the file cannot be written.
    """
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: rows are written as JSONL; let the name end with .jsonl")
    if any(each.file is not None and path.exists() and path.samefile(each.file) for each in inputs):
        raise ValueError(f"{path} is among what is exported; give another --to")
    count, unread = 0, list[Unreadable]()

    def records() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in rows:
            if isinstance(row, Unreadable):
                unread.append(row)
                continue
            count += 1
            record = exported(row, options)
            if place := surrogate_in(record):
                named = f"row {count} (id {row.source.id!r})"
                raise ValueError(f"{named} cannot be written: half of a character in {place}; leave it out, or mend it")
            yield record
            tick()

    try:
        with replacing(path) as draft:
            with draft.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records())
            if not count:
                why = f"the first is {unread[0].where}: {unread[0].code}" if unread else "the files hold none"
                raise ValueError(f"there is no row to export: {why}")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); give another --to") from None
    identities, arguments = [each.identity() for each in inputs], options.model_dump()
    manifest = {"rows": count, "arguments": arguments, "inputs": identities, "steps": list(history)}
    write_json(path.with_name(f"{path.name}.manifest.json"), manifest)
    return count, unread
