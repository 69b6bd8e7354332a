"""Figures as text for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.choosing import ChoiceTime
from bench.floor import FloorTime
from bench.measure import Figures
from bench.output import aligned
from bench.prune_events import EventTime
from bench.work import GREEDY, Sampling, Work

NOTHING = "–"

COLUMNS: dict[str, tuple[str, str]] = {
    "tokens/s": ("tokens_per_second", ".1f"),
    "ms/step": ("step_ms", ".2f"),
    "of floor": ("of_floor", ".2f"),
    "of memory": ("of_memory", ".2f"),
    "x base": ("times_base", ".2f"),
    "ms/prune": ("prune_ms", ".2f"),
    "peak live": ("peak_live", "d"),
    "MiB": ("memory_mib", ".0f"),
}
"""Heading -> a field of `Figures`, and how it is written."""


def engine_table(
    figures: Sequence[Figures],
    floors: Sequence[FloorTime],
    work: Work,
    *,
    base: str = "generate",
    sampling: Sampling = GREEDY,
) -> str:
    """Returns the table of one piece of work, with the floor and the engines that did not run."""
    heading = f"batch {work.batch}: {work.tokens} tokens a row after a prompt of {work.prompt}, {sampling}"
    rows = [["engine", *(name.replace("base", base) for name in COLUMNS)], _floor_row(floors, work)]
    rows += [[f.engine, *(_cell(getattr(f, name), form) for name, form in COLUMNS.values())] for f in figures]
    notes = [] if any(work.prunes) else ["nothing is pruned: no row generates as far as its first return"]
    notes += [f"{f.engine}: not run: {f.reason}" for f in figures if f.reason]
    notes += [f"{f.engine}: wrote tokens of its own, not those of the script" for f in figures if not f.forced]
    notes += [f"{f.engine}: ms/step is the mean of all steps, prune events included" for f in figures if f.mean]
    return "\n".join([heading, *aligned(rows), _floor_note(floors), *notes])


def _cell(value: Any, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _floor_row(floors: Sequence[FloorTime], work: Work) -> list[str]:
    """The floor as if it were an engine."""
    seconds = statistics.median(floor.seconds for floor in floors)
    memory = statistics.median(floor.memory / floor.seconds for floor in floors)
    cells = {"tokens/s": f"{work.batch / seconds:.1f}", "ms/step": f"{1000 * seconds:.2f}", "of floor": "1.00"}
    cells["of memory"] = f"{memory:.2f}"
    return ["floor", *(cells.get(heading, NOTHING) for heading in COLUMNS)]


def _floor_note(floors: Sequence[FloorTime]) -> str:
    """Which kind of product was the fastest, and what its share is."""
    times = {kind: 1000 * statistics.median(floor.weights[kind] for floor in floors) for kind in floors[0].weights}
    kinds = ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in sorted(times.items(), key=lambda item: item[1]))
    kv, read = (1000 * statistics.median(getattr(floor, name) for floor in floors) for name in ("kv", "read"))
    return (
        f"floor: weights by {kinds} (the fastest counts), live keys and values {kv:.2f} ms; weights read {read:.2f} ms"
    )


def best_table(made: Sequence[tuple[Work, Sequence[Figures]]], *, base: str = "generate") -> str:
    """Returns whole runs of all pieces of work beside the best of one engine, whatever its batch; empty without it."""
    of_base = [(f.tokens_per_second, work.batch) for work, figures in made for f in figures if f.engine == base]
    known = [(speed, batch) for speed, batch in of_base if speed is not None]
    if len(made) < 2 or not known:
        return ""
    best, batch = max(known)
    rows = [["engine", "batch", "peak live", "tokens/s", "x best"]]
    for work, figures in made:
        for f in figures:
            if f.tokens_per_second is not None:
                speeds = f"{f.tokens_per_second:.1f}", f"{f.tokens_per_second / best:.2f}"
                rows.append([f.engine, str(work.batch), _cell(f.peak_live, "d"), *speeds])
    return "\n".join([f"beside the best batch of {base}, {batch}, at {best:.1f} tokens/s", *aligned(rows)])


def choice_table(choices: Sequence[ChoiceTime]) -> str:
    """Returns milliseconds by batch and setting, a column for each way that ran, and the reasons of the others."""
    ways = list(dict.fromkeys(choice.way for choice in choices if not choice.reason))
    rows = [["settings", "batch", *ways]]
    for batch, sampling in dict.fromkeys((choice.batch, choice.sampling) for choice in choices):
        times = {c.way: f"{c.ms:.2f}" for c in choices if (c.batch, c.sampling) == (batch, sampling) and not c.reason}
        rows.append([str(sampling), str(batch), *(times[way] for way in ways)])
    notes = dict.fromkeys(f"{choice.way}: not run: {choice.reason}" for choice in choices if choice.reason)
    return "\n".join([*aligned(rows), *notes])


def event_table(events: Sequence[EventTime]) -> str:
    """Returns the curve of prune events: a line for each place, and the range of the ratios."""
    rows = [["solution", "context", "thought", "ms/event", "ms/prefill", "ratio"]]
    for event in events:
        times = [1000 * statistics.median(seconds) for seconds in (event.events, event.prefills)]
        rows.append([*map(str, event.place), *(f"{ms:.2f}" for ms in times), f"{event.ratio:.2f}"])
    ratios = [event.ratio for event in events]
    median = statistics.median(ratios)
    return "\n".join([*aligned(rows), f"ratio: median {median:.2f}, {min(ratios):.2f} to {max(ratios):.2f}"])
