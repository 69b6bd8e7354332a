"""Several runs of one task side by side, read from the files that ``lm_eval --log_samples --output_path`` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Run:
    """One task of one run.

    Attributes:
        name: what the reader of a table calls it.
        samples: the lines of its samples file.
        totals: what the model reports of the whole run (`hcot_lmeval.lm.statistics.RunStatistics.as_dict`).
    """

    name: str
    samples: list[dict[str, Any]]
    totals: dict[str, Any]

    def mean(self, key: str) -> float:
        """Returns the mean of a metric over the documents."""
        return fmean(sample[key] for sample in self.samples)

    def per_request(self, key: str) -> float:
        """Returns the mean of a statistic over the responses."""
        return fmean(stats[key] for sample in self.samples for stats in sample["requests"])

    @property
    def speed(self) -> str:
        """Tokens per second, or a dash for a run that generated nothing itself."""
        speed = self.totals["tokens_per_second"]
        return "-" if speed is None else f"{speed:.0f}"

    def accuracy_by(self, column: str) -> dict[Any, float]:
        """Returns the accuracy for each value of a column of the documents, in ascending order."""
        values = sorted({sample["doc"][column] for sample in self.samples})
        return {v: fmean(s["acc"] for s in self.samples if s["doc"][column] == v) for v in values}


def read_run(name: str, directory: Path, task: str) -> Run:
    """Reads the newest run of `task` below the output path of lm-eval.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was not made by ``--model hcot``, so there are no statistics of generation.
    """
    samples = _newest(directory, f"samples_{task}_*.jsonl")
    results = json.loads(_newest(directory, "results_*.json").read_text(encoding="utf-8"))
    if "hcot" not in results["config"]:
        raise ValueError(f"{directory} holds a run of another model than hcot; run lm_eval with --model hcot")
    lines = samples.read_text(encoding="utf-8").splitlines()
    return Run(name, [json.loads(line) for line in lines], results["config"]["hcot"])


def _newest(directory: Path, pattern: str) -> Path:
    found = sorted(directory.rglob(pattern), key=lambda path: path.name)  # the names end in a time stamp
    if not found:
        raise FileNotFoundError(f"no {pattern} below {directory}; run lm_eval with --log_samples --output_path there")
    return found[-1]


@dataclass(frozen=True)
class Column:
    """A column of the table: its head, its meaning, and how its cell is made."""

    head: str
    meaning: str
    cell: Callable[[Run], str]


COLUMNS = (
    Column("run", "the model with this setting", lambda run: run.name),
    Column("accuracy", "right answers", lambda run: f"{run.mean('acc'):.1%}"),
    Column("completed", "ended by itself, not at a limit", lambda run: f"{run.mean('completed'):.1%}"),
    Column(
        "generated", "generated tokens, mean of a problem", lambda run: f"{run.per_request('generated_tokens'):.0f}"
    ),
    Column("pruned", "of them removed from the context", lambda run: f"{run.per_request('pruned_tokens'):.0f}"),
    Column(
        "re-forwarded",
        "tokens read a second time after a prune, the price of pruning",
        lambda run: f"{run.per_request('reforwarded_tokens'):.0f}",
    ),
    Column("prunes", "finished thoughts that were pruned", lambda run: f"{run.per_request('prune_events'):.1f}"),
    Column(
        "peak live",
        "the most tokens that the model saw at once, prompt included: mean, and largest",
        lambda run: f"{run.per_request('peak_live_tokens'):.0f}, {run.totals['peak_live_tokens']}",
    ),
    Column("tokens/s", "generated, all requests together; - if all came from the journal", lambda run: run.speed),
)


def comparison(runs: Sequence[Run], by: str | None = None) -> str:
    """Returns a table with one line for each run, followed by the meaning of its columns.

    Args:
        runs: of the same task.
        by: a column of the documents; accuracy is given for each of its values too.
    """
    columns = [*COLUMNS, *_accuracy_columns(runs, by)]
    rows = [[column.head for column in columns], *([column.cell(run) for column in columns] for run in runs)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(_align(cell, width, i) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    meanings = [f"{column.head:<{max(len(c.head) for c in columns)}}  {column.meaning}" for column in columns]
    return "\n".join([lines[0], rule, *lines[1:], "", *meanings])


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _accuracy_columns(runs: Sequence[Run], by: str | None) -> list[Column]:
    if by is None:
        return []
    values = list(runs[0].accuracy_by(by))

    def column(value: Any) -> Column:
        return Column(
            f"{by} {value}", f"accuracy on problems of {by} {value}", lambda run: f"{run.accuracy_by(by)[value]:.0%}"
        )

    return [column(value) for value in values]
