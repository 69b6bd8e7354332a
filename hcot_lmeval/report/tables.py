"""The tables of a comparison, with their raw values: accuracy, completion, tokens, costs, paired tests.

A row is an `Entry`: one model under one setting, over its seeds. What a column counts is said in words that cannot be
misread. Tokens are counted per response, and a table shows the mean over responses. A generated token is one that the
model sampled, whether it was thrown away later or not; a live token is one that the model sees. A model that is not
ours tells nothing of this: its cells are empty, not zero.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from hcot_lmeval.control import Cause
from hcot_lmeval.report.comparable import check_seeds
from hcot_lmeval.report.results import Run
from hcot_lmeval.report.statistics import LEVEL, Estimate, Paired, estimate, holm, honest_sentence, paired
from hcot_lmeval.scoring.aggregate import LEVELS, difficulty_weighted
from hcot_lmeval.trace import Malformed

Cell = str | int | float | Estimate | None


# --- entries ----------------------------------------------------------------------------------------------------------

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


# --- tables of shares -------------------------------------------------------------------------------------------------


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
    if not all("dw_acc" in sample for entry in entries for run in entry.runs for sample in run.samples):
        return None

    def cell(entry: Entry, _: Any) -> Cell:
        pairs = [[tuple(sample["dw_acc"]) for sample in run.samples] for run in entry.runs]
        mean = sum(difficulty_weighted(items) for items in pairs) / len(pairs)
        return None if math.isnan(mean) else mean

    weights = "percent; levels low, medium, high, top weigh 1, 2, 4, 8 (PolyMath, arXiv 2504.18428)"
    notes = (f"{weights}; empty where a level has no problem", *seeds_note(entries))
    return Table("weighted", "Difficulty-weighted accuracy", *windows_table(entries, [None], cell), notes)


# --- columns of what a response took ----------------------------------------------------------------------------------

Value = Callable[[Entry], float | int | None]
Column = tuple[Head, Value]


def over(how: Callable[[list[Any]], float], of: Callable[[Mapping[str, Any]], Any]) -> Value:
    """What `how`, such as `sum`, makes of a statistic of all responses."""
    return lambda entry: how([of(stats) for stats in entry.requests]) if entry.requests else None


def mean(key: str) -> Value:
    """The mean of a statistic over responses."""
    return over(fmean, lambda stats: stats[key])


def column(key: str, head: str, meaning: str, value: Value | None = None, digits: int = 0) -> Column:
    """A column; without a value it is the `mean` of the statistic that it is named by."""
    return Head(head, meaning, digits, key=key), value or mean(key)


def kv_mib(value: Value) -> Value:
    """Live tokens as MiB of keys and values; None where the results do not tell the size of one."""

    def cell(entry: Entry) -> float | None:
        tokens, size = value(entry), (entry.runs[0].totals or {}).get("kv_bytes_per_token")
        return None if tokens is None or size is None else tokens * size / 2**20

    return cell


def mean_live(entry: Entry) -> float | None:
    """Live tokens as the mean over generated tokens, all responses together."""
    generated = sum(stats["generated_tokens"] for stats in entry.requests or ())
    return sum(stats["live_token_steps"] for stats in entry.requests or ()) / generated if generated else None


def totals(key: str, how: Callable[[list[float]], float]) -> Value:
    """What `how` makes of a total of the runs; None if one has none, as of a run that took all from its journal."""

    def cell(entry: Entry) -> float | None:
        known = [run.totals[key] for run in entry.runs if run.totals and run.totals[key] is not None]
        return how(known) if len(known) == len(entry.runs) else None

    return cell


LARGEST_PEAK = over(max, lambda stats: stats["peak_live_tokens"])
TWICE = "tokens forwarded a second time after a prune, the price of recompute, mean"
PEAK = (
    "most tokens that the model saw at once in a response, prompt included, mean; a prompt that leaves no room in the "
    "window counts with its length, though it was not read"
)
AREA = "MiB of keys and values held just after each generated token, summed over the response, mean"
SPEED = "generated tokens a second, all responses side by side; empty if all came from a journal"
TOKENS = (
    column("prompt_tokens", "prompt", "tokens of the prompt, mean"),
    column("generated_tokens", "generated", "tokens sampled, those thrown away later included, mean"),
    column("pruned_tokens", "pruned", "tokens thrown away by prunes, mean"),
    column("reforwarded_tokens", "re-forwarded", TWICE),
    column("live_tokens", "live at end", "prompt + generated - pruned when the response ended, mean"),
    column("prune_events", "prunes", "times that something was thrown away, mean", digits=1),
)
COSTS = (
    column("peak_live_tokens", "peak live", PEAK),
    column("peak_live_tokens_largest", "largest", "the same, largest of all responses", LARGEST_PEAK),
    column("mean_live_tokens", "mean live", "live tokens just after a generated token, mean over those", mean_live),
    column("kv_peak_mib", "KV peak", "MiB of keys and values of the largest peak, of one response",
           kv_mib(LARGEST_PEAK), 2),
    column("kv_area_mib_tokens", "KV area", AREA, kv_mib(mean("live_token_steps")), 1),
    column("wall_seconds", "seconds", "time spent generating all responses; those of a journal took none",
           totals("wall_seconds", sum), 1),
    column("tokens_per_second", "tokens/s", SPEED, totals("tokens_per_second", fmean)),
)  # fmt: skip


def ended(reason: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a response ended for a reason."""
    return lambda stats: stats["finish_reason"] == reason


