"""From the words of a command line to runs with names: output folders of lm-eval, and folders of grids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hcot_lmeval.report.comparable import check_copies, check_settings
from hcot_lmeval.report.folder import described
from hcot_lmeval.report.results import ResultsError, Run, label, read_runs
from hcot_lmeval.store import read_json


@dataclass
class Reader:
    """Reads runs as `read_runs` does, and gives them names; `remarks` are what the user should know of their choice."""

    tasks: Sequence[str] | None = None
    metric: str | None = None
    filter_name: str | None = None
    remarks: list[str] = field(default_factory=list)

    def read(self, words: Sequence[str]) -> list[Run]:
        """Returns the runs of ``DIR`` and ``NAME=DIR``.

        Raises:
            ResultsError: a folder is not there, holds no complete run, or one name would fall to different models.
        """
        return [run for word in words for run in self._word(word)]

    def _word(self, word: str) -> list[Run]:
        name, equals, rest = word.partition("=")
        named = bool(equals) and not Path(word).exists()
        path = Path(rest if named else word)
        if not path.is_dir():
            raise ResultsError(f"{path} is no folder; give the --output_path of an lm_eval that has ended, or NAME=DIR")
        if (path / "grid.json").is_file():
            if named:
                raise ResultsError(f"{path} is the folder of a grid, whose cells have names; give it without {name}=")
            return list(self._grid(path))
        runs = self._newest(path)
        return _named(runs, name, path) if named else runs

    def _newest(self, path: Path) -> list[Run]:
        """The newest run of each label, task and seed.

        Raises:
            ResultsError: runs that would be taken for the same are of other checkpoints or other sampling.
        """
        newest: dict[tuple[str, str, int | None], Run] = {}
        older = set()
        for run in self._runs(path):
            key = (run.name, run.task, run.seed)
            if key in newest:
                check_copies(newest[key], run)
                older.add(key)
            newest[key] = run
        for name, task, seed in sorted(older, key=str):
            taken = newest[name, task, seed].path
            self.remarks.append(f"{path} holds several runs of {name!r} ({task}); the newest is taken, {taken.name}")
        return list(newest.values())

    def _runs(self, path: Path) -> list[Run]:
        return read_runs(path, tasks=self.tasks, metric=self.metric, filter_name=self.filter_name)

    def _grid(self, out: Path) -> Iterator[Run]:
        cells = [out / "cells" / name for name in (read_json(out / "grid.json") or {})["cells"]]
        done = [path for path in cells if (path / "results").is_dir()]
        if not done:
            raise ResultsError(f"no cell of the grid in {out} is finished; go on with the command that started it")
        if len(done) < len(cells):
            self.remarks.append(f"{len(cells) - len(done)} of {len(cells)} cells in {out} are not finished")
        for path in done:
            if not self.tasks or any(any(path.rglob(f"samples_{task}_*.jsonl")) for task in self.tasks):
                yield from self.cell(path)

    def cell(self, path: Path) -> list[Run]:
        """Returns the runs of a finished cell under the name of the cell, one for each of its tasks.

        Raises:
            Incomparable: the results in it were made with other model arguments than the cell was to have.
            ResultsError: it has no description, or no complete results.
        """
        cell = described(path)
        if cell is None:
            raise ResultsError(f"{path} has no cell.json; remove the folder and run the grid again")
        runs = [run.named(cell["name"]) for run in self._runs(path / "results")]
        for run in runs:
            check_settings(run, cell["model_args"])
        return runs


def _named(runs: Sequence[Run], name: str, path: Path) -> list[Run]:
    """The runs of one folder under the user's name, with policy and window where those tell them apart."""
    labels = {run.name for run in runs}
    if len(labels) == 1:
        return [run.named(name) for run in runs]
    if len({run.checkpoint for run in runs}) > 1 or any(run.totals is None for run in runs):
        raise ResultsError(f"{path} holds runs of several models ({'; '.join(sorted(labels))}); name a folder of each")
    return [run.named(label(run, name)) for run in runs]
