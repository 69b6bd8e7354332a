"""Runs pooled to what stands in a table: one model under one setting, over its seeds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from hcot_lmeval.report.comparable import check_seeds
from hcot_lmeval.report.results import Run
from hcot_lmeval.scoring.aggregate import LEVELS

SEED = re.compile(r", seed \d+$")
"""What the names of runs end in where a grid has several seeds."""


@dataclass(frozen=True)
class Entry:
    """The runs of one task that differ in nothing but their seed.

    Attributes:
        name: of the setting, the window included.
        family: the name without the window: what is the same model and policy at other windows.
        task: the task.
        window: most live tokens; None for a model that is not ours.
        runs: one for each seed.
    """

    name: str
    family: str
    task: str
    window: int | None
    runs: tuple[Run, ...]

    @cached_property
    def scores(self) -> dict[int, float]:
        """doc_id -> score, the mean over seeds."""
        return {key: fmean(run.scores[key] for run in self.runs) for key in self.runs[0].scores}

    @cached_property
    def requests(self) -> tuple[Mapping[str, Any], ...] | None:
        """Statistics of every response under every seed; None for a model that is not ours."""
        if any(run.requests is None for run in self.runs):
            return None
        return tuple(stats for run in self.runs for stats in run.requests or ())

    @cached_property
    def completed(self) -> dict[int, float] | None:
        """doc_id -> share of its responses that ended by themselves; None for a model that is not ours."""
        if not all("completed" in sample for run in self.runs for sample in run.samples):
            return None
        values = [{sample["doc_id"]: float(sample["completed"]) for sample in run.samples} for run in self.runs]
        return {key: fmean(value[key] for value in values) for key in values[0]}

    @property
    def place(self) -> tuple[str, str, int | None]:
        """The cell of a table; runs named ``x`` and ``x, 1024``, both of window 1024, must not fall into the same."""
        return self.task, self.family, self.window


def difficulty(value: Any) -> tuple[int, Any]:
    """Sort key of levels: those of `LEVELS` in their order, numbers by size, anything else by its text."""
    if value in LEVELS:
        return 0, LEVELS.index(value)
    return (1, value) if isinstance(value, (int, float)) else (2, str(value))


def entries_of(runs: Sequence[Run]) -> list[Entry]:
    """Pools runs that differ in their seed alone, in the order in which they were given.

    Raises:
        ResultsError: runs of one name differ in more than their seed.
    """
    pooled: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        pooled.setdefault((SEED.sub("", run.name), run.task), []).append(run)
    entries = []
    for (name, task), group in pooled.items():
        check_seeds(group)
        window = group[0].max_context
        entries.append(Entry(name, name.removesuffix(f", {window}") or name, task, window, tuple(group)))
    places = Counter(entry.place for entry in entries)
    return [entry if places[entry.place] == 1 else replace(entry, family=entry.name) for entry in entries]
