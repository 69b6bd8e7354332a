"""The note taker: everything that happened to every request of a run, in one JSONL file.

A header line with the schema comes first, then one line for each finished request, flushed at once. `read_notes` reads
the file back. This module imports the standard library alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from hcot_lmeval.events import EVENTS, Event, Prune, Statistics, statistics

SCHEMA = "hcot-notes/1"


@dataclass(frozen=True)
class Note:
    """Everything about one finished request.

    Attributes:
        request: its id.
        sample: which of the request's samples this is, from 0.
        prompt_ids: the prompt.
        token_ids: every generated token.
        events: what happened, in order.
        meta: what the caller attached (task, document, seed, ...).
    """

    request: str
    sample: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    events: tuple[Event, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def statistics(self) -> Statistics:
        return statistics(self.events)


class NoteTaker:
    """Writes the notes of one run to a JSONL file.

    Args:
        path: file to append to; it is created with its folders, and gets a header line when it is new or empty.
        decode: maps token ids to text, to store what was pruned in readable form too; None stores ids alone.
        run: facts about the run for the header (model, policy, versions, ...).

    Attributes:
        is_new: whether nothing had been noted there.

    Raises:
        ValueError: the file exists and is not a file of notes of this schema.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        decode: Callable[[Sequence[int]], str] | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.decode = decode
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = _first_line(self.path)
        if header is not None and header.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.path} does not begin with a header of {SCHEMA!r}; name another file or move this one"
            )
        self.is_new = header is None
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        if header is None:
            self._write({"schema": SCHEMA, "run": run or {}})
        elif not _ends_with_newline(self.path):  # the last writer was killed within a line
            self._file.write("\n")

    def add(self, note: Note) -> None:
        """Appends one finished request and flushes."""
        self._write(
            {
                "request": note.request,
                "sample": note.sample,
                "meta": note.meta,
                "prompt_ids": note.prompt_ids,
                "token_ids": note.token_ids,
                **self._texts(note),
                "events": [_event_to_json(event, self.decode) for event in note.events],
                "statistics": note.statistics.as_dict(),
            }
        )

    def close(self) -> None:
        """Closes the file; adding to a closed note taker is an error."""
        self._file.close()

    def __enter__(self) -> NoteTaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _texts(self, note: Note) -> dict[str, str]:
        if self.decode is None:
            return {}
        return {"prompt": self.decode(note.prompt_ids), "text": self.decode(note.token_ids)}

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


class NotesFile:
    """A file of notes opened for reading.

    Args:
        path: the file. A torn last line, left by a run that was killed, is skipped.

    Attributes:
        run: the facts in the header.

    Raises:
        ValueError: the file is not a file of notes of this schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header = _first_line(self.path)
        if header is None or header.get("schema") != SCHEMA:
            raise ValueError(f"{self.path} is not a file of notes: its first line should hold schema {SCHEMA!r}")
        self.run: dict[str, Any] = header["run"]

    def __iter__(self) -> Iterator[Note]:
        with self.path.open(encoding="utf-8", errors="replace") as lines:  # a torn line may end within a character
            next(lines)
            for line in lines:
                record = _parse(line)
                if record is not None and "request" in record:
                    yield _note_from_json(record)


def read_notes(path: str | os.PathLike[str]) -> list[Note]:
    """Reads all notes of a file.

    Raises:
        ValueError: the file is not a file of notes of this schema.
    """
    return list(NotesFile(path))


def _event_to_json(event: Event, decode: Callable[[Sequence[int]], str] | None) -> dict[str, Any]:
    record = {"type": type(event).__name__, **asdict(event)}
    if decode is not None and isinstance(event, Prune):
        record["pruned_text"] = decode(event.pruned)
    return record


def _event_from_json(record: dict[str, Any]) -> Event:
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k not in ("type", "pruned_text")
    }
    return EVENTS[record["type"]](**fields)


def _note_from_json(record: dict[str, Any]) -> Note:
    return Note(
        request=record["request"],
        sample=record["sample"],
        prompt_ids=tuple(record["prompt_ids"]),
        token_ids=tuple(record["token_ids"]),
        events=tuple(_event_from_json(event) for event in record["events"]),
        meta=record["meta"],
    )


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _first_line(path: Path) -> dict[str, Any] | None:
    """Returns the parsed first line, {} if it cannot be parsed, None if there is none."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open(encoding="utf-8", errors="replace") as lines:
        return _parse(next(lines)) or {}


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
