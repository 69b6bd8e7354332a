"""The plots of a comparison, as PNG and SVG: what a window costs, what a budget buys, the saw-tooth, and blocks.

Curves over live context and over generated tokens answer the same question under two budgets: of all problems, which
share is answered right by a response that stayed within x? Each response has one peak and one length, so the curve is
exact; it is not what the model would have done had it been told of the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from hcot_lmeval.notes import SCHEMA, Note, NotesFile, RunNotes
from hcot_lmeval.report.statistics import estimate
from hcot_lmeval.report.tables import Entry
from hcot_lmeval.report.viewer.tree import Block, live_curve, outline_of
from hcot_lmeval.store import first_record

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

LINES = ("-", "--", ":", "-.")
"""Of the first seven runs, the next seven, and so on."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart under every common colour blindness."""
LOOKS: Any = cycler(linestyle=LINES) * (cycler(color=COLOURS) + cycler(marker=list("osD^vPX")))
STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": LOOKS,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "figure.figsize": (6.4, 3.4),  # inches, without the legend; a column and a half of a paper
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
LEGEND_ROW = 0.18
"""Inches of height for each row of a legend, which has two columns."""
DODGE = 0.025
"""Between lines of a plot by window, of the distance between two windows: equal values lie side by side."""
RESAMPLES = 2_000
BUDGETS = (
    ("accuracy-live", "peak_live_tokens", "live tokens allowed (peak of a response)"),
    ("accuracy-generated", "generated_tokens", "generated tokens allowed"),
)
"""Name of a plot, the statistic of a response that is its budget, and the label of that."""


@matplotlib.rc_context(STYLE)
def plot_task(task: str, entries: Sequence[Entry], directory: Path) -> list[Path]:
    """Draws every plot that the entries of a task have data for, and returns the files."""
    drawn: dict[str, Figure] = {}
    if any(entry.window for entry in entries):
        drawn["accuracy"] = by_window(entries, "accuracy", lambda entry: entry.scores)
        if any(entry.completed for entry in entries):
            drawn["completion"] = by_window(entries, "completed by itself", lambda entry: entry.completed)
    ours = roomiest([entry for entry in entries if entry.requests])
    for name, statistic, label in BUDGETS:
        if any(stats[statistic] for entry in ours for stats in entry.requests or ()):  # 0 has no place on a log scale
            drawn[name] = within(ours, statistic, label)
    read = ((entry.name, notes_of(entry)) for entry in ours)
    notes = {name: run for name, run in read if any(note.token_ids for note in run)}
    if notes:
        rule = [entry.name for entry in ours if entry.name in notes and entry.runs[0].setting("ablation") is None]
        drawn["live-context"] = live_context(notes, most_pruned(notes[name] for name in rule or notes))
    closed = {name: [block for note in run for block in closed_blocks(note)] for name, run in notes.items()}
    if any(closed.values()):
        drawn["blocks"] = blocks(closed)
    return [path for name, figure in drawn.items() for path in save(figure, directory / f"{task}-{name}")]


def roomiest(entries: Sequence[Entry]) -> list[Entry]:
    """Returns each family's entry with the largest window: what it does when the window does not end it."""
    families = dict.fromkeys(entry.family for entry in entries)
    alike = ([entry for entry in entries if entry.family == family] for family in families)
    return [max(family, key=lambda entry: entry.window or 0) for family in alike]


def by_window(entries: Sequence[Entry], label: str, values: Callable[[Entry], Mapping[int, float] | None]) -> Figure:
    """A share of problems over the context window, a line for each model, with 95 % intervals."""
    figure, axes = _figure("context window (most live tokens)", f"{label}, % of problems")
    windows = sorted({entry.window for entry in entries if entry.window})
    families = list(dict.fromkeys(entry.family for entry in entries))
    for i, (style, family) in enumerate(zip(itertools.cycle(LOOKS), families, strict=False)):
        mine = [entry for entry in entries if entry.family == family and values(entry)]
        if not mine:
            continue
        found = [estimate(list((values(entry) or {}).values()), resamples=RESAMPLES) for entry in mine]
        low, middle, high = 100 * np.array([(e.low, e.value, e.high) for e in found]).T
        spread = np.maximum(0.0, [middle - low, high - middle])
        beside = DODGE * (i - (len(families) - 1) / 2)
        places = [windows.index(entry.window) + beside for entry in mine if entry.window]
        if places:
            axes.errorbar(places, middle, spread, label=family, capsize=3, **style)
        else:  # a model without windows is a level that the others reach or do not
            axes.axhline(middle[0], label=family, color=style["color"], linestyle="--")
    axes.set_xticks(range(len(windows)), [str(window) for window in windows])
    axes.set_ylim(-4, 104)
    return _with_legend(figure, axes)


