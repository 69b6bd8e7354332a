"""The curves of a run: every logged number as a line of JSON, and a picture of them.

    curves = Curves(path, resumed_from=None)
    curves.append({"step": 10, "cross_entropy": 2.3})
    curves.append({"step": 10, "eval_loss": 2.4, "eval_accuracy": 0.1})
    save_figure(curves.records, "curves.png", phases=[(0, "off"), (500, "recompute")], best_step=10)

A record is a dict of numbers with the key ``step``, optimiser steps taken; what was measured on held-out data has the
prefix ``eval_``. Several records may share a step. Drawing needs matplotlib, which is imported when it is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hcot_lmeval.store import JsonLines, StoreError, line_of, replacing, scan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

LOG_SCALE_FROM = 20.0
"""Ratio of the largest to the smallest loss from which on the axis is logarithmic, so that the late part shows."""


class Curves:
    """A JSONL file of records that survives being killed at any time.

    A line is on the disk when `append` returns. A last line cut off by a crash is dropped, and with it every record
    beyond the step that the run resumes from, since those steps are taken again. Numbers that are not finite are
    written as null, which all readers of JSON understand.

    Args:
        path: the file; it is made anew unless the run resumes.
        resumed_from: the step of the checkpoint that training goes on from, whose own records stay, for they were
            written before the checkpoint was; None for a run that starts.

    Attributes:
        records: all records so far, oldest first.

    Raises:
        StoreError: a line of the file, other than the last, is no record.
    """

    def __init__(self, path: Path | str, resumed_from: int | None = None) -> None:
        self.path = Path(path)
        found = [] if resumed_from is None else read_records(self.path)
        self.records = [record for record in found if record["step"] <= (resumed_from or 0)]
        with replacing(self.path) as draft:
            draft.write_bytes(b"".join(line_of(_plain(record)) for record in self.records))
        self._store = JsonLines(self.path)

    def append(self, record: Record) -> None:
        """Adds a record.

        Raises:
            ValueError: it has no step.
        """
        if not isinstance(record.get("step"), int):
            raise ValueError(f"the record {dict(record)!r:.200} needs the key 'step' with an int")
        self._store.append(_plain(record))
        self.records.append(dict(record))


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Returns the records in a file, null as NaN; none if there is no file. A last line without its end is left out.

    Raises:
        StoreError: a line is no record.
    """
    records = [record for _, record in scan(path)] if Path(path).exists() else []
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("step"), int):
            raise StoreError(f"{path}:{number} is no record, for it has no step; mend or remove the line")
    return [{key: math.nan if value is None else value for key, value in record.items()} for record in records]


def series(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """Returns steps, ascending, and values of `key`; the last record counts where a step has several."""
    found = {record["step"]: float(record[key]) for record in records if record.get(key) is not None}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def with_train_loss(record: Record) -> Record:
    """Returns the record with its training loss, if any, as `TRAIN`: the cross-entropy alone where told apart."""
    value = record.get("cross_entropy", record.get("loss"))
    return record if value is None else {**record, TRAIN: float(value)}


# --- the picture ------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A plot.

    Attributes:
        title: what is shown.
        unit: label of the vertical axis.
        lines: key of a record to the label in the legend.
        factor: multiplies the values.
    """

    title: str
    unit: str
    lines: dict[str, str]
    factor: float = 1.0


RATED = "correctness structure compression peak area length depth form".split()
"""The rewards that come with the package."""
TRAIN = "train_cross_entropy"
"""The key under which a record's training loss is drawn, whichever key it has there."""
LOSSES = Panel("Loss", "nats per token", {TRAIN: "training", "eval_loss": "held out"})
CLASSES = Panel(
    "Held-out loss by class of token",
    "nats per token",
    {
        "eval_loss_text": "text",
        "eval_loss_markers": "markers",
        "eval_loss_solution": "solution",
        "eval_loss_answer": "answer",
        "eval_structure": "structure term",
    },
)
GENERATION = Panel(
    "Generation on held-out problems",
    "% of the problems",
    {
        "eval_accuracy": "solved",
        "eval_completion": "came to an end",
        "eval_illegal_traces": "illegal trace",
        "eval_incomplete_traces": "cut within a block",
    },
    factor=100.0,
)
TOKENS = Panel(
    "Length of the generations",
    "tokens per problem",
    {"eval_generated_tokens": "generated", "eval_peak_live_tokens": "most live at once"},
)


PANELS = (LOSSES, CLASSES, GENERATION, TOKENS)
"""Of supervised training."""
REWARDS = Panel("Reward", "mean", {"reward": "weighted sum"} | {f"rewards/{name}": name for name in RATED})
SHAPE = Panel(
    "What the policy writes",
    "mean of the completions",
    {"rollout/blocks": "blocks", "rollout/depth": "depth", "rollout/illegal_tokens": "illegal tokens"},
)
RL_PANELS = (REWARDS, SHAPE, GENERATION, TOKENS)
"""Of reinforcement learning."""


def draw(
    records: Sequence[Record],
    *,
    phases: Sequence[tuple[int, str]] = (),
    best_step: int | None = None,
    panels: Sequence[Panel] = PANELS,
) -> Figure:
    """Draws the curves of a run.

    Args:
        records: in any order.
        phases: of the curriculum: the step at which each starts and its name.
        best_step: the step of the best checkpoint.
        panels: four of them; by default losses, held-out losses by class, generation, lengths.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")  # not pyplot, which keeps figures and picks a display
    FigureCanvasAgg(figure)
    records = [with_train_loss(record) for record in records]
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _draw_panel(axes, panel, records)
        _mark(axes, phases, best_step)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    return figure


def save_figure(
    records: Sequence[Record],
    path: Path | str,
    *,
    phases: Sequence[tuple[int, str]] = (),
    best_step: int | None = None,
    panels: Sequence[Panel] = PANELS,
) -> None:
    """Writes the picture that `draw` makes of the same arguments as PNG; a reader never meets half a file."""
    figure = draw(records, phases=phases, best_step=best_step, panels=panels)
    with replacing(path) as draft:
        figure.savefig(draft, format="png", dpi=120)


def _draw_panel(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    axes.set(xlabel="optimiser steps", ylabel=panel.unit)
    axes.set_title(panel.title, pad=18)  # room for the names of the phases
    axes.grid(alpha=0.3)
    finite: list[float] = []
    for key, label in panel.lines.items():
        steps, values = series(records, key)
        values = [panel.factor * value for value in values]
        finite += [value for value in values if math.isfinite(value)]
        if steps:
            axes.plot(steps, values, label=label, marker="." if len(steps) < 100 else None)
    if not finite:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="grey")
    elif panel.unit == LOSSES.unit and max(finite) > LOG_SCALE_FROM * min(finite) > 0:
        axes.set_yscale("log")
    elif panel is GENERATION:
        axes.set_ylim(-3, 103)
    else:
        axes.set_ylim(bottom=min(0.0, *finite))


def _mark(axes: Axes, phases: Sequence[tuple[int, str]], best_step: int | None) -> None:
    place = axes.get_xaxis_transform()  # x in steps, y as a share of the height
    for step, name in phases:
        axes.axvline(step, color="grey", linestyle="--", linewidth=1)
        axes.text(step, 1.01, name, transform=place, fontsize="small", color="grey")  # above, where no legend is
    if best_step is not None:
        axes.axvline(best_step, color="green", linestyle=":", label=f"best checkpoint ({best_step})")


def _plain(record: Record) -> Record:
    """Numbers that are not finite as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