FINISHES = {
    "eos": "that ended with the end token",
    "stop": "that ended at a stop string of the task",
    "length": "cut at the limit of generated tokens",
    "context": "cut at the window, the limit of live tokens",
    "loop": "cut because they repeated themselves (loop_tokens)",
}
ILLEGAL = "tokens that the grammar forbids at their place, ends and </think> within a block included, mean"
ENDS = (
    column("responses", "responses", "all that are counted here, of every seed", over(len, lambda stats: 1)),
    *(
        column(reason, reason, f"responses {meaning}", over(sum, ended(reason)))
        for reason, meaning in FINISHES.items()
    ),
    column("blocks", "blocks", "blocks closed, with a prune or without, mean", digits=1),
    column("max_depth", "depth", "most blocks open at once, largest of all responses",
           over(max, lambda stats: stats["max_depth"])),
    column("malformed", "malformed", "departures from the notation in a response, of all kinds together, mean",
           over(fmean, lambda stats: sum(stats["malformed"].values())), 2),
    column("illegal_tokens", "illegal", ILLEGAL, digits=2),
    # a cut response may have open blocks
    column("illegal_responses", "illegal %", "percent of the responses with at least one such token",
           over(lambda found: 100 * fmean(found), lambda stats: stats["illegal_tokens"] > 0), 1),
)  # fmt: skip
FORCED = {
    Cause.GRAMMAR: "tokens that the grammar changed, since the model wanted an illegal one",
    Cause.DEPTH: "openings of blocks that max_depth forbade",
    Cause.THOUGHT: "thoughts ended by max_block_tokens",
    Cause.SOLUTION: "solutions ended by max_solution_tokens",
    Cause.ENDING: "tokens that force_answer changed or forced",
}


def endings(entries: Sequence[Entry]) -> tuple[Column, ...]:
    """Returns columns of how responses ended and were written, one for each fault and each force that occurs."""
    requests = [stats for entry in entries for stats in entry.requests or ()]
    found = list(ENDS)
    if any(stats["loops"] for stats in requests):
        meaning = "responses in which a repetition was found (loop_tokens)"
        found.append(column("loops", "loops", meaning, over(sum, lambda stats: stats["loops"] > 0)))

    def kind(statistic: str, name: str) -> Callable[[Mapping[str, Any]], int]:
        return lambda stats: stats[statistic].get(name, 0)

    for cause in (cause for cause in FORCED if any(cause in stats["forced"] for stats in requests)):
        value = over(fmean, kind("forced", cause))
        found.append(column(f"forced_{cause}", f"forced: {cause}", f"{FORCED[cause]}, mean", value, 2))
    for fault in (fault for fault in Malformed if any(fault in stats["malformed"] for stats in requests)):
        found.append(column(fault, fault.replace("_", " "), fault.meaning, over(sum, kind("malformed", fault))))
    return tuple(found)


def columns_table(entries: Sequence[Entry], key: str, title: str, columns: Sequence[Column]) -> Table:
    """One row for each entry."""
    rows = [(entry.name, *(value(entry) for _, value in columns)) for entry in entries]
    return Table(key, title, (Head("run"), *(head for head, _ in columns)), tuple(rows))


# --- tests ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """A pair of entries and what was found."""

    task: str
    baseline: str
    name: str
    paired: Paired
    corrected_p: float


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
