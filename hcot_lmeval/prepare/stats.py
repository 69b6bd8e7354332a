"""What a prepared data set is made of, and what it costs to decode or train on under each policy.

Rows are measured one at a time; what is kept is how often each number occurs, so that quantiles are exact and memory
does not grow with the rows. A row counts as it is trained on: the question, the trace between its thinking tokens, the
response. The tokens of a chat template and the end token are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

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
from hcot_lmeval.report import render
from hcot_lmeval.report.tables import Head, Table
from hcot_lmeval.store import write_json
from hcot_lmeval.trace import Policy

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

Measures = dict[str, list[int]]
"""Name of a number -> its values in one row: one for each row, policy or block."""


def _make_measure(options: CountOptions) -> Callable[[PreparedRow | Unreadable], Measures | None]:
    return partial(measure, count=make_counter(options.tokenizer), markup=get_markup(options.markup))


def measure(row: PreparedRow | Unreadable, count: TokenCounter, markup: Markup) -> Measures | None:
    """Returns the numbers of a row; None for one that cannot be read."""
    if isinstance(row, Unreadable):
        return None
    trace = cut(row.trace, markup, count)
    question, original, response = count([row.source.question, row.source.reasoning, row.source.response])
    begin, end = markup.think
    whole = [Stretch(begin, begin, 1), *trace, Stretch(end, end, 1), Stretch("", row.source.response, response)]
    found = costs(whole, question, markup)
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
        seen, needed = 0, share * self.size
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= needed:
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
    """

    options: CountOptions
    rows: int = 0
    unreadable: int = 0
    first_fault: str = ""
    numbers: dict[str, Distribution] = field(default_factory=dict)

    def add(self, row: PreparedRow | Unreadable, found: Measures | None) -> None:
        """Counts a row."""
        self.rows += 1
        if isinstance(row, Unreadable):
            self.unreadable += 1
            self.first_fault = self.first_fault or f"{row.where}: {row.code} ({row.detail})"
            return
        assert found is not None, "a row that can be read has numbers"
        for name, values in found.items():
            self.numbers.setdefault(name, Distribution()).counts.update(values)

    def of(self, name: str) -> Distribution:
        """Returns the distribution of a number, empty where there are none."""
        return self.numbers.get(name, Distribution())

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers as JSON values."""
        return {
            "rows": self.rows,
            "unreadable": self.unreadable,
            "counted": counter_name(self.options.tokenizer),
            "numbers": {name: found.as_dict() for name, found in self.numbers.items()},
        }


def gather(
    rows: Iterable[PreparedRow | Unreadable],
    options: CountOptions,
    workers: int = 1,
    tick: Callable[[], Any] = lambda: None,
) -> Stats:
    """Measures rows, read as they are needed, in so many processes; `tick` is called after each."""
    stats = Stats(options)
    for row, found in in_order(rows, partial(_make_measure, options), workers):
        stats.add(row, found)
        tick()
    return stats


# --- tables -----------------------------------------------------------------------------------------------------------


SUMMED = frozenset({"question", "original", "trace", "response", "blocks", "thought", "solution"})
"""Numbers whose sum means something."""


def write_stats(stats: Stats, path: Path) -> list[Path]:
    """Writes the tables into a folder, and returns the files."""
    path.mkdir(parents=True, exist_ok=True)
    tables = make_tables(stats)
    texts = {"stats.md": "\n".join(render.markdown(table) for table in tables)}
    texts |= {f"{table.key}.csv": render.csv_text(table) for table in tables}
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    values = {table.key: render.json_value(table) for table in tables}
    write_json(path / "stats.json", stats.as_dict() | {"tables": values})
    return [path / name for name in (*texts, "stats.json")]


def make_tables(stats: Stats) -> list[Table]:
    """Returns the tables."""
    return [_rows_table(stats), _policies_table(stats)]


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
