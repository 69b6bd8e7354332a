"""A journal of finished requests, so that a run that was killed continues where it was.

A journal is a directory for each *fingerprint*, the digest of everything that determines a run's results. Results made
under another fingerprint lie in another directory and are never looked at. Every process writes a file of its own
(`hcot_lmeval.store`):

    <root>/<fingerprint>/<time>-rank<rank>-<pid>.jsonl
        {"schema": "hcot-journal/1", "fingerprint": "...", "run": {...}}      the header, with the facts in clear
        {"key": "...", ...}                                                   one line for each finished request

and reads those of all others, so ranks and concurrent runs need no locks.

No import of this module is heavy.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from hcot_lmeval.engine import Request
from hcot_lmeval.events import Statistics
from hcot_lmeval.lm.reporting import RunStatistics
from hcot_lmeval.lm.requests import request_key
from hcot_lmeval.notes import Note, NoteTaker
from hcot_lmeval.provenance import digest
from hcot_lmeval.response import Response
from hcot_lmeval.store import JsonLines, first_record, scan

logger = logging.getLogger(__name__)

SCHEMA = "hcot-journal/1"


def default_root() -> Path:
    """Returns where journals are kept: ``$HCOT_LMEVAL_CACHE/journal``, else ``~/.cache/hcot_lmeval/journal``."""
    cache = os.environ.get("HCOT_LMEVAL_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "hcot_lmeval") / "journal"


def first_time(path: Path) -> datetime:
    """Returns the time that a file holds; the first who asks writes the present one into it."""
    if path.exists():
        return datetime.fromisoformat(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(datetime.now().isoformat())
    try:
        os.link(draft, path)  # all of it or nothing, and once
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(draft, path)
    draft.unlink(missing_ok=True)
    return datetime.fromisoformat(path.read_text())


def held_time(root: Path | None, facts: Mapping[str, Any]) -> datetime:
    """Returns what a chat template reads from the clock, in this run and in all that go on with its journal.

    Args:
        root: directory of all journals, or None.
        facts: that tell runs apart.
    """
    now = datetime.now() if root is None else first_time(root / "clocks" / f"{digest(facts)[:16]}.txt")
    logger.warning("the chat template reads the clock, which stands at %s for all prompts of this run", now)
    return now


class Journal:
    """The finished requests of all runs with one fingerprint.

    Args:
        root: directory of all journals; made when the first request is added.
        run: the facts that determine the results, as JSON values; their digest is the fingerprint.
        rank: of this process.

    Attributes:
        fingerprint: hex digest of `run`.
        directory: where the files of this fingerprint lie.
    """

    def __init__(self, root: str | os.PathLike[str], run: Mapping[str, Any], rank: int = 0) -> None:
        self.run = dict(run)
        self.rank = rank
        self.fingerprint = digest(self.run)
        # 64 bits name the directory; the header holds the whole fingerprint and is what counts
        self.directory = Path(root).expanduser() / self.fingerprint[:16]
        self._ours: JsonLines | None = None
        self._places: dict[str, tuple[Path, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes have finished since."""
        for path in sorted(self.directory.glob("*.jsonl")):
            if self._is_of_this_run(path):
                for place, record in scan(path, damaged=True):  # what cannot be read is computed again
                    if isinstance(record.get("key"), str):
                        self._places[record["key"]] = path, place

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the record that was added under `key`, or None."""
        if key not in self._places:
            return None
        path, place = self._places[key]
        with path.open("rb") as file:
            file.seek(place)
            record = json.loads(file.readline())
        del record["key"]
        return record

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Appends a finished request; when this returns, the line survives a SIGKILL and a power cut.

        Raises:
            OSError: the journal's directory cannot be written.
        """
        if self._ours is None:
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            name = f"{stamp}-{time.time_ns() % 10**9:09d}-rank{self.rank}-{os.getpid()}.jsonl"
            header = {"schema": SCHEMA, "fingerprint": self.fingerprint, "run": self.run}
            self._ours = JsonLines(self.directory / name, header=header)
        self._places[key] = self._ours.path, self._ours.append({"key": key, **record})

    def close(self) -> None:
        """Closes the file of this process; the next `add` starts a new one."""
        if self._ours is not None:
            self._ours.close()
            self._ours = None

    def _is_of_this_run(self, path: Path) -> bool:
        header = first_record(path)
        if header is None:  # killed before the header was complete: there is nothing in it
            return False
        if header.get("schema") == SCHEMA and header.get("fingerprint") == self.fingerprint:
            return True
        logger.warning("%s was made by another kind of run and is left alone", path)
        return False


