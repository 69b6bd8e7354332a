"""The tables of a comparison, with their raw values: accuracy, completion, tokens, costs, paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hcot_lmeval.report.entries import Entry, difficulty
from hcot_lmeval.report.statistics import LEVEL, Estimate, Paired, estimate, holm, honest_sentence, paired

Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Head:
    """The head of a column.

    Attributes:
        name: for readers.
        meaning: one line for the foot of the table; empty if the name says it.
        digits: of numbers, behind the decimal point.
        scale: what numbers are multiplied with for readers; 100 for percent.
        signed: whether readers see a plus sign.
        least: smaller numbers are shown to readers as less than this.
        key: the name in CSV and JSON; that for readers if empty.
    """

    name: str
    meaning: str = ""
    digits: int = 0
    scale: float = 1.0
    signed: bool = False
    least: float = 0.0
    key: str = ""

    @property
    def column(self) -> str:
        return self.key or self.name


@dataclass(frozen=True)
class Table:
    """Raw values with what readers need to know.

    Attributes:
        key: a name for files.
        title: a line above.
        heads: of the columns.
        rows: of cells, as many as heads; None is an empty cell.
        notes: sentences below.
    """

    key: str
    title: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Test:
    """A pair of entries and what was found."""

    task: str
    baseline: str
    name: str
    paired: Paired
    corrected_p: float


def windows_table(
    entries: Sequence[Entry], levels: Sequence[Any], cell: Callable[[Entry, Any], Cell]
) -> tuple[tuple[Head, ...], tuple[tuple[Cell, ...], ...]]:
    """Heads and rows as the published tables have them: a row for each level and model, a column for each window."""
    windows = sorted({entry.window for entry in entries}, key=lambda w: (w is None, w or 0))
    at = {(entry.family, entry.window): entry for entry in entries}
    rows = [
        (family, *(cell(at[family, w], level) if (family, w) in at else None for w in windows))
        for level in levels
        for family in dict.fromkeys(entry.family for entry in entries)
    ]
    names = ("own limit" if window is None else str(window) for window in windows)
    return (Head("run"), *(Head(name, digits=1, scale=100) for name in names)), tuple(rows)


def shares_table(
    entries: Sequence[Entry],
    key: str,
    title: str,
    values: Callable[[Entry], Mapping[int, float] | None],
    *,
    by: str | None,
    resamples: int,
    seed: int,
) -> Table:
    """A share of problems, `values`: doc_id -> share; by levels, if a column of the documents holds one; and of all."""

    def cell(entry: Entry, level: Any) -> Cell:
        found = values(entry) or {}
        ids = list(found) if level is None else (entry.runs[0].groups(str(by)).get(level) or [])
        chosen = [found[i] for i in ids if found]
        if not chosen:
            return None
        return estimate(chosen, resamples=resamples, seed=seed) if level is None else sum(chosen) / len(chosen)

    found = {level for entry in entries for level in entry.runs[0].groups(by)} if by else ()
    levels = [*sorted(found, key=difficulty), None]
    heads, rows = windows_table(entries, levels, cell)
    names = [str(level) if level is not None else "all" for level in levels for _ in range(len(rows) // len(levels))]
    note = f"percent of {len(entries[0].scores)} problems; 95 % interval of all"
    labelled = tuple((name, *row) for name, row in zip(names, rows, strict=True))
    return Table(key, title, (Head(by or ""), *heads), labelled, (note, *seeds_note(entries)))


def seeds_note(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Says over how many seeds numbers are means, if over more than one."""
    counts = {entry.name: len(entry.runs) for entry in entries}
    if set(counts.values()) == {1}:
        return ()
    if len(set(counts.values())) == 1:
        return (f"means over {len(entries[0].runs)} seeds",)
    return (f"means over seeds: {'; '.join(f'{count} of {name}' for name, count in counts.items())}",)


def weighted_table(entries: Sequence[Entry]) -> Table | None:
    """PolyMath's difficulty-weighted accuracy, or None for another task."""
    from hcot_lmeval.scoring.aggregate import difficulty_weighted

    if not all("dw_acc" in sample for entry in entries for run in entry.runs for sample in run.samples):
        return None

    def cell(entry: Entry, _: Any) -> Cell:
        pairs = [[tuple(sample["dw_acc"]) for sample in run.samples] for run in entry.runs]
        mean = sum(difficulty_weighted(items) for items in pairs) / len(pairs)
        return None if math.isnan(mean) else mean

    weights = "percent; levels low, medium, high, top weigh 1, 2, 4, 8 (PolyMath, arXiv 2504.18428)"
    notes = (f"{weights}; empty where a level has no problem", *seeds_note(entries))
    return Table("weighted", "Difficulty-weighted accuracy", *windows_table(entries, [None], cell), notes)


def find_tests(entries: Sequence[Entry], baseline: str | None, *, resamples: int, seed: int) -> list[Test]:
    """Tests every entry against the baseline, corrected for their number.

    The baseline is the name of an entry, with which all others of its task are compared; or of a family, whose member
    at the same window is taken (or its only one); None: the family of the first entry.

    Raises:
        ValueError: no entry has that name.
    """
    baseline = baseline or entries[0].family
    if not any(baseline in (entry.name, entry.family) for entry in entries):
        names = dict.fromkeys(name for entry in entries for name in (entry.family, entry.name))
        raise ValueError(f"baseline={baseline!r} is not a run here; choose one of {'; '.join(names)}")
    pairs = [(other, entry) for entry in entries for other in _baseline_of(entry, entries, baseline)]
    found = [paired(other.scores, entry.scores, resamples=resamples, seed=seed) for other, entry in pairs]
    ps = holm([test.p for test in found])
    return [
        Test(entry.task, other.name, entry.name, test, p)
        for (other, entry), test, p in zip(pairs, found, ps, strict=True)
    ]


def _baseline_of(entry: Entry, entries: Sequence[Entry], baseline: str) -> list[Entry]:
    """What the entry is compared with; none for the baseline itself and where nothing fits."""
    same_task = [other for other in entries if other.task == entry.task]
    exact = [other for other in same_task if other.name == baseline]
    family = [other for other in same_task if other.family == baseline]
    if entry in (exact or family):
        return []
    same_window = [other for other in family if other.window == entry.window]
    return (exact or same_window or (family if len(family) == 1 else []))[:1]


def tests_table(tests: Sequence[Test]) -> Table:
    """The paired tests of one task."""
    heads = (
        Head("run"),
        Head("baseline"),
        Head("better", "problems with a higher score than under the baseline"),
        Head("worse", "problems with a lower one"),
        Head("points", "difference of the accuracies in points of percent, and its 95 % interval", 1, 100, signed=True),
        Head("low", digits=1, scale=100, signed=True),
        Head("high", digits=1, scale=100, signed=True),
        Head("p", f"two-sided, {', '.join(sorted({test.paired.test for test in tests}))}", 4, least=1e-4),
        Head("p Holm", "corrected for the number of tests in this comparison", 4, least=1e-4, key="p_holm"),
    )
    rows = []
    for test in tests:
        r = test.paired
        rows.append((test.name, test.baseline, r.better, r.worse, r.difference, r.low, r.high, r.p, test.corrected_p))
    found = [test.paired for test in tests]
    notes = [honest_sentence(found[0].problems, found)]
    if any((r.low > 0 or r.high < 0) and r.p >= LEVEL for r in found):
        warning = "where an interval leaves 0 out though p is 0.05 or more, believe p: few problems make it too narrow"
        notes.insert(0, warning)
    return Table("tests", "Paired tests on the same problems", heads, tuple(rows), tuple(notes))
