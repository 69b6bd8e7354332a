"""Tables for the terminal, Markdown, LaTeX, CSV and JSON. Readers get rounded numbers, programs get all digits."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from hcot_lmeval.report.statistics import Estimate
from hcot_lmeval.report.tables import Cell, Head, Table

Style = Literal["simple", "github", "latex_booktabs"]
WIDTH = 118
"""Columns of a terminal: notes are wrapped to it, and wider tables parted."""


def terminal(table: Table) -> str:
    """Returns a table for a terminal, in parts if it is wide, the meanings of its columns below."""
    lines = [table.title, "", "\n\n".join(_tabulate(part, "simple") for part in parts(table))]
    notes = [textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in meanings(table)]
    return "\n".join([*lines, "", *notes] if notes else lines)


def markdown(table: Table) -> str:
    """Returns a table in GitHub's Markdown, the meanings of its columns below."""
    notes = "\n".join(f"* {_markdown_text(line)}" for line in meanings(table))
    return f"### {table.title}\n\n{_tabulate(table, 'github')}\n\n{notes}\n"


def latex(table: Table) -> str:
    """Returns a table in LaTeX with booktabs rules; what LaTeX would take for commands is escaped."""
    notes = "\n".join(f"% {line}" for line in meanings(table))
    return f"% {table.title}\n{notes}\n{_tabulate(table, 'latex_booktabs')}\n"


def csv_text(table: Table) -> str:
    """Returns a table as comma-separated values, unrounded; an estimate takes three columns."""
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        rows.append({})
        for head, cell in zip(table.heads, row, strict=True):
            if isinstance(cell, Estimate):
                bounds = {f"{head.column} low": cell.low, f"{head.column} high": cell.high}
                rows[-1] |= {head.column: cell.value, **bounds}
            else:
                rows[-1][head.column] = "" if cell is None else cell
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def json_value(table: Table) -> dict[str, Any]:
    """Returns a table as JSON values, unrounded."""
    rows = [
        {
            head.column: asdict(cell) if isinstance(cell, Estimate) else cell
            for head, cell in zip(table.heads, row, strict=True)
        }
        for row in table.rows
    ]
    return {
        "title": table.title,
        "columns": {head.column: head.meaning or head.name for head in table.heads},
        "rows": rows,
        "notes": list(table.notes),
    }


def parts(table: Table) -> Iterator[Table]:
    """Yields a table in parts that fit a terminal, each with the columns of names that the table begins with."""
    texts = [all(isinstance(row[i], str) for row in table.rows) for i in range(len(table.heads))]
    names = list(range([*texts, False].index(False)))
    chosen = list(names)
    for i in range(len(names), len(table.heads)):
        wider = _tabulate(_columns(table, [*chosen, i]), "simple").splitlines()
        if len(chosen) > len(names) and max(map(len, wider)) > WIDTH:
            yield _columns(table, chosen)
            chosen = list(names)
        chosen.append(i)
    yield _columns(table, chosen)


def _columns(table: Table, chosen: Sequence[int]) -> Table:
    rows = tuple(tuple(row[i] for i in chosen) for row in table.rows)
    return replace(table, heads=tuple(table.heads[i] for i in chosen), rows=rows)


def meanings(table: Table) -> list[str]:
    """Returns what each column counts, and the notes."""
    return [*(f"{head.name}: {head.meaning}" for head in table.heads if head.meaning), *table.notes]


def show(cell: Cell, head: Head) -> str:
    """Returns a cell as readers see it."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Estimate):
        low, high = (f"{head.scale * x:.0f}" for x in (cell.low, cell.high))
        return f"{head.scale * cell.value:.{head.digits}f} [{low}, {high}]"
    if 0 <= cell < head.least:
        return f"<{head.least:.{head.digits}f}"
    sign = "+" if head.signed else ""
    return f"{head.scale * cell:{sign},.{head.digits}f}"


def _tabulate(table: Table, style: Style) -> str:
    from tabulate import tabulate

    rows = [[show(cell, head) for cell, head in zip(row, table.heads, strict=True)] for row in table.rows]
    heads = [head.name for head in table.heads]
    if style == "github":
        rows, heads = [[_markdown_text(x) for x in row] for row in rows], [_markdown_text(x) for x in heads]
    # a column of text is on the left, one of numbers on the right
    sides = ["left" if all(isinstance(row[i], str) for row in table.rows) else "right" for i in range(len(heads))]
    return str(tabulate(rows, heads, tablefmt=style, colalign=sides, disable_numparse=True))


def _markdown_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
