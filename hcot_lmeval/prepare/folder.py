"""What a step leaves on disk, and how one that was killed goes on.

    OUT/<step>/
        manifest.json      arguments, inputs with their digests, versions, counts; "state" is working or done
        journal.jsonl      while it works: one line for each row that is done
        rows.jsonl         what passed, in the order of the input
        rejected.jsonl     what did not, with reasons

A row is in the journal or it is not: a last line that a kill has torn is cut off, and its row is done again. When all
are done, the journal is written out to drafts, which are renamed; the manifest then says ``done``. The same step with
the same arguments and inputs goes on, or does nothing where it is done; with others it is an error.

This module imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import platform
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

SCHEMA = "hcot-prepare/1"
STEPS = ("segment", "refine", "check")
"""Steps that write rows, in the order in which they follow each other."""
LIBRARIES = ("hcot_lmeval", "datasets", "pyarrow", "numpy", "math-verify", "transformers")

Verdict = tuple[bool, dict[str, Any]]
"""Whether a row passes, and the record to write."""


class FolderError(ValueError):
    """A folder holds something else than was asked for."""


@dataclass
class StepFolder:
    """The folder of one step.

    Args:
        out: the folder of the whole run.
        step: the name of the step.
        arguments: everything that the rows depend on, as JSON values.
        inputs: what tells the same inputs from others.
    """

    out: Path
    step: str
    arguments: dict[str, Any]
    inputs: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.out / self.step

    @property
    def rows(self) -> Path:
        return self.path / "rows.jsonl"

    @property
    def rejected(self) -> Path:
        return self.path / "rejected.jsonl"

    @property
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        return json.loads(json.dumps({"arguments": self.arguments, "inputs": self.inputs}))

    def open(self, *, restart: bool = False) -> bool:
        """Makes the folder ready; returns whether the step is done already.

        Raises:
            FolderError: it holds the step with other arguments or inputs, and `restart` is not set.
        """
        found = None if restart else read_manifest(self.path)
        if found is not None and found["state"] == "working" and not _size(self.path / "journal.jsonl"):
            found = None  # it was stopped before the first row, perhaps by an error in the settings
        if found is not None and found["identity"] != self.identity:
            told = differences(found["identity"], self.identity)
            raise FolderError(
                f"{self.path} was made with other settings: {told}. Give another --out, or --restart to throw it away"
            )
        if found is not None and found["state"] == "done":
            self.summary = found["summary"]
            return True
        self.path.mkdir(parents=True, exist_ok=True)
        if found is None:
            for name in ("journal.jsonl", "rows.jsonl", "rejected.jsonl", "manifest.json"):
                (self.path / name).unlink(missing_ok=True)
        self._write("working")
        return False

    def journal(self) -> Journal:
        """Opens the journal; to be closed before `finish`."""
        return Journal(self.path / "journal.jsonl")

    def finish(self, decide: Callable[[dict[str, Any]], Verdict], summarise: Callable[[], dict[str, Any]]) -> None:
        """Writes rows and rejected ones out, and the summary into the manifest.

        Args:
            decide: is given every entry of the journal in the order of the rows.
            summarise: is called behind the last one.
        """
        drafts = {path: path.with_suffix(".draft") for path in (self.rows, self.rejected)}
        with self.journal() as journal, drafts[self.rows].open("wb") as rows, drafts[self.rejected].open("wb") as bad:
            for entry in journal.entries():
                passes, record = decide(entry)
                (rows if passes else bad).write(_line(record))
        for path, draft in drafts.items():
            os.replace(draft, path)
        self.summary = summarise()
        self._write("done")
        (self.path / "journal.jsonl").unlink(missing_ok=True)

    def _write(self, state: str) -> None:
        write_json(
            self.path / "manifest.json",
            {
                "schema": SCHEMA,
                "step": self.step,
                "state": state,
                "identity": self.identity,
                "versions": versions(),
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "summary": self.summary,
            },
        )


class Journal:
    """Rows that are done, in the order in which they were.

    Attributes:
        done: numbers of the rows that are in it.
    """

    def __init__(self, path: Path) -> None:
        self.done: set[int] = set()
        self._places = array("q")
        self._numbers = array("q")
        self._file: IO[bytes] = path.open("a+b")
        self._read_back()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Notes that the row `number` is done; it is, once this returns, whatever happens to the process."""
        self._index(number, self._file.seek(0, os.SEEK_END))
        self._file.write(_line({"n": number, **entry}))
        self._file.flush()

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yields the entries by number, ascending."""
        for place in sorted(range(len(self._numbers)), key=self._numbers.__getitem__):
            self._file.seek(self._places[place])
            yield json.loads(self._file.readline())

    def _index(self, number: int, place: int) -> None:
        if number in self.done:
            raise ValueError(f"row {number} is in the journal already")
        self.done.add(number)
        self._numbers.append(number)
        self._places.append(place)

    def _read_back(self) -> None:
        self._file.seek(0)
        at = 0
        for line in self._file:
            number = _number(line)
            if number is None:
                self._file.truncate(at)  # a torn line: nothing that follows it was written
                return
            self._index(number, at)
            at += len(line)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _number(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["n"])
    except (ValueError, KeyError, TypeError):
        return None


def _line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON; a lone surrogate, which only rejected rows have, is written as an escape."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    """Writes a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Returns the manifest in the folder of a step; None if there is none of this schema."""
    try:
        found = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns in words what differs between the settings of two runs."""
    before, after = flat(old["arguments"]), flat(new["arguments"])
    changed = [
        f"{key} was {json.dumps(before.get(key))[:60]}, is {json.dumps(after.get(key))[:60]}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key)
    ]
    if old["inputs"] != new["inputs"]:
        changed.append("the inputs have changed" if len(old["inputs"]) == len(new["inputs"]) else "other inputs")
    return "; ".join(changed)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with those of the sections within them beside the others."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found.update(flat(value) if isinstance(value, Mapping) else {key: value})
    return found


def versions() -> dict[str, str]:
    """Returns the versions of what rows depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def manifests(out: Path) -> list[dict[str, Any]]:
    """Returns the manifests of the finished steps of a run, in the order of `STEPS`."""
    found = [read_manifest(out / step) for step in STEPS]
    return [manifest for manifest in found if manifest is not None and manifest["state"] == "done"]


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return any(read_manifest(path / step) is not None for step in STEPS)


def rows_of(name: str | Path, before: str | None = None) -> list[str | Path]:
    """Returns the files that a step reads where it is given `name`.

    Args:
        name: the folder of a run or of a step; anything else is returned as it is.
        before: the step that reads; it takes the rows of the last step before it. None: of the last one.

    Raises:
        FolderError: no such step is finished.
    """
    path = Path(name)
    if read_manifest(path) is not None:
        return [_finished(path)]
    if not path.is_dir() or not is_run(path):
        return [name]
    steps: Sequence[str] = STEPS if before is None else STEPS[: STEPS.index(before)]
    for step in reversed(steps):
        if read_manifest(path / step) is not None:
            return [_finished(path / step)]
    raise FolderError(
        f"{path} has no step before {before}; it has {', '.join(s for s in STEPS if (path / s).exists())}"
    )


def _finished(path: Path) -> Path:
    manifest = read_manifest(path)
    if manifest is None or manifest["state"] != "done":
        told = f"run `{path.name}` again, with the arguments that it had and --out {path.parent}"
        raise FolderError(f"{path} is not finished; {told}, and it goes on")
    return path / "rows.jsonl"
