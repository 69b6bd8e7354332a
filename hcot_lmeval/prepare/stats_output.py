"""The statistics of a prepared data set as tables, plots (PNG and SVG) and a page that shows rows before and after."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hcot_lmeval.markup import get_markup
from hcot_lmeval.prepare.measure import counter_name
from hcot_lmeval.prepare.rows import PreparedRow, Unreadable
from hcot_lmeval.prepare.stats import OF_BLOCKS, OF_POLICIES, OF_ROWS, Distribution, Stats
from hcot_lmeval.report import render
from hcot_lmeval.report.tables import Head, Table
from hcot_lmeval.report.viewer.page import write_page
from hcot_lmeval.report.viewer.reading import Source, plain_traces, tokenizer_cut
from hcot_lmeval.report.viewer.verdicts import Verdicts
from hcot_lmeval.store import write_json
from hcot_lmeval.trace import Policy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (9.6, 3.2)
"""Inches, of three plots side by side or two."""
SUMMED = frozenset({"question", "original", "trace", "response", "blocks", "thought", "solution"})
"""Numbers whose sum means something."""
SHOWN = {"before": ("original", Policy.OFF), "after": ("hierarchical_cot", Policy.RECOMPUTE)}
"""What the page calls its two sides -> the column of each, and the policy under which it is shown."""


def write_stats(stats: Stats, path: Path, rows: Sequence[PreparedRow] = ()) -> list[Path]:
    """Writes tables, plots and, if there are `rows` for one, the page into a folder, and returns the files."""
    path.mkdir(parents=True, exist_ok=True)
    tables = make_tables(stats)
    texts = {"stats.md": "\n".join(render.markdown(table) for table in tables)}
    texts |= {f"{table.key}.csv": render.csv_text(table) for table in tables}
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    values = {table.key: render.json_value(table) for table in tables}
    write_json(path / "stats.json", stats.as_dict() | {"tables": values})
    written = [path / name for name in (*texts, "stats.json")]
    if stats.options.plots:
        written += _plots(stats, path)
    if rows:
        written.append(_page(stats, path, rows))
    return written


def page_rows(rows: Iterable[PreparedRow | Unreadable], number: int) -> list[PreparedRow]:
    """Returns the first rows that a page can show: those whose original is known."""
    fit = (row for row in rows if isinstance(row, PreparedRow) and row.source.reasoning)
    return list(islice(fit, number))


def _page(stats: Stats, path: Path, rows: Sequence[PreparedRow]) -> Path:
    sample, page, options = path / "page-rows.jsonl", path / "before-after.html", stats.options
    with sample.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.record()) + "\n" for row in rows)
    cut = tokenizer_cut(options.tokenizer) if options.tokenizer else None
    sources = {name: Source(name, (sample,)) for name in SHOWN}
    traces = [
        trace
        for name, (column, policy) in SHOWN.items()
        for trace in plain_traces(sources[name], get_markup(options.markup), policy, {"text": column}, cut)
    ]
    write_page(page, traces, list(sources.values()), Verdicts(), "before and after")
    sample.unlink()
    return page


# --- tables -----------------------------------------------------------------------------------------------------------


def make_tables(stats: Stats) -> list[Table]:
    """Returns the tables for which there is something to say."""
    made = [_rows_table(stats), _policies_table(stats)]
    if stats.history:
        made += [_steps_table(stats), _reasons_table(stats), _teacher_table(stats)]
    return [table for table in made if table.rows]


def _rows_table(stats: Stats) -> Table:
    quantiles = (Head("mean", digits=1), Head("least"), Head("median"), Head("p90"), Head("most"))
    heads = (Head(""), *quantiles, Head("sum"), Head("n", "rows, or blocks"))
    names = {name: meaning for name, meaning in {**OF_ROWS, **OF_BLOCKS}.items() if name in stats.numbers}
    rows = []
    for name in names:
        found = stats.of(name)
        cells = (found.mean, *(found.quantile(share) for share in (0, 0.5, 0.9, 1)))
        rows.append((name, *cells, found.sum if name in SUMMED else None, found.size))
    meanings = (f"{name}: {meaning}" for name, meaning in names.items())
    notes = (*meanings, f"counted in {counter_name(stats.options.tokenizer)}", *_left_out(stats))
    return Table("rows", f"Traces: {stats.rows} rows", heads, tuple(rows), notes)


def _left_out(stats: Stats) -> Iterator[str]:
    if stats.unreadable:
        yield f"{stats.unreadable} rows could not be read"
    if malformed := stats.of("malformed").sum:
        yield f"{malformed} rows have malformed blocks, which count as none"


def _policies_table(stats: Stats) -> Table:
    heads = (
        Head("policy"),
        Head("peak mean", "largest number of live tokens of a row, question included", 0, key="peak_mean"),
        *(Head(f"peak {name}", key=f"peak_{name}") for name in ("median", "p90", "max")),
        Head("peak % of off", "mean peak over that without pruning", key="peak_percent"),
        Head("forwarded mean", "tokens that go through the model for a row", key="forwarded_mean"),
        Head("forwarded sum", key="forwarded_sum"),
        Head("forwarded % of off", "forwarded tokens over those without pruning", key="forwarded_percent"),
    )
    off = {what: stats.of(f"off {what}").sum or 1 for what in OF_POLICIES}
    rows = []
    for policy in Policy:
        peak, forwarded = (stats.of(f"{policy.value} {what}") for what in OF_POLICIES)
        quantiles = (peak.quantile(share) for share in (0.5, 0.9, 1))
        shares = (100 * peak.sum / off["peak"], 100 * forwarded.sum / off["forwarded"])
        rows.append((policy.value, peak.mean, *quantiles, shares[0], forwarded.mean, forwarded.sum, shares[1]))
    counted = f"counted in {counter_name(stats.options.tokenizer)}"
    notes = (counted, "recompute reads solutions again without thoughts")
    return Table("policies", "Live context and forwarded tokens under each policy", heads, tuple(rows), notes)


def _steps_table(stats: Stats) -> Table:
    heads = (Head("step"), Head("rows"), Head("passed"), Head("rejected"), Head("repaired", "rows"))
    rows = []
    for manifest in stats.history:
        summary = manifest["summary"]
        counts = (summary.get(name) for name in ("rows", "passed", "rejected"))
        rows.append((manifest["step"], *counts, summary.get("repaired", {}).get("rows")))
    return Table("steps", "Steps", heads, tuple(rows))


def _reasons_table(stats: Stats) -> Table:
    rows = [
        (manifest["step"], code, found["rows"], found["meaning"])
        for manifest in stats.history
        for code, found in manifest["summary"].get("reasons", {}).items()
    ]
    heads = (Head("step"), Head("reason"), Head("rows"), Head("meaning"))
    return Table("reasons", "Why rows were rejected", heads, tuple(rows))


def _teacher_table(stats: Stats) -> Table:
    spent = [(m["step"], m["summary"]["teacher"]) for m in stats.history if m["summary"].get("teacher")]
    keys = list(dict.fromkeys(key for _, found in spent for key in found))
    heads = (Head("step"), *(Head(key, digits=4 if key == "usd" else 0) for key in keys))
    rows = tuple((step, *(found.get(key) for key in keys)) for step, found in spent)
    return Table("teacher", "What the teacher cost", heads, rows)


# --- plots ------------------------------------------------------------------------------------------------------------


def _plots(stats: Stats, directory: Path) -> list[Path]:
    """Draws every plot that there are numbers for, and returns the files."""
    from hcot_lmeval.report.plots import save

    figures = {}
    if stats.scatter:
        figures["live"] = _live(stats)
    if stats.of("thought").size:
        figures["blocks"] = _blocks(stats)
    return [path for name, figure in figures.items() for path in save(figure, directory / name)]


def _live(stats: Stats) -> Figure:
    """The peak of live tokens: how it is distributed under each policy, and beside the full length of a trace."""
    import matplotlib.pyplot as plt

    from hcot_lmeval.report.plots import COLOURS, LINES

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


def _blocks(stats: Stats) -> Figure:
    """Distributions of the lengths of thoughts and solutions, and of the number of blocks of a row."""
    import matplotlib.pyplot as plt

    from hcot_lmeval.report.plots import COLOURS

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