def within(entries: Sequence[Entry], statistic: str, label: str) -> Figure:
    """The share of problems answered right within a budget of x, a step curve for each entry."""
    figure, axes = _figure(label, "answered right, % of problems")
    curves = {entry.name: budget_curve(entry, statistic) for entry in entries}
    start, end = min(x[0] for x, _ in curves.values()), max(x[-1] for x, _ in curves.values())
    for name, (x, y) in curves.items():
        whole = np.concatenate([[start], x, [end]]), np.concatenate([[0.0], 100 * y, [100 * y[-1]]])
        axes.step(*whole, where="post", label=name, marker="")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(-4, 104)
    return _with_legend(figure, axes)


def budget_curve(entry: Entry, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns budgets, ascending, and the share of problems answered right within each of them.

    A problem that is answered several times counts by its share of right answers, each at the mean of its responses'
    statistic, since scores are kept per problem.
    """
    costs, scores = [], []
    for run in entry.runs:
        for sample in run.samples:
            costs.append(float(np.mean([stats[statistic] for stats in sample["requests"]])))
            scores.append(run.scores[sample["doc_id"]])
    order = np.argsort(costs, kind="stable")
    right = np.cumsum(np.array(scores)[order]) / len(scores)
    return np.array(costs)[order], right


def notes_of(entry: Entry) -> list[Note]:
    """Returns the notes of an entry's first run for its task, if the run took notes and they are still there.

    A folder may hold the notes of several runs, also of other versions.
    """
    run = entry.runs[0]
    where = (run.config.get("model_args") or {}).get("notes")
    paths = sorted(Path(str(where)).glob("*.jsonl")) if where and Path(str(where)).is_dir() else []
    readable = [path for path in paths if (first_record(path) or {}).get("schema") == SCHEMA]
    mine = [path for path in readable if run.agrees_with(NotesFile(path).run)]
    return [note for note in RunNotes(mine) if note.meta.get("task") == entry.task]


def live_context(notes: Mapping[str, Sequence[Note]], doc_id: Any) -> Figure:
    """Live tokens over generated tokens for one problem, a curve for each run: the saw-tooth.

    Where nothing is pruned, curves coincide for a long way; each of those has a line of its own kind, so that all show.

    Args:
        notes: name of a run -> its notes.
        doc_id: the problem: `most_pruned`, as the title says.
    """
    figure, axes = _figure("generated tokens", "live tokens")
    straight = itertools.cycle(LINES)
    for look, (name, run) in zip(itertools.cycle(LOOKS), notes.items(), strict=False):
        for note in [note for note in run if note.meta["doc_id"] == doc_id][:1]:
            line = {} if note.statistics.prune_events else {"linestyle": next(straight)}
            axes.plot(live_curve(note.events), label=name, **look | line | {"marker": ""}, linewidth=1.2)
    shown = [note for run in notes.values() for note in run if note.meta["doc_id"] == doc_id]
    why = (
        "of the response with most prunes"
        if any(note.statistics.prune_events for note in shown)
        else "of the longest response"
    )
    axes.set_title(f"problem {doc_id}, that {why}")
    axes.set_ylim(bottom=0)
    return _with_legend(figure, axes)


def most_pruned(runs: Iterable[Sequence[Note]]) -> Any:
    """Returns the doc_id of the response with most prunes in any of the runs; the longest of equal ones."""
    every = (note for run in runs for note in run)
    return max(every, key=lambda note: (note.statistics.prune_events, len(note.token_ids))).meta["doc_id"]


def closed_blocks(note: Note) -> list[Block]:
    """Returns the blocks of a response that were closed with a solution."""
    found = outline_of(len(note.prompt_ids), note.events).blocks
    return [block for block in found if block.close is not None and block.split is not None]


def blocks(closed: Mapping[str, Sequence[Block]]) -> Figure:
    """Distributions of the lengths of thoughts and solutions and of the depth of blocks, a line for each run.

    Runs that solve the same problems rightly may coincide; each line is thinner than the one before, so that all show.

    Args:
        closed: name of a run -> its blocks.
    """
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.0))
    looks = zip(itertools.cycle(LOOKS), np.linspace(4.0, 1.2, len(closed)), closed.items(), strict=False)
    for style, width, (name, found) in looks:
        lengths = ((block.thought, block.solution, block.depth) for block in found)
        for axes, values in zip(panels, zip(*lengths, strict=True), strict=False):  # of no blocks there are no values
            x, counts = np.unique(values, return_counts=True)
            share = 100 * np.cumsum([0, *counts]) / len(found)
            axes.step([x[0], *x], share, where="post", label=name, linewidth=width, **style | {"marker": ""})
    thoughts, solutions, depths = panels
    thoughts.set(xlabel="tokens of a thought", ylabel="% of blocks, at most")
    thoughts.set_xscale("symlog", base=2, linthresh=8)
    thoughts.xaxis.set_major_locator(LogLocator(base=4))
    thoughts.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes, label in ((solutions, "tokens of a solution"), (depths, "depth of a block")):
        axes.set(xlabel=label, xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _with_legend(figure, thoughts)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PNG and SVG, closes it, and returns the files."""
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".png", ".svg")]
    for path in paths:
        # without a date, so that the same data gives the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots()
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def _with_legend(figure: Figure, axes: Axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + LEGEND_ROW * math.ceil(len(handles) / 2))
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure
