"""Writes speed.md and its charts from results/speed.json; a test fails where they are out of date.

python docs/speed_charts.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA, PAGE = HERE / "results" / "speed.json", HERE / "speed.md"
COLORS = ("#b9c0cb", "#e0a458", "#2f5fb3")
HEAD = """\
# How fast the engine decodes

Engines are made to generate the same tokens and take turns in one run ([benchmark.md](benchmark.md) says how). Read
the ratios: times belong to one machine on one day. The table of each chart is folded below it; all figures are in
[speed.json](results/speed.json). 26M, 0.5B and 1.5B are shapes of Qwen2 with random weights. The figures are of
release 0.1.0, whose benchmark had more engines and parts than today's; the commands are those of then.
"""


def page(tables: list[dict[str, Any]]) -> str:
    """Returns the page."""
    shown = ((number, table) for number, table in enumerate(tables, start=1) if table.get("page", True))
    return "\n".join([HEAD, *(section(number, table) for number, table in shown)])


def section(number: int, table: dict[str, Any]) -> str:
    """Returns what the page says of a question: the answer, the chart, and the table folded behind it."""
    columns, kept = table["columns"], table.get("page_rows")
    rows = [row for row in table["rows"] if kept is None or row[0] in kept]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        [
            f"## {table['question']}\n",
            f"{table['answer']}\n",
            f"![{table['title']}](results/speed-{number}.svg)\n",
            f"<details><summary>{table['title']}: the table</summary>\n",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            f"{table['note']} {table['machine']}; {table['versions']}; {table['measured']}.".strip(),
            "; ".join(f"`{command}`" for command in table["commands"]),
            "\n</details>\n",
        ]
    )


def value(cell: str) -> float | None:
    """Returns the number with which a cell begins; None for a dash."""
    found = re.match(r"[\d,.]+", cell)
    return float(found[0].replace(",", "")) if found else None


def draw(table: dict[str, Any], path: Path) -> None:
    """Draws a chart as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    chart = table["chart"]
    named = {row[0]: [value(cell) for cell in row[1 : 1 + chart.get("columns", len(row))]] for row in table["rows"]}
    columns = table["columns"][1 : 1 + len(next(iter(named.values())))]
    base = named.get(chart.get("relative"))
    width = 0.8 / len(chart["rows"])
    with plt.rc_context({"svg.hashsalt": "speed", "font.size": 9, "savefig.facecolor": "white"}):
        figure, axes = plt.subplots(figsize=(8.4, 2.8), layout="constrained")
        for place, (name, label) in enumerate(zip(chart["rows"], chart["labels"], strict=True)):
            heights = [
                0.0 if found is None else found / (base[i] or 1) if base else found
                for i, found in enumerate(named[name])
            ]
            at = [i + (place - (len(chart["rows"]) - 1) / 2) * width for i in range(len(heights))]
            bars = axes.bar(at, heights, width, label=label, color=COLORS[place - len(chart["rows"])])
            axes.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=7)
        wrapped = [column.replace(", ", "\n") for column in columns]
        axes.set_xticks(range(len(columns)), wrapped)
        axes.set_ylabel(chart["ylabel"])
        if chart.get("log"):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Writes the page and the charts."""
    tables = json.loads(DATA.read_text(encoding="utf-8"))
    PAGE.write_text(page(tables), encoding="utf-8")
    for number, table in enumerate(tables, start=1):
        if table.get("page", True):
            draw(table, DATA.with_name(f"speed-{number}.svg"))


if __name__ == "__main__":
    main()
