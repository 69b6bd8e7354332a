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
from datetime import datetime
from pathlib import Path
from typing import Any

from hcot_lmeval.provenance import digest
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
