"""What a prepared data set is made of, and what it costs to decode or train on under each policy.

Rows are measured one at a time; what is kept is how often each number occurs, so that quantiles are exact and memory
does not grow with the rows. A row counts as it is trained on: the question, the trace between its thinking tokens, the
response. The tokens of a chat template and the end token are not counted.

This module imports the standard library alone; tables and plots come with the report's libraries.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hcot_lmeval.markup import Markup, get_markup
from hcot_lmeval.prepare.measure import Counter as TokenCounter
from hcot_lmeval.prepare.measure import (
    CountOptions,
    Stretch,
    block_sizes,
    costs,
    counter_name,
    cut,
    is_legal,
    make_counter,
)
from hcot_lmeval.prepare.rows import PreparedRow, Unreadable
from hcot_lmeval.prepare.steps import in_order
from hcot_lmeval.store import write_json
from hcot_lmeval.trace import Policy

if TYPE_CHECKING:
    from hcot_lmeval.report.tables import Table

OF_ROWS = {
    "question": "tokens of the question",
    "original": "tokens of the original reasoning",
    "trace": "tokens of the trace, markers and thoughts included",
    "response": "tokens behind the thinking section",
    "blocks": "blocks of a trace",
    "depth": "blocks within each other",
    "added": "tokens that the trace has beyond the original: markers and added solutions, in percent of the original",
    "kept": "live tokens at the end under recompute, in percent of those without pruning",
    "peak_share": "peak of live tokens under recompute, in percent of that without pruning",
}
"""Number of a row -> what it counts."""
OF_BLOCKS = {
    "thought": "tokens of a thought, blocks within included",
    "solution": "tokens of a solution",
    "ratio": "solution in percent of its thought",
}
"""Number of a block -> what it counts."""
OF_POLICIES = ("peak", "forwarded")
SCATTER = 5000
"""Rows whose peak and length are kept for the plot, the first ones."""


class StatsOptions(CountOptions, title="statistics"):
    """How rows are counted and shown."""

    page_rows: int = Field(50, ge=0, description="rows on the page that shows before and after; 0: no page")
    plots: bool = Field(True, description="draw plots")


Measures = dict[str, list[int]]
"""Name of a number -> its values in one row: one for each row, policy or block."""


@dataclass(frozen=True)
class Measuring:
    """Makes the function that measures a row."""

    options: StatsOptions

    def __call__(self) -> Callable[[PreparedRow | Unreadable], Measures | None]:
        return partial(measure, count=make_counter(self.options.tokenizer), markup=get_markup(self.options.markup))


def measure(row: PreparedRow | Unreadable, count: TokenCounter, markup: Markup) -> Measures | None:
    """Returns the numbers of a row; None for one that cannot be read."""
    if isinstance(row, Unreadable):
        return None
    trace = cut(row.trace, markup, count)
    question, original, response = count([row.source.question, row.source.reasoning, row.source.response])
    begin, end = markup.think
    whole = [Stretch(begin, begin, 1), *trace, Stretch(end, end, 1), Stretch("", row.source.response, response)]
    found = {policy: cost for policy, cost in costs(whole, question, markup).items()}
    tokens = sum(stretch.tokens for stretch in trace)
    blocks = block_sizes(trace, markup) if is_legal(trace, markup) else []
    off, on = found[Policy.OFF], found[Policy.RECOMPUTE]
    numbers = {
        "question": [question],
        "original": [original] if original else [],
        "trace": [tokens],
        "response": [response],
        "blocks": [len(blocks)],
        "depth": [max((block.depth for block in blocks), default=0)],
        "added": [percent(tokens - original, original)] if original else [],
        "kept": [percent(on.live, off.live)],
        "peak_share": [percent(on.peak, off.peak)],
        "thought": [block.thought for block in blocks],
        "solution": [block.solution for block in blocks],
        "ratio": [percent(block.solution, block.thought) for block in blocks],
        "malformed": [int(not is_legal(trace, markup))],
    }
    return numbers | {f"{p.value} {what}": [getattr(c, what)] for p, c in found.items() for what in OF_POLICIES}


def percent(part: int, whole: int) -> int:
    """Returns a share in whole percent."""
    return round(100 * part / whole) if whole else 0


@dataclass
class Distribution:
    """How often each number occurs."""

    counts: Counter[int] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return self.counts.total()

    @property
    def sum(self) -> int:
        return sum(value * times for value, times in self.counts.items())

    @property
    def mean(self) -> float | None:
        return self.sum / self.size if self.size else None

    def quantile(self, share: float) -> int | None:
        """Returns the smallest number that at least `share` of all do not exceed; None if there are none."""
        seen, wanted = 0, share * self.size
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= wanted:
                return value
        return None

    def as_dict(self) -> dict[str, Any]:
        quantiles = {f"p{round(100 * share)}": self.quantile(share) for share in (0, 0.1, 0.5, 0.9, 1)}
        return {"n": self.size, "sum": self.sum, "mean": self.mean, **quantiles}


@dataclass
class Stats:
    """The numbers of a data set.

    Attributes:
        options: how they were counted.
        rows: how many were read.
        unreadable: how many could not be.
        first_fault: where the first of them is, and what is wrong with it.
        numbers: name -> distribution.
        scatter: of the first rows, peak without and with pruning.
        history: the manifests of the steps that made the rows.
    """

    options: StatsOptions
    rows: int = 0
    unreadable: int = 0
    first_fault: str = ""
    numbers: dict[str, Distribution] = field(default_factory=dict)
    scatter: list[tuple[int, int]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(self, found: Measures | None) -> None:
        """Counts a row."""
        self.rows += 1
        if found is None:
            self.unreadable += 1
            return
        for name, values in found.items():
            self.numbers.setdefault(name, Distribution()).counts.update(values)
        if len(self.scatter) < SCATTER:
            self.scatter.append((found["off peak"][0], found["recompute peak"][0]))

    def tables(self) -> list[Table]:
        """Returns the tables for which there is something to say."""
        made = [self._rows_table(), self._policies_table(), self._steps_table(), self._reasons_table()]
        return [table for table in (*made, self._teacher_table()) if table is not None]

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        return {
            "rows": self.rows,
            "unreadable": self.unreadable,
            "counted": counter_name(self.options.tokenizer),
            "numbers": {name: found.as_dict() for name, found in self.numbers.items()},
            "steps": [{"step": m["step"], **m["summary"]} for m in self.history],
        }

    def _rows_table(self) -> Table:
        from hcot_lmeval.report.tables import Head, Table

        quantiles = (Head("mean", digits=1), Head("least"), Head("median"), Head("p90"), Head("most"))
        heads = (Head(""), *quantiles, Head("sum"), Head("n", "rows, or blocks"))
        names = {**OF_ROWS, **OF_BLOCKS}
        rows = [
            (name, *self._cells(name), self._of(name).sum if name in _SUMMED else None, self._of(name).size)
            for name in names
            if name in self.numbers
        ]
        told = (f"{name}: {meaning}" for name, meaning in names.items() if name in self.numbers)
        notes = (*told, f"counted in {counter_name(self.options.tokenizer)}", *self._left_out())
        return Table("rows", f"Traces: {self.rows} rows", heads, tuple(rows), notes)

    def _left_out(self) -> Iterator[str]:
        if self.unreadable:
            yield f"{self.unreadable} rows could not be read"
        if malformed := self._of("malformed").sum:
            yield f"{malformed} rows have malformed blocks, which count as none"

    def _policies_table(self) -> Table:
        from hcot_lmeval.report.tables import Head, Table

        off = {what: self._of(f"off {what}").sum or 1 for what in OF_POLICIES}
        heads = (
            Head("policy"),
            Head("peak mean", "largest number of live tokens of a row, question included", 0, key="peak_mean"),
            *(Head(f"peak {name}", key=f"peak_{name}") for name in ("median", "p90", "max")),
            Head("peak % of off", "mean peak over that without pruning", key="peak_percent"),
            Head("forwarded mean", "tokens that go through the model for a row", key="forwarded_mean"),
            Head("forwarded sum", key="forwarded_sum"),
            Head("forwarded % of off", "forwarded tokens over those without pruning", key="forwarded_percent"),
        )
        rows = []
        for policy in Policy:
            peak, forwarded = (self._of(f"{policy.value} {what}") for what in OF_POLICIES)
            quantiles = (peak.quantile(share) for share in (0.5, 0.9, 1))
            shares = (100 * peak.sum / off["peak"], 100 * forwarded.sum / off["forwarded"])
            rows.append((policy.value, peak.mean, *quantiles, shares[0], forwarded.mean, forwarded.sum, shares[1]))
        notes = (
            f"counted in {counter_name(self.options.tokenizer)}",
            "recompute reads solutions again without thoughts",
        )
        return Table("policies", "Live context and forwarded tokens under each policy", heads, tuple(rows), notes)

    def _steps_table(self) -> Table | None:
        from hcot_lmeval.report.tables import Head, Table

        if not self.history:
            return None
        heads = (Head("step"), Head("rows"), Head("passed"), Head("rejected"), Head("repaired", "rows"))
        rows = [
            (m["step"], s.get("rows"), s.get("passed"), s.get("rejected"), s.get("repaired", {}).get("rows"))
            for m in self.history
            for s in [m["summary"]]
        ]
        return Table("steps", "Steps", heads, tuple(rows))

    def _reasons_table(self) -> Table | None:
        from hcot_lmeval.report.tables import Head, Table

        rows = [
            (m["step"], code, found["rows"], found["meaning"])
            for m in self.history
            for code, found in m["summary"].get("reasons", {}).items()
        ]
        heads = (Head("step"), Head("reason"), Head("rows"), Head("meaning"))
        return Table("reasons", "Why rows were rejected", heads, tuple(rows)) if rows else None

    def _teacher_table(self) -> Table | None:
        from hcot_lmeval.report.tables import Head, Table

        spent = [(m["step"], m["summary"]["teacher"]) for m in self.history if m["summary"].get("teacher")]
        keys = list(dict.fromkeys(key for _, found in spent for key, value in found.items() if not _is_nested(value)))
        heads = (Head("step"), *(Head(key, digits=4 if key == "usd" else 0) for key in keys))
        rows = tuple((step, *(found.get(key) for key in keys)) for step, found in spent)
        return Table("teacher", "What the teacher cost", heads, rows) if rows else None

    def _of(self, name: str) -> Distribution:
        return self.numbers.get(name, Distribution())

    def _cells(self, name: str) -> tuple[float | None, ...]:
        found = self._of(name)
        return (found.mean, *(found.quantile(share) for share in (0, 0.5, 0.9, 1)))


_SUMMED = frozenset({"question", "original", "trace", "response", "blocks", "thought", "solution"})


def _is_nested(value: Any) -> bool:
    return isinstance(value, (dict, list))


def gather(
    rows: Iterable[PreparedRow | Unreadable],
    options: StatsOptions,
    workers: int = 1,
    tick: Callable[[], Any] = lambda: None,
) -> Stats:
    """Measures rows.

    Args:
        rows: of any number; read as they are needed.
        options: how to count.
        workers: processes.
        tick: is called after each row.
    """
    stats = Stats(options)
    for row, found in in_order(rows, Measuring(options), workers):
        stats.add(found)
        if isinstance(row, Unreadable):
            stats.first_fault = stats.first_fault or f"{row.where}: {row.code} ({row.detail})"
        tick()
    return stats


def write_stats(stats: Stats, path: Path, rows: Sequence[PreparedRow] = ()) -> list[Path]:
    """Writes tables, plots and the page below `path` and returns the files.

    Args:
        stats: of all rows.
        path: the folder; it is made.
        rows: those for the page.
    """
    from hcot_lmeval.report import render

    path.mkdir(parents=True, exist_ok=True)
    tables = stats.tables()
    texts = {"stats.md": "\n".join(render.markdown(table) for table in tables)}
    texts |= {f"{table.key}.csv": render.csv_text(table) for table in tables}
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    values = {table.key: render.json_value(table) for table in tables}
    write_json(path / "stats.json", stats.as_dict() | {"tables": values})
    written = [path / name for name in (*texts, "stats.json")]
    if stats.options.plots:
        from hcot_lmeval.prepare.stats_plots import plot_stats

        written += plot_stats(stats, path)
    if rows:
        written.append(write_page(rows, path, stats.options))
    return written


def write_page(rows: Sequence[PreparedRow], path: Path, options: StatsOptions) -> Path:
    """Writes the page that shows rows before and after, side by side, and returns its file."""
    from hcot_lmeval.report.viewer.page import write_page as build
    from hcot_lmeval.report.viewer.reading import Columns, Source, plain_traces, tokenizer_cut
    from hcot_lmeval.report.viewer.verdicts import Verdicts

    sample = path / "page-rows.jsonl"
    with sample.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.record()) + "\n" for row in rows)
    markup = get_markup(options.markup)
    cut = tokenizer_cut(options.tokenizer) if options.tokenizer else None
    shown = [("before", "original", Policy.OFF), ("after", "hierarchical_cot", Policy.RECOMPUTE)]
    sources = [Source(name, (sample,)) for name, _, _ in shown]
    traces = [
        trace
        for source, (_, column, policy) in zip(sources, shown, strict=True)
        for trace in plain_traces(source, markup, policy, Columns(text=column), cut)
    ]
    page = path / "before-after.html"
    build(page, traces, sources, Verdicts(), "before and after")
    sample.unlink()
    return page


def page_rows(rows: Iterable[PreparedRow | Unreadable], number: int) -> list[PreparedRow]:
    """Returns the first rows that a page can show: those whose original is known."""
    fit = (row for row in rows if isinstance(row, PreparedRow) and row.source.reasoning)
    return list(islice(fit, number))