class Notes(NoteTaker):
    """Notes that end no run: where they can no longer be written, it goes on without."""

    _works = True

    def add(self, note: Note) -> None:
        """Appends one finished request and flushes."""
        if not self._works:
            return
        try:
            super().add(note)
        except OSError as error:
            logger.error("notes=%s can no longer be written (%s): the run goes on without", self.path, error.strerror)
            self._works = False


def _check_types(found: Mapping[str, Any]) -> None:
    """Raises `TypeError` if texts are no texts, or counts no numbers."""
    texts = {"answer": found["answer"], "thinking": found["thinking"]}
    if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise TypeError(f"a text as {wrong[0]}")
    for count in fields(Statistics):
        value = found["stats"].get(count.name, 0) if isinstance(found["stats"], dict) else None
        if count.type in ("int", "float") and not isinstance(value, (int, float)):
            raise TypeError(f"a number as {count.name}")


def _response(record: Mapping[str, Any]) -> Response | None:
    """The response in a record of the journal; None if somebody has taken parts of it away."""
    try:
        response = Response.from_dict(record["response"])
        _check_types(record["response"])
        RunStatistics().add(response.stats, resumed=True)
    except (KeyError, TypeError) as error:
        logger.warning("a record of the journal lacks %s: its request is generated anew", error)
        return None
    return response


class Worklist:
    """Requests in, each distinct one once out, responses in the order of the requests.

    Args:
        journal: of finished requests, or None.
    """

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal
        self._keys: list[str] = []
        self._requests: dict[str, Request] = {}
        self._responses: dict[str, Response] = {}

    def add(self, request: Request) -> None:
        """Appends an entry; one with a key that is there already is computed together with it."""
        key = request_key(request)
        self._keys.append(key)
        self._requests.setdefault(key, request)

    def __len__(self) -> int:
        """Distinct requests."""
        return len(self._requests)

    @property
    def finished(self) -> int:
        """Distinct requests whose response is known."""
        return len(self._responses)

    def resume(self, notes: Notes | None = None) -> list[Response]:
        """Takes over what the journal holds and returns it; `notes` get nothing of it."""
        if self.journal is None:
            return []
        self.journal.refresh()
        for key in self._requests:
            if (record := self.journal.get(key)) is not None and (response := _response(record)) is not None:
                self._responses[key] = response
        if self._responses:
            logger.warning(
                "%d of %d requests are already finished (%s; journal=off generates anew)",
                len(self._responses),
                len(self),
                self.journal.directory,
            )
            if notes is not None and notes.is_new:
                logger.warning(
                    "notes=%s will hold nothing of these %d: what was finished without notes has to be generated anew "
                    "for them, with journal=off",
                    notes.path.parent,
                    len(self._responses),
                )
        return list(self._responses.values())

    def open_requests(self) -> list[Request]:
        """Returns the distinct requests that are still to be generated, long prompts first.

        Long ones first, for the row that is admitted last would otherwise keep the batch waiting.
        """
        todo = [request for key, request in self._requests.items() if key not in self._responses]
        return sorted(todo, key=lambda request: -len(request.prompt_ids))

    def finish(self, request: Request, response: Response, facts: Mapping[str, Any]) -> None:
        """Records a generated response; the journal has it before anybody else, unless it can no longer be written."""
        key = request_key(request)
        self._responses[key] = response
        if self.journal is None:
            return
        try:
            self.journal.add(key, {**facts, "response": response.as_dict()})
        except OSError as error:
            logger.error(
                "journal=%s can no longer be written (%s): the run goes on, and no other run can take over what it "
                "finishes from here on",
                self.journal.directory.parent,
                error.strerror,
            )
            self.journal = None

    def kept(self) -> str:
        """What of a run that is stopped now is not lost."""
        if self.journal is None:
            return f"nothing of the {self.finished} finished requests is kept, for there is no journal (journal=DIR)"
        return (
            f"{self.finished} of {len(self)} requests are finished and kept in {self.journal.directory}; the same "
            "command goes on from there"
        )

    def responses(self) -> list[Response]:
        """Returns one response for each entry, in the order of `add`.

        Raises:
            KeyError: a request is not finished.
        """
        return [self._responses[key] for key in self._keys]
