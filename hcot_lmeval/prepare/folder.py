"""What a step leaves on disk, and how one that was killed goes on.

    OUT/<step>/
        manifest.json      arguments, inputs with their digests, versions, counts; "state" is working or done
        journal.jsonl      while it works: one line for each row that is done
        rows.jsonl         what passed, in the order of the input
        rejected.jsonl     what did not, with reasons

When all rows are done, the journal is written out to files that are there as a whole or not at all; the manifest then
says ``done``. The same step with the same arguments and inputs goes on, or does nothing where it is done; with others
it is an error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hcot_lmeval.provenance import versions
from hcot_lmeval.settings import differences
from hcot_lmeval.store import JsonLines, line_of, read_json, replacing, write_json

SCHEMA = "hcot-prepare/1"
STEPS = ("segment", "refine", "check")
"""Steps that write rows, in the order in which they follow each other."""


@dataclass
class StepFolder:
    """The folder of one step.

    Attributes:
        out: the folder of the whole run.
        step: the name of the step.
        arguments: everything that the rows depend on, as JSON values.
        inputs: what tells the same inputs from others.
        summary: what became of the rows, once the step is done.
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
    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        return json.loads(json.dumps({"arguments": self.arguments, "inputs": self.inputs}))

    def open(self, *, restart: bool = False) -> bool:
        """Makes the folder ready; returns whether the step is done already.

        Raises:
            ValueError: it holds the step with other arguments or inputs, and `restart` is not set.
        """
        found, journal = None if restart else read_manifest(self.path), self.path / "journal.jsonl"
        if found is not None and found["state"] == "working" and not (journal.exists() and journal.stat().st_size):
            found = None  # it was stopped before the first row, perhaps by an error in the settings
        if found is not None and found["identity"] != self.identity:
            old, new = found["identity"], self.identity
            changed = [
                f"{key} was {json.dumps(before)[:60]}, is {json.dumps(after)[:60]}"
                for key, (before, after) in differences(old["arguments"], new["arguments"]).items()
            ]
            changed += ["the inputs have changed"] if old["inputs"] != new["inputs"] else []
            advice = "Give another --out, or --restart to throw it away"
            raise ValueError(f"{self.path} was made with other settings: {'; '.join(changed)}. {advice}")
        if found is not None and found["state"] == "done":
            self.summary = found["summary"]
            return True
        self.path.mkdir(parents=True, exist_ok=True)
        if found is None:
            for name in ("journal.jsonl", "rows.jsonl", "rejected.jsonl", "manifest.json"):
                (self.path / name).unlink(missing_ok=True)
        self._write_manifest("working")
        return False

    def journal(self) -> Journal:
        """Opens the journal; to be closed before `finish`."""
        return Journal(self.path / "journal.jsonl")

    def finish(
        self, decide: Callable[[dict[str, Any]], tuple[bool, dict[str, Any]]], summarise: Callable[[], dict[str, Any]]
    ) -> None:
        """Writes rows and rejected ones out, and the summary into the manifest.

        Args:
            decide: is given every entry of the journal in the order of the rows, and returns whether the row passes,
                and the record to write.
            summarise: is called behind the last one.
        """
        with (
            self.journal() as journal,
            replacing(self.path / "rows.jsonl") as good,
            replacing(self.path / "rejected.jsonl") as bad,
            good.open("wb") as rows,
            bad.open("wb") as rejected,
        ):
            for entry in journal.entries():
                passes, record = decide(entry)
                (rows if passes else rejected).write(line_of(record))
        self.summary = summarise()
        self._write_manifest("done")
        (self.path / "journal.jsonl").unlink(missing_ok=True)

    def _write_manifest(self, state: str) -> None:
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
    """Rows that are done, in the order in which they were; only one process may have it open.

    Attributes:
        done: numbers of the rows that are in it.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path, durable=False, alone=True)
        self._places = {record["n"]: place for place, record in self._lines}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    @property
    def done(self) -> Mapping[int, int]:
        return self._places

    def add(self, number: int, entry: Mapping[str, Any]) -> None:
        """Notes that the row `number` is done; it is, once this returns, if the process is killed then."""
        if number in self._places:
            raise ValueError(f"row {number} is in the journal already")
        self._places[number] = self._lines.append({"n": number, **entry})

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yields the entries by number, ascending."""
        return (self._lines.read(self._places[number]) for number in sorted(self._places))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Returns the manifest in the folder of a step; None if there is none of this schema."""
    return read_json(path / "manifest.json", SCHEMA)


def manifests(out: Path) -> list[dict[str, Any]]:
    """Returns the manifests of the finished steps of a run, in the order of `STEPS`."""
    found = [read_manifest(out / step) for step in STEPS]
    return [manifest for manifest in found if manifest is not None and manifest["state"] == "done"]


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run."""
    return any(read_manifest(path / step) is not None for step in STEPS)


def rows_of(name: str | Path, before: str | None = None) -> str | Path:
    """Returns the file that a step reads where it is given `name`.

    Args:
        name: the folder of a run or of a step; anything else is returned as it is.
        before: the step that reads; it takes the rows of the last step before it. None: of the last one.

    Raises:
        ValueError: no such step is finished.
    """
    path = Path(name)
    if read_manifest(path) is not None:
        return _finished(path)
    if not is_run(path):
        return name
    steps: Sequence[str] = STEPS if before is None else STEPS[: STEPS.index(before)]
    for step in reversed(steps):
        if read_manifest(path / step) is not None:
            return _finished(path / step)
    raise ValueError(f"{path} has no step before {before}; it has {', '.join(s for s in STEPS if (path / s).exists())}")


def _finished(path: Path) -> Path:
    if (read_manifest(path) or {}).get("state") != "done":
        again = f"run `{path.name}` again, with the arguments that it had and --out {path.parent}"
        raise ValueError(f"{path} is not finished; {again}, and it goes on")
    return path / "rows.jsonl"
