"""Runs in, evidence out: tables with their definitions, paired tests, plots, in every format.

comparison = compare(read_runs(Path("out")))
print(comparison.text())
comparison.write(Path("comparison"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcot_lmeval.report import render
from hcot_lmeval.report.results import Run
from hcot_lmeval.report.statistics import LEVEL
from hcot_lmeval.report.tables import (
    COSTS,
    TOKENS,
    Entry,
    Table,
    Test,
    columns_table,
    endings,
    entries_of,
    find_tests,
    shares_table,
    tests_table,
    weighted_table,
)
from hcot_lmeval.store import read_json, write_json

INDEX = "comparison.json"
"""The file that names all others."""


@dataclass(frozen=True)
class TaskComparison:
    """The comparison of one task: each entry against the baseline, and the tables that they have something for."""

    task: str
    entries: tuple[Entry, ...]
    tests: tuple[Test, ...]
    tables: tuple[Table, ...]

    @property
    def title(self) -> str:
        return f"{self.task}: {len(self.entries[0].scores)} problems"

    def as_dict(self) -> dict[str, Any]:
        runs = [
            {"name": run.name, "entry": entry.name, "path": str(run.path), "model": run.model, "metric": run.metric}
            | {"config": dict(run.config)}
            for entry in self.entries
            for run in entry.runs
        ]
        return {"runs": runs, "tables": {table.key: render.json_value(table) for table in self.tables}}


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, task by task, and what the statistics depend on."""

    tasks: tuple[TaskComparison, ...]
    settings: dict[str, Any]

    def text(self) -> str:
        """Returns all tables for a terminal."""
        parts = []
        for task in self.tasks:
            parts += [f"{task.title}\n{'=' * len(task.title)}", *map(render.terminal, task.tables)]
        return "\n\n".join(parts)

    def write(self, directory: Path, plots: bool = True) -> list[Path]:
        """Writes the comparison below `directory` and returns the files.

        ``comparison.md``, ``.tex`` and ``.json`` hold all tables; ``TASK-TABLE.csv`` one each; the plots are
        ``TASK-PLOT.png`` and ``.svg``. What an earlier comparison has written there, of other tasks perhaps, and this
        one does not, is removed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        earlier = _files_of(directory / INDEX)
        markdown = [text for task in self.tasks for text in (f"## {task.title}\n", *map(render.markdown, task.tables))]
        texts = {
            "comparison.md": "\n".join(markdown),
            "comparison.tex": "\n".join(render.latex(table) for task in self.tasks for table in task.tables),
            **{f"{task.task}-{t.key}.csv": render.csv_text(t) for task in self.tasks for t in task.tables},
        }
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        written = [directory / name for name in (*texts, INDEX)]
        for path in earlier - set(written):
            path.unlink(missing_ok=True)
        if plots:
            from hcot_lmeval.report.plots import plot_task

            written += [path for part in self.tasks for path in plot_task(part.task, part.entries, directory)]
        write_json(directory / INDEX, self.as_dict() | {"files": [path.name for path in written]})
        return written

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as JSON values, unrounded."""
        return {"settings": self.settings, "tasks": {part.task: part.as_dict() for part in self.tasks}}


def compare(
    runs: Sequence[Run],
    *,
    by: str | None = None,
    baseline: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compares runs that `comparable.check_comparable` let pass.

    Those that differ in nothing but the seed are pooled. The column `by` of the documents holds the level; None:
    `Run.grouping`. For `baseline` see `tables.find_tests`; `resamples` and `seed` are those of the bootstrap.

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


def _tables(entries: Sequence[Entry], tests: Sequence[Test], **how: Any) -> list[Table]:
    title = f"Accuracy ({entries[0].runs[0].metric})"
    tables = [shares_table(entries, "accuracy", title, lambda e: e.scores, **how), weighted_table(entries)]
    if any(entry.completed for entry in entries):
        title = "Completion: ended by itself, not at a limit"
        tables.append(shares_table(entries, "completion", title, lambda e: e.completed, **how))
    if any(entry.requests for entry in entries):
        for key, title, columns in (
            ("tokens", "Tokens of a response", TOKENS),
            ("costs", "Context, memory and time", COSTS),
            ("endings", "Ends, blocks, and faults of notation", endings(entries)),
        ):
            tables.append(columns_table(entries, key, title, columns))
    if tests:
        tables.append(tests_table(tests))
    return [table for table in tables if table is not None]


def _files_of(index: Path) -> set[Path]:
    """The files of the comparison that wrote this index, if one did."""
    return {index.with_name(Path(name).name) for name in (read_json(index) or {}).get("files", [])}
