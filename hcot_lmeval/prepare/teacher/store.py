"""Every reply, as it comes: an append-only file, so that nothing is asked twice.

    with AnswerStore(path) as store:
        store.get(task.key) or store.add(reply)

A reply is a line of JSON. It is on the disk before anybody sees it; a last line that a kill has torn is cut off when
the file is opened. Only one process may have it open. Requests that were under way when the process was killed are not
in it: they are asked again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from hcot_lmeval.prepare.teacher.questions import Reply, Spent


class StoreError(RuntimeError):
    """The file is in use, or no file of replies."""


class AnswerStore:
    """The replies of a run.

    Attributes:
        spent: for all of them, failed ones included; in US dollars as far as prices were known.
        torn: bytes that were cut off at the end.

    Raises:
        StoreError: another process has it open, or a line that is not the last one is no reply.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spent, self.torn = Spent(), 0
        self._places: dict[str, int] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("a+b")
        try:
            self._lock()
            self._read_back()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        """The number of replies that are not asked for again."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def get(self, key: str) -> Reply | None:
        """Returns the reply to a question; None if there is none yet, or only failures that may be gone."""
        place = self._places.get(key)
        if place is None:
            return None
        self._file.seek(place)
        return Reply.from_record(json.loads(self._file.readline()))

    def add(self, reply: Reply) -> Reply:
        """Keeps a reply; it is on the disk once this returns.

        Raises:
            ValueError: there is a final one with this key already.
        """
        if reply.key in self._places:
            raise ValueError(f"{self.path} has a reply to {reply.key} already")
        line = json.dumps(reply.record()).encode() + b"\n"
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._count(reply, place)
        return reply

    def _count(self, reply: Reply, place: int) -> None:
        self.spent = self.spent.plus(reply.spent._replace(usd=reply.spent.usd or 0.0))
        if reply.is_final:
            self._places[reply.key] = place

    def _lock(self) -> None:
        """Takes the file for this process; the lock goes with the process, however it ends."""
        try:
            import fcntl
        except ImportError:  # Windows
            _lock_windows(self._file, self.path)
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(self.path) from None

    def _read_back(self) -> None:
        self._file.seek(0)
        at, lines = 0, iter(self._file)
        for line in lines:
            reply = _reply(line)
            if reply is None and (not line.endswith(b"\n") or next(lines, None) is None):
                self.torn = self._file.seek(0, os.SEEK_END) - at
                self._file.truncate(at)
                return
            if reply is None:
                raise StoreError(f"{self.path}: the line at byte {at} is no reply; move the file away, or mend it")
            self._count(reply, at)
            at += len(line)


def _reply(line: bytes) -> Reply | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return Reply.from_record(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def _in_use(path: Path) -> StoreError:
    return StoreError(f"{path} is in use by another run; wait until that one has ended, or give another --out")


def _lock_windows(file: IO[bytes], path: Path) -> None:
    import msvcrt

    windows: Any = msvcrt
    try:
        file.seek(1 << 40)  # a byte far behind the end, for a locked byte cannot be read
        windows.locking(file.fileno(), windows.LK_NBLCK, 1)
    except OSError:
        raise _in_use(path) from None
