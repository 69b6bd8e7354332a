"""The note taker: everything that happened to every request of a run, in one JSONL file.

A header line with the schema comes first, then one line for each finished request, flushed at once. `read_notes` reads
the file back. This module imports the standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hcot_lmeval.events import EVENTS, Event, Prune, Statistics, statistics
from hcot_lmeval.store import JsonLines, check_schema, scan

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
        StoreError: the file exists and is not a file of notes of this schema.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        decode: Callable[[Sequence[int]], str] | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.decode = decode
        self._store = JsonLines(path, header={"schema": SCHEMA, "run": run or {}}, durable=False)
        self.path, self.is_new = self._store.path, self._store.is_new

    def add(self, note: Note) -> None:
        """Appends one finished request and flushes."""
        self._store.append(
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
        self._store.close()

    def __enter__(self) -> NoteTaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _texts(self, note: Note) -> dict[str, str]:
        if self.decode is None:
            return {}
        return {"prompt": self.decode(note.prompt_ids), "text": self.decode(note.token_ids)}


class NotesFile:
    """A file of notes opened for reading.

    Args:
        path: the file. A torn last line, left by a run that was killed, is skipped.

    Attributes:
        run: the facts in the header.

    Raises:
        StoreError: the file is not a file of notes of this schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.run: dict[str, Any] = check_schema(self.path, SCHEMA)["run"]

    def __iter__(self) -> Iterator[Note]:
        for _, record in scan(self.path, damaged=True):
            if "request" in record:
                yield _note_from_json(record)


def read_notes(path: str | os.PathLike[str]) -> list[Note]:
    """Reads all notes of a file.

    Raises:
        StoreError: the file is not a file of notes of this schema.
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
