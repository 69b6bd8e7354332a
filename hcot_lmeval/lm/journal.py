"""A journal of finished requests, so that a run that was killed continues where it was.

A journal is a directory for each *fingerprint*, the digest of everything that determines a run's results. Results made
under another fingerprint lie in another directory and are never looked at. Every process writes a file of its own:

    <root>/<fingerprint>/<time>-rank<rank>-<pid>.jsonl
        {"schema": "hcot-journal/1", "fingerprint": "...", "run": {...}}      the header, with the facts in clear
        {"key": "...", ...}                                                   one line for each finished request

and reads those of all others, so ranks and concurrent runs need no locks. A line is on disk before `Journal.add`
returns. A process killed within a line leaves it torn; a torn line counts as not written.

No import of this module is heavy.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from hcot_lmeval.fingerprint import digest

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
        self._file: IO[bytes] | None = None
        self._index: dict[str, tuple[Path, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes have finished since."""
        for path in sorted(self.directory.glob("*.jsonl")):
            if not self._is_ours(path):
                continue
            self._index.update((record["key"], (path, offset)) for offset, record in _records(path))

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the record that was added under `key`, or None."""
        if key not in self._index:
            return None
        path, offset = self._index[key]
        with path.open("rb") as file:
            file.seek(offset)
            record = json.loads(file.readline())
        del record["key"]
        return record

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Appends a finished request; when this returns, the line survives a SIGKILL and a power cut.

        Raises:
            OSError: the journal's directory cannot be written.
        """
        if self._file is None:
            self._file = self._create()
        offset = self._write({"key": key, **record})
        self._index[key] = (Path(self._file.name), offset)

    def close(self) -> None:
        """Closes the file of this process; the next `add` starts a new one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _create(self) -> IO[bytes]:
        self.directory.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        name = f"{stamp}-{time.time_ns() % 10**9:09d}-rank{self.rank}-{os.getpid()}.jsonl"
        self._file = (self.directory / name).open("xb")
        self._write({"schema": SCHEMA, "fingerprint": self.fingerprint, "run": self.run})
        return self._file

    def _write(self, record: dict[str, Any]) -> int:
        assert self._file is not None
        offset = self._file.tell()
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return offset

    def _is_ours(self, path: Path) -> bool:
        with path.open("rb") as file:
            header = _parse(file.readline())
        if header is None:  # killed before the header was complete: there is nothing in it
            return False
        if header.get("schema") == SCHEMA and header.get("fingerprint") == self.fingerprint:
            return True
        logger.warning("%s was made by another kind of run and is left alone", path)
        return False


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the offset and content of every complete line behind the header."""
    with path.open("rb") as file:
        offset = len(file.readline())
        for line in file:
            record = _parse(line)
            if record is not None and isinstance(record.get("key"), str):
                yield offset, record
            offset += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the object in a line, or None if the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
