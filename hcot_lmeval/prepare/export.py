"""Prepared rows in the form in which they are trained on: JSONL or parquet, as columns or as chats, and on the hub.

    columns   id, question, hierarchical_cot, expected_answer
    chat      id, messages (the question, the trace), expected_answer

Training reads both as they are (`hcot_lmeval.training.data.sources`). Rows pass through one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hcot_lmeval.columns import BOXED, surrogate_in
from hcot_lmeval.files import Input
from hcot_lmeval.prepare.rows import THINK, PreparedRow, Unreadable
from hcot_lmeval.push import upload
from hcot_lmeval.settings import Section
from hcot_lmeval.store import replacing, write_json

BATCH = 256
"""Rows of a row group in parquet files; so many are in memory."""
AS_JSON = ("outline", "sentences", "made_by", "meta")
"""Columns that parquet keeps as JSON texts, since their keys differ from row to row."""
CARD = """\
---
configs: [{{config_name: default, data_files: [{{split: train, path: {file}}}]}}]
---

# {name}

{rows} chains of thought with blocks that are pruned when they end, made with `hcot prepare`. Columns: {columns}.

The steps, with their arguments and the digests of their inputs:

```json
{steps}
```
"""


class ExportOptions(Section, title="export"):
    """What is written, and where to."""

    format: Literal["jsonl", "parquet"] | None = Field(None, description="of the file; by default as its name ends")
    form: Literal["columns", "chat"] = Field("columns", description="a column for each part, or a conversation")
    extras: tuple[Literal["original", "outline", "sentences", "made_by", "meta"], ...] = Field(
        (), description="further columns"
    )
    push: str | None = Field(None, description="data set on the hub (owner/name) to upload to; private unless --public")
    public: bool = Field(False, description="a new data set on the hub can be seen by all")

    @field_validator("push")
    @classmethod
    def _owned(cls, name: str | None) -> str | None:
        if name is not None and [bool(part) for part in name.split("/")] != [True, True]:
            raise ValueError(f"{name!r} is no data set on the hub; give owner/name")
        return name

    @model_validator(mode="after")
    def _public_what(self) -> ExportOptions:
        if self.public and self.push is None:
            raise ValueError("public is of an upload; give push=owner/name too, or leave it out")
        return self

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
        ValueError: the path has another suffix than the format, there is no row, or a row cannot be written; the
            message names it.
        OSError: the file cannot be written.
    """
    if path.suffix not in ((".jsonl", ".parquet") if options.format is None else (f".{options.format}",)):
        ends = ".jsonl or .parquet" if options.format is None else f".{options.format}"
        raise ValueError(f"{path}: let the name of what is exported end with {ends}")
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
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
            write(draft, records(), options.columns)
            if not count:
                why = f"the first is {unread[0].where}: {unread[0].code}" if unread else "the files hold none"
                raise ValueError(f"there is no row to export: {why}")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); give another --to") from None
    identities, arguments = [each.identity() for each in inputs], options.model_dump()
    manifest = {"rows": count, "arguments": arguments, "inputs": identities, "steps": list(history)}
    write_json(path.with_name(f"{path.name}.manifest.json"), manifest)
    return count, unread


def _write_jsonl(path: Path, records: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_parquet(path: Path, records: Iterator[Mapping[str, Any]], columns: Sequence[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    kinds = dict.fromkeys(columns, pyarrow.string())
    if "messages" in kinds:
        kinds["messages"] = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    schema, as_json = pyarrow.schema(kinds), set(AS_JSON) & kinds.keys()
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(records, BATCH)):
            rows = [{**row, **{name: json.dumps(row[name], ensure_ascii=False) for name in as_json}} for row in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def push(path: Path, rows: int, options: ExportOptions, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Uploads an exported file with its manifest and a card.

    Args:
        path: the file.
        rows: how many it has.
        options: with which it was exported, among them `push`, where to.
        history: manifests of the steps that made the rows, for the card.

    Returns:
        The address of the data set.

    Raises:
        ValueError: it failed.
    """
    assert options.push is not None, "there is nowhere to push to"
    keys = ("step", "identity", "versions", "summary")
    steps = json.dumps([{key: manifest[key] for key in keys} for manifest in history], indent=1)
    name, columns = options.push.partition("/")[2], ", ".join(options.columns)
    card = CARD.format(name=name, file=path.name, rows=rows, columns=columns, steps=steps)
    manifest = path.with_name(f"{path.name}.manifest.json")
    files: dict[str, bytes | Path] = {"README.md": card.encode(), path.name: path, manifest.name: manifest}
    return upload(options.push, files, kind="dataset", private=not options.public, message=f"{rows} rows")
