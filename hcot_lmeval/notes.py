"""The note taker: everything that happened to every request of a run, in one JSONL file (`hcot_lmeval.store`).

    {"schema": "hcot-notes/2", "run": {...}}       the header, with facts about the run
    {"request": "aime24/0/0/0", ...}               one line for each finished request

`NotesFile` reads it back. What a reader of a trace needs is written down with it: which tokens a prune threw away, by
their indices, and where in the text each token begins at which something happened, so that no tokenizer is needed.
This module imports the standard library alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from hcot_lmeval.events import EVENTS, Event, Fault, Marker, Prefill, Prune, Statistics, Tokens, statistics
from hcot_lmeval.store import JsonLines, StoreError, check_schema, scan
from hcot_lmeval.trace import Malformed

SCHEMA = "hcot-notes/2"

SAME = ("request", "sample", "meta", "prompt_ids")
"""What two notes of one request have in common."""

Decode = Callable[[Sequence[int]], str]


def spelled(ids: Sequence[int]) -> str:
    """Returns token ids as text, for want of a tokenizer."""
    return "".join(f"{token} " for token in ids)


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
        prompt: text of the prompt, and
        text: of what was generated; in a note that was read.
        offsets: index in the trace of a generated token -> where it begins in `text`; of every token that is a marker
            or a fault, or the first or last of those that a prune threw away, and of those behind them.
    """

    request: str
    sample: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    events: tuple[Event, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    prompt: str = field(default="", compare=False)
    text: str = field(default="", compare=False)
    offsets: Mapping[int, int] = field(default_factory=dict, compare=False)

    @property
    def statistics(self) -> Statistics:
        return statistics(self.events)


class NoteTaker:
    """Writes the notes of one run to a JSONL file; each is kept once `add` returns, whatever happens to the process.

    Args:
        path: file to append to; it is created with its folders, and gets a header line when it is new or empty.
        decode: maps token ids to text; None writes the ids.
        run: facts about the run for the header (model, policy, versions, ...).

    Attributes:
        is_new: whether nothing had been noted there.

    Raises:
        StoreError: the file exists and is not a file of notes of this schema.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        decode: Decode | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.decode = decode or spelled
        self._store = JsonLines(path, header={"schema": SCHEMA, "run": run or {}}, durable=False)
        self.path, self.is_new = self._store.path, self._store.is_new

    def add(self, note: Note) -> None:
        """Appends one finished request."""
        offsets = text_offsets(note.token_ids, len(note.prompt_ids), note.events, self.decode)
        self._store.append(
            {
                "request": note.request,
                "sample": note.sample,
                "meta": note.meta,
                "prompt_ids": note.prompt_ids,
                "token_ids": note.token_ids,
                "prompt": self.decode(note.prompt_ids),
                "text": self.decode(note.token_ids),
                "offsets": sorted(offsets.items()),
                "events": [self._event(event, (*note.prompt_ids, *note.token_ids)) for event in note.events],
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

    def _event(self, event: Event, trace: Sequence[int]) -> dict[str, Any]:
        record = {"type": type(event).__name__, **asdict(event)}
        if isinstance(event, Prune):
            record["pruned_text"] = self.decode([trace[index] for index in event.pruned])
        return record


def text_offsets(ids: Sequence[int], first: int, events: Sequence[Event], decode: Decode) -> dict[int, int]:
    """Returns `Note.offsets`.

    Args:
        ids: the generated tokens.
        first: index in the trace of the first of them.
        events: what happened.
        decode: maps token ids to text.
    """
    borders = {0, len(ids)}
    for event in events:
        if isinstance(event, (Tokens, Marker, Fault)):
            begin = event.index - first
            borders |= {begin} if isinstance(event, Tokens) else {begin, begin + 1}
        if isinstance(event, Prune):
            pruned = set(event.pruned)
            borders |= {i - first for i in pruned if i - 1 not in pruned}
            borders |= {i + 1 - first for i in pruned if i + 1 not in pruned}
    offsets: dict[int, int] = {}
    place, before, most = 0, ids[:0], len(decode(ids))
    for start, stop in pairwise(sorted(i for i in borders if 0 <= i <= len(ids))):
        offsets[first + start] = min(place, most)
        # behind the tokens before it, for at the beginning of a text some tokenizers write a token otherwise
        place += len(decode([*before, *ids[start:stop]])) - len(decode(before))
        before = ids[start:stop]
    return offsets


class NotesFile:
    """A file of notes opened for reading, one note at a time.

    Args:
        path: the file. A torn line, left by a run that was killed, is skipped.

    Attributes:
        run: the facts in the header.

    Raises:
        StoreError: the file is not a file of notes of this schema, or a line is no note.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        run = check_schema(self.path, SCHEMA).get("run")
        if not isinstance(run, dict):
            raise StoreError(f"{self.path} tells no run in its first line ({run!r:.40}); was the file changed?")
        self.run: dict[str, Any] = run

    def __iter__(self) -> Iterator[Note]:
        for _, record in self.records():
            yield self.note(record)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the place and the content of every line but headers."""
        for place, record in scan(self.path, damaged=True):  # as two runs leave it that wrote at once
            if "schema" not in record:
                yield place, record

    def note(self, record: dict[str, Any]) -> Note:
        """Returns the note in a line.

        Raises:
            StoreError: it is none, or contradicts itself.
        """
        try:
            note = _note(record)
            check_note(note)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            name = str(record.get("request", "a line"))
            fault = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise StoreError(f"{self.path}: {name} is no note: {fault}; was the file changed?") from error
        return note


class RunNotes:
    """The notes of one run, whose ranks have a file each, with every request once.

    A run that was started again may have written a request a second time; the last one counts, as it does in the
    results. The same request has the same id, prompt and meta; without meta, as in chats, every note is one of its own.

    Args:
        paths: the files.

    Attributes:
        repeated: notes that are left out since the request stands there again.

    Raises:
        StoreError: as `NotesFile`.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._files = [NotesFile(path) for path in paths]
        keys = {
            (file.path, place): json.dumps(
                [record.get(key) for key in SAME] if record.get("meta") else [str(file.path), place]
            )
            for file in self._files
            for place, record in file.records()
        }
        self._taken = {key: where for where, key in keys.items()}
        self.repeated = len(keys) - len(self._taken)

    def __iter__(self) -> Iterator[Note]:
        taken = set(self._taken.values())
        for file in self._files:
            for place, record in file.records():
                if (file.path, place) in taken:
                    yield file.note(record)


def read_notes(path: str | os.PathLike[str]) -> list[Note]:
    """Reads all notes of a file.

    Raises:
        StoreError: the file is not a file of notes of this schema, or a line is no note.
    """
    return list(NotesFile(path))


def check_note(note: Note) -> None:
    """Refuses a note that contradicts itself, as after a change by hand: what it tells would be drawn all the same.

    Raises:
        ValueError: the events are not those of its tokens, one after the other; a prune throws away what is not there;
            or its text has no such places.
    """
    if not all(isinstance(text, str) for text in (note.request, note.prompt, note.text)):
        raise ValueError("request, prompt and text have to be texts")
    if not isinstance(note.meta, dict) or not isinstance(note.meta.get("repeat", note.sample), int):
        raise ValueError("meta has to be an object, and repeat and sample numbers")
    _check_events(note)
    _ = note.statistics  # what they count has to be there
    places = [place for _, place in sorted(note.offsets.items())]
    if places != sorted(places) or not all(0 <= place <= len(note.text) for place in places):
        raise ValueError("its offsets are no places of its text, in order")


def _check_events(note: Note) -> None:
    first, tokens, gone = len(note.prompt_ids), note.token_ids, set[int]()
    if not note.events or not isinstance(start := note.events[0], Prefill):
        raise ValueError("its events do not begin with the prompt")
    if start.tokens != first or not 0 <= start.live <= first:
        raise ValueError(f"a prompt of {first} tokens was read as {start}")
    count, live = 0, start.live
    for event in note.events:
        if isinstance(event, (Tokens, Marker, Fault)) and event.index != first + count:
            raise ValueError(f"an event at token {event.index} comes where that at {first + count} belongs")
        if isinstance(event, Fault) and event.kind not in set(Malformed):
            raise ValueError(f"{event.kind!r} is no fault")
        if isinstance(event, (Tokens, Marker)):
            ids = event.ids if isinstance(event, Tokens) else (event.id,)
            if ids != tokens[count : count + len(ids)]:
                raise ValueError(f"the event at token {event.index} tells of other tokens")
            count, live = count + len(ids), live + len(ids)
        if isinstance(event, Marker) and event.depth < 0:
            raise ValueError(f"{event.depth} blocks are open at token {event.index}")
        if isinstance(event, Prune):
            lost, live = set(event.pruned), live - len(event.pruned)
            known = len(lost) == len(event.pruned) and not lost & gone
            if not known or event.live != live or not all(0 <= index <= event.index for index in lost):
                raise ValueError(f"the prune at token {event.index} throws away tokens that are not there")
            gone |= lost
    if count != len(tokens):
        raise ValueError(f"its events tell of {count} tokens, and there are {len(tokens)}")


def _note(record: dict[str, Any]) -> Note:
    return Note(
        request=record["request"],
        sample=record["sample"],
        prompt_ids=tuple(record["prompt_ids"]),
        token_ids=tuple(record["token_ids"]),
        events=tuple(map(_event, record["events"])),
        meta=record["meta"],
        prompt=record["prompt"],
        text=record["text"],
        offsets=dict(record["offsets"]),
    )


def _event(record: dict[str, Any]) -> Event:
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k not in ("type", "pruned_text")
    }
    return EVENTS[record["type"]](**fields)
