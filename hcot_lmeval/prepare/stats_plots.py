"""The plots of a prepared data set, as PNG and SVG: what pruning leaves live, and how long blocks are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hcot_lmeval.report.plots import COLOURS, LINES, save
from hcot_lmeval.trace import Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hcot_lmeval.prepare.stats import Distribution, Stats

SIZE = (9.6, 3.2)
"""Inches, of three plots side by side or two."""


def plot_stats(stats: Stats, directory: Path) -> list[Path]:
    """Draws every plot that there are numbers for, and returns the files."""
    figures = {}
    if stats.scatter:
        figures["live"] = live(stats)
    if stats.numbers.get("thought") and stats.numbers["thought"].size:
        figures["blocks"] = blocks(stats)
    return [path for name, figure in figures.items() for path in save(figure, directory / name)]


def live(stats: Stats) -> Figure:
    """The peak of live tokens: how it is distributed under each policy, and beside the full length of a trace."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    for colour, line, policy in zip(COLOURS, LINES, Policy, strict=False):
        _steps(left, stats.numbers[f"{policy.value} peak"], colour, policy.value, line)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(left, "peak of live tokens", "% of rows, at most")
    left.legend(frameon=False, fontsize=8)
    full, pruned = np.array(stats.scatter).T
    right.plot(full, pruned, ".", markersize=4, alpha=0.4, color=COLOURS[0])
    right.axline((0, 0), slope=1, color="0.6", linewidth=1, linestyle="--")
    right.set_xlim(0, 1.05 * full.max())
    right.set_ylim(0, 1.05 * full.max())
    _dress(right, "peak without pruning", "peak under recompute")
    return figure


def blocks(stats: Stats) -> Figure:
    """Distributions of the lengths of thoughts and solutions, and of the number of blocks of a row."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=SIZE, layout="constrained")
    titles = {"thought": "tokens of a thought", "solution": "tokens of a solution", "blocks": "blocks of a row"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        _steps(axes, stats.numbers[name], COLOURS[0])
        _dress(axes, title, f"% of {'rows' if name == 'blocks' else 'blocks'}, at most")
        axes.set_xlim(left=0)
    return figure


def _steps(axes: Axes, found: Distribution, colour: str, label: str | None = None, line: str = "-") -> None:
    values = np.array(sorted(found.counts))
    shares = 100 * np.cumsum([found.counts[int(value)] for value in values]) / found.size
    axes.step(values, shares, where="post", color=colour, linestyle=line, label=label)


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
