"""Where rows are: files, patterns, folders and data sets on the hub, read one record at a time.

Files are JSONL (``.jsonl``, ``.jsonl.gz``) or parquet, told apart by their suffix. What is no file here is a data set
on the hub, ``owner/name``, and is streamed. Nothing is held but the record at hand (of parquet, a batch of them).

This module imports the standard library alone; `datasets` and `pyarrow` come when they are needed.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Of the files that are read."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
BATCH = 64
"""Records of a parquet file that are held at once."""


class Record(NamedTuple):
    """A record, or what stands in its place.

    Attributes:
        where: the file and line, or the data set and row, for messages.
        data: the record; None if the line is no JSON object.
        line: the broken line, shortened.
    """

    where: str
    data: dict[str, Any] | None
    line: str = ""


@dataclass(frozen=True)
class InputOptions:
    """Which part of a data set on the hub is read, and how much of anything."""

    split: str = field(default="train", metadata={"help": "split of a data set on the hub"})
    subset: str | None = field(default=None, metadata={"help": "configuration of a data set on the hub"})
    revision: str | None = field(default=None, metadata={"help": "revision of a data set on the hub (the newest)"})
    limit: int | None = field(default=None, metadata={"help": "read only the first N rows"})

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} reads nothing; give at least 1")


@dataclass(frozen=True)
class Input:
    """A file, or a data set on the hub.

    Attributes:
        name: the path, or ``owner/name``.
        file: the path; None for the hub.
        options: for the hub; the revision is that which was found.
    """

    name: str
    file: Path | None
    options: InputOptions = InputOptions()

    def identity(self) -> dict[str, Any]:
        """Returns what tells the same content from another one."""
        if self.file is not None:
            return {"file": self.file.name, "sha256": file_digest(self.file)}
        return {"hub": self.name, **{key: getattr(self.options, key) for key in ("subset", "split", "revision")}}

    def records(self) -> Iterator[Record]:
        """Yields the records in their order."""
        if self.file is None:
            return self._hub()
        return _parquet(self.file) if self.file.suffix == ".parquet" else _lines(self.file)

    def _hub(self) -> Iterator[Record]:
        import datasets

        options = self.options
        rows = datasets.load_dataset(
            self.name, options.subset, split=options.split, revision=options.revision, streaming=True
        )
        for number, row in enumerate(rows):
            yield Record(f"{self.name}, row {number}", dict(row))


def find_inputs(names: Sequence[str | Path], options: InputOptions = InputOptions()) -> list[Input]:
    """Returns what `names` stand for: files, patterns, folders of files, data sets on the hub.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is of a kind that is not read, or given twice.
    """
    found = [each for name in names for each in _inputs_of(str(name), options)]
    seen: set[Path] = set()
    for each in found:
        if each.file is not None and each.file.resolve() in seen:
            raise ValueError(f"{each.file} is given twice; name each file once")
        seen |= {each.file.resolve()} if each.file is not None else set()
    return found


def _inputs_of(name: str, options: InputOptions) -> list[Input]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_read(file))
        if not files:
            raise FileNotFoundError(f"{name} holds no {', '.join(SUFFIXES)} file")
        return [Input(str(file), file) for file in files]
    files = sorted(Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file())
    unread = [file for file in files if not _is_read(file)]
    if unread:
        raise ValueError(f"{unread[0]} is no {' or '.join(SUFFIXES)} file; only these are read")
    if files:
        return [Input(str(file), file) for file in files]
    if glob.has_magic(name) or _is_read(path) or name.startswith(("/", ".")) or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"no file matches {name!r} (from the directory {Path.cwd()}); a data set on the hub is called owner/name"
        )
    return [Input(name, None, _with_revision(name, options))]


def _is_read(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def _with_revision(name: str, options: InputOptions) -> InputOptions:
    """The options with the commit that is read, so that a run that goes on reads the same."""
    from dataclasses import replace

    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(name, revision=options.revision).sha
    except Exception as error:  # of the network, of the hub, of the name: all mean the same here
        told = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{name!r} is no file here, and as a data set on the hub it cannot be read: {type(error).__name__}: {told}"
        ) from None
    return replace(options, revision=found)


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path) -> Iterator[Record]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(f"{path}, line {number}", line.decode(errors="replace").removeprefix("\ufeff"))


def _parsed(where: str, line: str) -> Record:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        data = None
    return Record(where, data) if isinstance(data, dict) else Record(where, None, line[:200])


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}, row {number}", row)


def count_records(inputs: Sequence[Input], limit: int | None = None) -> int | None:
    """Returns how many records there are, for a progress bar; None where only reading them would tell."""
    total = 0
    for each in inputs:
        if each.file is None:
            return limit
        total += _count(each.file)
    return total if limit is None else min(total, limit)


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
