"""The tables of a comparison, with their raw values: accuracy, completion, tokens, costs, paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcot_lmeval.report.columns import COSTS, TOKENS, Column, endings
from hcot_lmeval.report.entries import Entry, difficulty
from hcot_lmeval.report.statistics import Estimate, Paired, estimate, holm, honest_sentence, is_significant, paired

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
    corrected_p: float = field(default=float("nan"))


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
    """A share of problems, in the layout of the published tables: a row for each level and model, a column a window.

    Args:
        entries: of one task.
        key: see `Table`.
        title: see `Table`.
        values: entry -> doc_id -> share; None where the entry has none.
        by: the column of the documents that holds the level; None: no levels.
        resamples: of the bootstrap; 0: no intervals.
        seed: of the bootstrap.
    """
    windows = sorted({entry.window for entry in entries}, key=lambda w: (w is None, w or 0))
    families = list(dict.fromkeys(entry.family for entry in entries))
    at = {(entry.family, entry.window): entry for entry in entries}

    def cell(family: str, window: int | None, level: Any) -> Cell:
        entry = at.get((family, window))
        found = None if entry is None else values(entry)
        if entry is None or found is None:
            return None
        ids = list(found) if level is None else (entry.groups(str(by)).get(level) or [])
        chosen = [found[i] for i in ids]
        if not chosen:
            return None
        return estimate(chosen, resamples=resamples, seed=seed) if level is None else sum(chosen) / len(chosen)

    levels = [] if by is None else sorted({v for entry in entries for v in entry.groups(by)}, key=difficulty)
    rows = [
        (str(level) if level is not None else "all", family, *(cell(family, window, level) for window in windows))
        for level in [*levels, None]
        for family in families
    ]
    heads = [Head(by or ""), Head("run"), *(Head(window_name(window), digits=1, scale=100) for window in windows)]
    note = f"percent of {len(entries[0].scores)} problems; 95 % interval of all"
    return Table(key, title, tuple(heads), tuple(rows), (note, *seeds_note(entries)))


def seeds_note(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Says over how many seeds numbers are means, if over more than one."""
    counts = {entry.name: len(entry.runs) for entry in entries}
    if set(counts.values()) == {1}:
        return ()
    if len(set(counts.values())) == 1:
        return (f"means over {len(entries[0].runs)} seeds",)
    return (f"means over seeds: {'; '.join(f'{count} of {name}' for name, count in counts.items())}",)


def window_name(window: int | None) -> str:
    """The head of a window's column."""
    return "own limit" if window is None else str(window)


def weighted_table(entries: Sequence[Entry]) -> Table | None:
    """PolyMath's difficulty-weighted accuracy, or None for another task."""
    from hcot_lmeval.scoring.aggregate import difficulty_weighted

    if not all("dw_acc" in sample for entry in entries for run in entry.runs for sample in run.samples):
        return None
    windows = sorted({entry.window for entry in entries}, key=lambda w: (w is None, w or 0))
    at = {(entry.family, entry.window): entry for entry in entries}

    def cell(family: str, window: int | None) -> Cell:
        entry = at.get((family, window))
        if entry is None:
            return None
        pairs = [[tuple(sample["dw_acc"]) for sample in run.samples] for run in entry.runs]
        mean = sum(difficulty_weighted(items) for items in pairs) / len(pairs)
        return None if math.isnan(mean) else mean

    rows = [(f, *(cell(f, w) for w in windows)) for f in dict.fromkeys(entry.family for entry in entries)]
    heads = (Head("run"), *(Head(window_name(window), digits=1, scale=100) for window in windows))
    weights = "percent; levels low, medium, high, top weigh 1, 2, 4, 8 (PolyMath, arXiv 2504.18428)"
    notes = (f"{weights}; empty where a level has no problem", *seeds_note(entries))
    return Table("weighted", "Difficulty-weighted accuracy", heads, tuple(rows), notes)


def columns_table(entries: Sequence[Entry], key: str, title: str, columns: Sequence[Column]) -> Table:
    """One row for each entry, a column for each of `columns`, their meanings below."""
    heads = [Head("run"), *(Head(c.head, c.meaning, c.digits, key=c.key) for c in columns)]
    rows = [(entry.name, *(column.value(entry) for column in columns)) for entry in entries]
    return Table(key, title, tuple(heads), tuple(rows))


def tokens_table(entries: Sequence[Entry]) -> Table:
    """What was generated, thrown away and forwarded again."""
    return columns_table(entries, "tokens", "Tokens of a response", TOKENS)


def costs_table(entries: Sequence[Entry]) -> Table:
    """Context, memory and time."""
    return columns_table(entries, "costs", "Context, memory and time", COSTS)


def endings_table(entries: Sequence[Entry]) -> Table:
    """Why responses ended, their blocks, and their faults of notation by kind."""
    return columns_table(entries, "endings", "Ends, blocks, and faults of notation", endings(entries))


def find_tests(entries: Sequence[Entry], baseline: str | None, *, resamples: int, seed: int) -> list[Test]:
    """Tests every entry against the baseline, corrected for their number.

    Args:
        entries: of all tasks.
        baseline: name of an entry, with which all others of its task are compared; or of a family, whose member at the
            same window is taken (or its only one); None: the family of the first entry.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: no entry has that name.
    """
    baseline = baseline or entries[0].family
    if not any(baseline in (entry.name, entry.family) for entry in entries):
        names = dict.fromkeys(name for entry in entries for name in (entry.family, entry.name))
        raise ValueError(f"baseline={baseline!r} is not a run here; choose one of {'; '.join(names)}")
    found = []
    for entry in entries:
        other = _baseline_of(entry, entries, baseline)
        if other is not None:
            result = paired(other.scores, entry.scores, resamples=resamples, seed=seed)
            found.append(Test(entry.task, other.name, entry.name, result))
    ps = holm([test.paired.p for test in found])
    return [Test(t.task, t.baseline, t.name, t.paired, p) for t, p in zip(found, ps, strict=True)]


def _baseline_of(entry: Entry, entries: Sequence[Entry], baseline: str) -> Entry | None:
    same_task = [other for other in entries if other.task == entry.task]
    exact = [other for other in same_task if other.name == baseline]
    family = [other for other in same_task if other.family == baseline]
    if entry in (exact or family):
        return None
    same_window = [other for other in family if other.window == entry.window]
    candidates = exact or same_window or (family if len(family) == 1 else [])
    return candidates[0] if candidates else None


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
        numbers = (r.better, r.worse, r.difference, r.low, r.high, r.p, test.corrected_p)
        rows.append((test.name, test.baseline, *numbers))
    problems = tests[0].paired.problems
    notes = (*disagreement_note(tests), honest_sentence(problems, [test.paired for test in tests]))
    return Table("tests", "Paired tests on the same problems", heads, tuple(rows), notes)


def disagreement_note(tests: Sequence[Test]) -> tuple[str, ...]:
    """Says which to believe, if an interval leaves zero out although the test does not reject."""
    found = (test.paired for test in tests)
    if any((r.low > 0 or r.high < 0) and not is_significant(r.p) for r in found):
        return ("where an interval leaves 0 out though p is 0.05 or more, believe p: few problems make it too narrow",)
    return ()
