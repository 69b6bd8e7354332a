"""Runs in, evidence out: tables with their definitions, paired tests, plots, in every format.

comparison = compare(read_runs(Path("out")))
print(comparison.text())
comparison.write(Path("comparison"))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hcot_lmeval.report import render
from hcot_lmeval.report.entries import Entry, entries_of
from hcot_lmeval.report.results import Run
from hcot_lmeval.report.statistics import LEVEL
from hcot_lmeval.report.tables import (
    Table,
    Test,
    costs_table,
    endings_table,
    find_tests,
    shares_table,
    tests_table,
    tokens_table,
    weighted_table,
)

INDEX = "comparison.json"
"""The file that names all others."""


@dataclass(frozen=True)
class TaskComparison:
    """The comparison of one task.

    Attributes:
        task: its name.
        entries: what is compared.
        tests: each entry against the baseline.
        tables: those that the entries have something for.
    """

    task: str
    entries: tuple[Entry, ...]
    tests: tuple[Test, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, task by task.

    Attributes:
        tasks: in the order in which they came.
        settings: what the statistics depend on.
    """

    tasks: tuple[TaskComparison, ...]
    settings: dict[str, Any]

    def text(self) -> str:
        """Returns all tables for a terminal."""
        parts = []
        for part in self.tasks:
            parts += [_underlined(f"{part.task}: {len(part.entries[0].scores)} problems")]
            parts += [render.terminal(table) for table in part.tables]
        return "\n\n".join(parts)

    def write(self, directory: Path, plots: bool = True) -> list[Path]:
        """Writes the comparison below `directory` and returns the files.

        ``comparison.md``, ``.tex`` and ``.json`` hold all tables; ``TASK-TABLE.csv`` one each; the plots are
        ``TASK-PLOT.png`` and ``.svg``. What an earlier comparison has written there, of other tasks perhaps, and this
        one does not, is removed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        earlier = _files_of(directory / INDEX)
        written = self._write_tables(directory)
        for path in earlier - set(written):
            path.unlink(missing_ok=True)
        if plots:
            written += self._plot(directory)
            self._write_index(directory, written)
        return written

    def _write_tables(self, directory: Path) -> list[Path]:
        texts = {"comparison.md": self._markdown(), "comparison.tex": self._latex()}
        for part in self.tasks:
            texts |= {f"{part.task}-{table.key}.csv": render.csv_text(table) for table in part.tables}
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        written = [directory / name for name in (*texts, INDEX)]
        self._write_index(directory, written)
        return written

    def _write_index(self, directory: Path, written: Sequence[Path]) -> None:
        """Writes everything unrounded, and which files there are."""
        index = self.as_dict() | {"files": [path.name for path in written]}
        (directory / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values, unrounded."""
        return {"settings": self.settings, "tasks": {part.task: _task_dict(part) for part in self.tasks}}

    def _markdown(self) -> str:
        parts = []
        for part in self.tasks:
            parts += [f"## {part.task}: {len(part.entries[0].scores)} problems\n"]
            parts += [render.markdown(table) for table in part.tables]
        return "\n".join(parts)

    def _latex(self) -> str:
        return "\n".join(render.latex(table) for part in self.tasks for table in part.tables)

    def _plot(self, directory: Path) -> list[Path]:
        from hcot_lmeval.report.plots import plot_task

        return [path for part in self.tasks for path in plot_task(part.task, part.entries, directory)]


def compare(
    runs: Sequence[Run],
    *,
    by: str | None = None,
    baseline: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compares runs that `comparable.check_comparable` let pass.

    Args:
        runs: of one or more tasks; those that differ in nothing but the seed are pooled.
        by: the column of the documents that holds the level; None: `Run.grouping`.
        baseline: see `tables.find_tests`.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ResultsError: the documents have no column `by`.
        ValueError: no runs, or no run is called `baseline`.
    """
    if not runs:
        raise ValueError("there are no runs to compare")
    entries = entries_of(runs)
    tests = find_tests(entries, baseline, resamples=resamples, seed=seed)
    tasks = []
    for task in dict.fromkeys(entry.task for entry in entries):
        mine = tuple(entry for entry in entries if entry.task == task)
        found = tuple(test for test in tests if test.task == task)
        level = by or mine[0].runs[0].grouping
        tables = tuple(_tables(mine, found, by=level, resamples=resamples, seed=seed))
        tasks.append(TaskComparison(task, mine, found, tables))
    settings = {"resamples": resamples, "seed": seed, "level": LEVEL, "baseline": baseline or entries[0].family}
    return Comparison(tuple(tasks), settings)


def _tables(
    entries: Sequence[Entry], tests: Sequence[Test], *, by: str | None, resamples: int, seed: int
) -> list[Table]:
    shares = partial(shares_table, entries, by=by, resamples=resamples, seed=seed)
    tables: list[Table | None] = [shares("accuracy", f"Accuracy ({entries[0].runs[0].metric})", lambda e: e.scores)]
    tables.append(weighted_table(entries))
    if any(entry.completed for entry in entries):
        title = "Completion: ended by itself, not at a limit"
        tables.append(shares("completion", title, lambda e: e.completed))
    if any(entry.requests for entry in entries):
        tables += [tokens_table(entries), costs_table(entries), endings_table(entries)]
    if tests:
        tables.append(tests_table(tests))
    return [table for table in tables if table is not None]


def _files_of(index: Path) -> set[Path]:
    """The files of the comparison that wrote this index."""
    try:
        names = json.loads(index.read_text(encoding="utf-8")).get("files", [])
    except (FileNotFoundError, json.JSONDecodeError):  # there is none, or its writer was killed
        return set()
    return {index.with_name(Path(name).name) for name in names}


def _task_dict(part: TaskComparison) -> dict[str, Any]:
    runs = [
        {"name": run.name, "entry": entry.name, "path": str(run.path), "model": run.model, "metric": run.metric}
        | {"config": dict(run.config)}
        for entry in part.entries
        for run in entry.runs
    ]
    return {"runs": runs, "tables": {table.key: render.json_value(table) for table in part.tables}}


def _underlined(title: str) -> str:
    return f"{title}\n{'=' * len(title)}"
