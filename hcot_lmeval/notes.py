"""The note taker: what happened during one generation, as typed events, and what can be counted from them.

The engine tells a `Recorder` every step of a row; nothing is summarised away. `Statistics` are derived from the events
alone, so a file of notes can always be counted again. `NoteTaker` writes one JSONL file a run: a header line with the
schema, then one line for each finished request, flushed at once. `read_notes` reads it back.

Times are seconds since the request was admitted to the batch. Indices count tokens of the trace, prompt included.
This module imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

from hcot_lmeval.trace import Kind, Malformed, Step

SCHEMA = "hcot-notes/1"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    time: float


@dataclass(frozen=True, slots=True)
class Prefill(Event):
    """The prompt was read: `tokens` long, `live` of them in the context, `shared` copied from a row that had them."""

    tokens: int
    live: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Tokens(Event):
    """A run of text tokens, the first at `index`; `time` is that of the last one."""

    index: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Open(Event):
    """A block was opened; `depth` blocks are open now."""

    index: int
    depth: int
    id: int


@dataclass(frozen=True, slots=True)
class Split(Event):
    """The thought of the innermost block ended and its solution began."""

    index: int
    depth: int
    id: int


@dataclass(frozen=True, slots=True)
class Close(Event):
    """A block was closed without a prune: the policy is off, or it had no solution."""

    index: int
    depth: int
    id: int


@dataclass(frozen=True, slots=True)
class Prune(Event):
    """A block was closed and its thought thrown away.

    Attributes:
        pruned: the token ids that left the context (the thought, and the markers that do not survive).
        reforwarded: tokens that had been forwarded before and were forwarded again.
        peak: live tokens held at once while this happened.
        live: live tokens afterwards.
    """

    index: int
    depth: int
    id: int
    pruned: tuple[int, ...]
    reforwarded: int
    peak: int
    live: int


@dataclass(frozen=True, slots=True)
class Fault(Event):
    """The token at `index` departs from the notation; `kind` is a `Malformed` value."""

    index: int
    kind: str


@dataclass(frozen=True, slots=True)
class Finish(Event):
    """The row ended. `reason` is eos, stop, length (max_gen_toks) or context (max_context); `stop` is what matched."""

    reason: str
    stop: str | int | None
    unclosed: int


EVENTS: dict[str, type[Event]] = {e.__name__: e for e in (Prefill, Tokens, Open, Split, Close, Prune, Fault, Finish)}


@dataclass(frozen=True)
class Statistics:
    """Counts of one request. The invariant ``prompt + generated - pruned = live`` holds for every one of them.

    Attributes:
        prompt_tokens: tokens of the prompt.
        generated_tokens: every token sampled, pruned later or not, the end token included.
        pruned_tokens: tokens thrown away by prunes.
        reforwarded_tokens: tokens forwarded for a second time, the price of policy recompute.
        live_tokens: live context at the end.
        peak_live_tokens: largest live context, the memory needed.
        live_token_steps: sum over generated tokens of the live context just after each, the area under the saw-tooth.
        prune_events: blocks closed with a prune.
        blocks: blocks closed, with or without a prune.
        max_depth: most blocks open at once.
        malformed: `Malformed` kind to count; kinds that did not occur are absent.
        finish_reason: eos, stop, length or context.
        wall_seconds: from admission to the batch until the end.
        tokens_per_second: generated_tokens / wall_seconds of this row alone; rows run side by side.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    pruned_tokens: int = 0
    reforwarded_tokens: int = 0
    live_tokens: int = 0
    peak_live_tokens: int = 0
    live_token_steps: int = 0
    prune_events: int = 0
    blocks: int = 0
    max_depth: int = 0
    malformed: dict[str, int] = field(default_factory=dict)
    finish_reason: str = ""
    wall_seconds: float = 0.0
    tokens_per_second: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        return asdict(self)


