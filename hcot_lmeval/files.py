"""Where rows are: files, patterns, folders and data sets on the hub, read one record at a time.

    for each in find_inputs(["traces.jsonl", "more/*.parquet", "owner/name"]):
        for record in each.records(): ...

Files are JSONL (``.jsonl``, compressed too: ``.gz``, ``.zst``) or parquet, told apart by what they begin with. What is
no file here is a data set on the hub, ``owner/name``, and is streamed. Nothing is held but the record at hand (of
parquet, a batch of them).
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import Field

from hcot_lmeval.settings import Section

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Of the files that are read."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
BATCH = 64
"""Records of a parquet file that are held at once."""
GZIP, ZSTANDARD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
"""What such files begin with."""


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


class LimitOptions(Section, title="input"):
    """How much is read."""

    limit: int | None = Field(None, ge=1, description="read only the first N rows")


class InputOptions(LimitOptions, title="input"):
    """Which part of a data set on the hub is read, and how much of anything."""

    split: str = Field("train", description="split of a data set on the hub")
    subset: str | None = Field(None, description="configuration of a data set on the hub")
    revision: str | None = Field(None, description="revision of a data set on the hub (the newest)")


USUAL = InputOptions()


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
    options: InputOptions = USUAL

    def identity(self) -> dict[str, Any]:
        """Returns what tells the same content from another one."""
        if self.file is not None:
            return {"file": self.file.name, "sha256": file_digest(self.file)}
        return {"hub": self.name, **{key: getattr(self.options, key) for key in ("subset", "split", "revision")}}

    def records(self) -> Iterator[Record]:
        """Yields the records in their order."""
        if self.file is None:
            return self._hub()
        return _parquet(self.file) if _is_parquet(self.file) else _lines(self.file)

    def _hub(self) -> Iterator[Record]:
        import datasets

        options = self.options
        rows = datasets.load_dataset(
            self.name, options.subset, split=options.split, revision=options.revision, streaming=True
        )
        for number, row in enumerate(rows):
            yield Record(f"{self.name}, row {number}", dict(row))


def find_inputs(names: Sequence[str | Path], options: InputOptions = USUAL) -> list[Input]:
    """Returns what `names` stand for: files, patterns, folders of files, data sets on the hub.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is of a kind that is not read, or given twice.
    """
    found = [each for name in names for each in _inputs_of(str(name), options)]
    seen: set[Path] = set()
    for file in (each.file for each in found if each.file is not None):
        if file.resolve() in seen:
            raise ValueError(f"{file} is given twice; name each file once")
        seen.add(file.resolve())
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
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(name, revision=options.revision).sha
    except Exception as error:  # of the network, of the hub, of the name: all mean the same here
        why = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{name!r} is no file here, and as a data set on the hub it cannot be read: {type(error).__name__}: {why}"
        ) from None
    return options.model_copy(update={"revision": found})


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet" or _begins_with(path, PARQUET)


def _open_lines(path: Path) -> IO[bytes]:
    if _begins_with(path, GZIP):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if _begins_with(path, ZSTANDARD):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not blank, with their numbers.

    Raises:
        ValueError: the first one begins no object, or the compressed file is damaged.
    """
    number, first = 0, True
    with _open_lines(path) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    if first:
                        _check_first(path, line)
                    first = False
                    yield number, line
        except (EOFError, zlib.error, OSError) as error:
            whole = f"; --limit {number} reads what is whole" if number else ""
            raise ValueError(f"{path} is damaged behind line {number} ({error}); get it anew{whole}") from None


def _check_first(path: Path, line: bytes) -> None:
    begins = line.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if begins == b"{" and b"\x00" not in line[:4]:
        return
    kind = "a JSON array" if begins == b"[" else "UTF-16" if b"\x00" in line[:4] else None
    told = f"{path} begins with {line[:40].decode(errors='replace')!r}" if kind is None else f"{path} is {kind}"
    raise ValueError(f'{told}; write it as JSONL: UTF-8, an object on each line, such as {{"question": ...}}')


def _lines(path: Path) -> Iterator[Record]:
    for number, line in _raw_lines(path):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig")
            data = json.loads(text, parse_int=_integer, parse_float=_float, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict):
            yield Record(where, data)
        else:
            yield Record(where, None, line[:200].decode(errors="replace"))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one that has a key twice says two things, and is none."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _integer(digits: str) -> int | str:
    """An integer; one of more digits than Python turns into a number stays a text."""
    try:
        return int(digits)
    except ValueError:
        return digits


def _float(digits: str) -> float | int | str:
    """A number with a point or an exponent; one of more digits than a float holds is whole, or stays a text."""
    value = float(digits)
    if math.isinf(value) or Decimal(digits) == Decimal(repr(value)):
        return value
    return int(Decimal(digits)) if Decimal(digits) % 1 == 0 else digits


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    with _open_parquet(path) as file:
        for batch in file.iter_batches(BATCH):
            for place in range(len(batch)):
                number += 1
                try:
                    (data,) = batch.slice(place, 1).to_pylist()
                except (ValueError, OverflowError, pyarrow.ArrowException) as error:  # text that is none, odd dates
                    yield Record(f"{path}, row {number}", None, f"{type(error).__name__}: {error}"[:200])
                else:
                    yield Record(f"{path}, row {number}", data)


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is no parquet file, or a damaged one: {error}") from None


def count_records(inputs: Sequence[Input], limit: int | None = None) -> int | None:
    """Returns how many records there are, for a progress bar; None where only reading them would tell."""
    total = 0
    for each in inputs:
        if each.file is None:
            return limit
        total += _count(each.file, None if limit is None else limit - total)
        if total == limit:
            break
    return total


def _count(path: Path, limit: int | None) -> int:
    if _is_parquet(path):
        with _open_parquet(path) as file:
            rows = int(file.metadata.num_rows)
            return rows if limit is None else min(rows, limit)
    return sum(1 for _ in islice(_raw_lines(path), limit))
