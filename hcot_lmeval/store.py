"""Files that survive a kill: JSONL that only grows, and files that are there as a whole or not at all.

    with JsonLines(path, header={"schema": "mine/1"}) as store:
        place = store.append({"key": "a"})
        store.read(place)
    for place, record in scan(path): ...

A record is in the file or it is not: a kill can tear the last line alone, which readers pass over and the next writer
cuts off. A place is the offset of a line in bytes, so that an index of a large file is a dict of places. Writers that
work side by side have a file each, and read those of the others.

This module imports the standard library alone.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

Record = dict[str, Any]


class StoreError(ValueError):
    """A file is in use, damaged, or of another kind."""


class JsonLines:
    """An append-only file of JSON objects, one a line.

    Args:
        path: the file; made with its folders if need be.
        header: first line of a new file; an old one has to begin with a header of the same schema. None: no header.
        durable: a line survives a power cut too once `append` returns, and not only a kill.
        alone: no other process may have the file open in this way; the lock goes with the process, however it ends.

    Attributes:
        path: the file.
        is_new: whether it was empty.
        torn: bytes that were cut off at its end.

    Raises:
        StoreError: another process has the file, or its header is not ours.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        header: Mapping[str, Any] | None = None,
        durable: bool = True,
        alone: bool = False,
    ) -> None:
        self.path = Path(path)
        self._durable, self._has_header = durable, header is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("a+b")
        try:
            if alone and not lock(self._file):
                raise StoreError(f"{self.path} is in use by another run; wait until that one has ended")
            self.is_new = self._file.seek(0, os.SEEK_END) == 0
            if header is not None and not self.is_new:
                check_schema(self.path, header["schema"])
            self.torn = _cut_torn(self._file)
            if header is not None and self.is_new:
                self.append(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[int, Record]]:
        """Yields the place and the content of every record; see `scan`."""
        records = scan(self.path)
        if self._has_header:
            next(records)
        return records

    def append(self, record: Mapping[str, Any]) -> int:
        """Adds a record, which is kept once this returns, and returns its place.

        Raises:
            OSError: the file can no longer be written.
        """
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(line_of(record))
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())
        return place

    def read(self, place: int) -> Record:
        """Returns the record at a place."""
        self._file.seek(place)
        return json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()


def scan(path: str | os.PathLike[str], *, damaged: bool = False, start: int = 0) -> Iterator[tuple[int, Record]]:
    """Yields the place and the content of every line, a header included, but not of a torn last one.

    Args:
        path: the file.
        damaged: pass over other lines that are no JSON objects, too.
        start: place of the first line.

    Raises:
        StoreError: a line in the midst of the file is no JSON object.
    """
    place, fault = start, 0
    with Path(path).open("rb") as file:
        file.seek(start)
        for number, line in enumerate(file, start=1):
            if fault and not damaged:
                raise StoreError(f"{path}:{fault} is no record; mend or remove the line")
            record = _parsed(line)
            if record is None:
                fault = number
            else:
                yield place, record
            place += len(line)


def first_record(path: str | os.PathLike[str]) -> Record | None:
    """Returns the object in the first line of a file; None if there is none, or half of one."""
    with Path(path).open("rb") as file:
        return _parsed(file.readline())


def check_schema(path: str | os.PathLike[str], schema: str) -> Record:
    """Returns the header of a file.

    Raises:
        StoreError: it has none of this schema.
    """
    header = first_record(path) or {}
    if header.get("schema") != schema:
        found = f"the schema {header['schema']!r}" if "schema" in header else "no schema"
        raise StoreError(f"{path} has {found} in its first line, not {schema!r}; name another file, or move this one")
    return header


def line_of(record: Mapping[str, Any]) -> bytes:
    """Returns a record as a line of JSON; halves of surrogate pairs, which UTF-8 does not know, become escapes."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def _parsed(line: bytes) -> Record | None:
    """The object in a line; None if the line is torn or holds something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


CHUNK = 2**16
"""Bytes that are read at once in search of the last line."""


def _cut_torn(file: IO[bytes]) -> int:
    """Cuts off a last line that is no record, and returns its length in bytes."""
    start = end = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail[:-1]:
        size = min(CHUNK, start)
        start = file.seek(start - size)
        tail = file.read(size) + tail
    last = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    if not last or _parsed(last) is not None:
        return 0
    file.truncate(end - len(last))
    return len(last)


def lock(file: IO[bytes], *, wait: bool = False) -> bool:
    """Takes an open file for this process and those that inherit it, and returns whether nobody else had it.

    The system lets go of it when all of them have ended, however they ended.

    Args:
        file: open for writing.
        wait: until the others have let go of it.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_windows(file, wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _lock_windows(file: IO[bytes], wait: bool) -> bool:
    import msvcrt

    windows: Any = msvcrt
    file.seek(1 << 40)  # a byte far behind the end, for a locked byte cannot be read
    try:
        windows.locking(file.fileno(), windows.LK_LOCK if wait else windows.LK_NBLCK, 1)
    except OSError:
        return False
    return True


# --- whole files ------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a draft to be written, which takes the place of `path` at the end; an error leaves `path` as it was."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there already, and no file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file for readers, as a whole or not at all, whoever else writes it."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], schema: str | None = None) -> Record | None:
    """Returns the object that `write_json` wrote; None if there is no such file, or none of this schema."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and schema in (None, found.get("schema")) else None


def check_folder(folder: str | os.PathLike[str], given: str, advice: str) -> None:
    """Makes a folder and tries to write there, before anything is computed for it.

    Args:
        folder: that will be written to.
        given: what the user gave, such as ``--out DIR``, and
        advice: what to do, both for the message.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{given} cannot be written to ({error.strerror}); {advice}") from error