class _Tally:
    """Adds events up, one method per type of event."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.malformed: Counter[str] = Counter()
        self.live = self.peak = self.depth = 0
        self.reason, self.wall = "", 0.0

    def add(self, event: Event) -> None:
        getattr(self, type(event).__name__.lower())(event)

    def _grow(self, tokens: int) -> None:
        self.count["steps"] += tokens * self.live + tokens * (tokens + 1) // 2
        self.count["generated"] += tokens
        self.live += tokens
        self.peak = max(self.peak, self.live)

    def prefill(self, event: Prefill) -> None:
        self.count["prompt"] = event.tokens
        self.count["pruned"] = event.tokens - event.live
        self.live = event.live
        self.peak = max(self.peak, self.live)

    def tokens(self, event: Tokens) -> None:
        self._grow(len(event.ids))

    def open(self, event: Open) -> None:
        self._grow(1)
        self.depth = max(self.depth, event.depth)

    def split(self, event: Split) -> None:
        self._grow(1)

    def close(self, event: Close) -> None:
        self._grow(1)
        self.count["blocks"] += 1

    def prune(self, event: Prune) -> None:
        self.live = event.live
        self.peak = max(self.peak, event.peak)
        self.count.update(blocks=1, prunes=1, generated=1, steps=event.live)
        self.count.update(pruned=len(event.pruned), reforwarded=event.reforwarded)

    def fault(self, event: Fault) -> None:
        self.malformed[event.kind] += 1

    def finish(self, event: Finish) -> None:
        self.reason, self.wall = event.reason, event.time
        if event.unclosed:
            self.malformed[Malformed.UNCLOSED.value] = event.unclosed


def statistics(events: Sequence[Event]) -> Statistics:
    """Counts what happened in one request."""
    tally = _Tally()
    for event in events:
        tally.add(event)
    count = tally.count
    return Statistics(
        prompt_tokens=count["prompt"],
        generated_tokens=count["generated"],
        pruned_tokens=count["pruned"],
        reforwarded_tokens=count["reforwarded"],
        live_tokens=tally.live,
        peak_live_tokens=tally.peak,
        live_token_steps=count["steps"],
        prune_events=count["prunes"],
        blocks=count["blocks"],
        max_depth=tally.depth,
        malformed=dict(tally.malformed),
        finish_reason=tally.reason,
        wall_seconds=tally.wall,
        tokens_per_second=count["generated"] / tally.wall if tally.wall > 0 else 0.0,
    )


class Recorder:
    """Turns the steps of one row into events."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.events: list[Event] = []
        self._clock, self._start = clock, clock()
        self._run: list[int] = []
        self._run_index = 0

    def prefill(self, tokens: int, live: int, shared: int) -> None:
        """The prompt has been read."""
        self.events.append(Prefill(self._now(), tokens, live, shared))

    def step(self, index: int, token: int, step: Step, live: int) -> None:
        """The token at `index` of the trace was generated; afterwards `live` tokens are in the context."""
        if step.malformed is not None:
            self._flush()
            self.events.append(Fault(self._now(), index, step.malformed.value))
        if step.kind is Kind.TEXT:
            if not self._run:
                self._run_index = index
            self._run.append(token)
            return
        self._flush()
        self.events.append(self._marker(index, token, step, live))

    def finish(self, reason: str, stop: str | int | None, unclosed: int) -> None:
        """The row ended with `unclosed` blocks open."""
        self._flush()
        self.events.append(Finish(self._now(), reason, stop, unclosed))

    def _marker(self, index: int, token: int, step: Step, live: int) -> Event:
        now = self._now()
        if step.is_prune:
            again = sum(source < index for source in step.source)
            peak = step.rewind + len(step.forward) if step.drop else live
            return Prune(now, index, step.depth, token, step.pruned, again, peak, live)
        event = {Kind.OPEN: Open, Kind.SPLIT: Split, Kind.CLOSE: Close}[step.kind]
        return event(now, index, step.depth, token)

    def _flush(self) -> None:
        if self._run:
            self.events.append(Tokens(self._now(), self._run_index, tuple(self._run)))
            self._run = []

    def _now(self) -> float:
        return round(self._clock() - self._start, 6)


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

    encoding: ClassVar[str] = "utf-8"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header = _first_line(self.path)
        if header is None or header.get("schema") != SCHEMA:
            raise ValueError(f"{self.path} is not a file of notes: its first line should hold schema {SCHEMA!r}")
        self.run: dict[str, Any] = header["run"]

    def __iter__(self) -> Iterator[Note]:
        with self.path.open(encoding=self.encoding) as lines:
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
    with path.open(encoding="utf-8") as lines:
        return _parse(next(lines)) or {}


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
