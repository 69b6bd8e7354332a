"""The tree of thoughts in a terminal: solutions in full, thoughts folded to a line, and the live context as a curve."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TextIO

from hcot_lmeval.report.viewer.reading import Trace
from hcot_lmeval.report.viewer.tree import Block, Outline, Segment, borders, live_curve, outline_of
from hcot_lmeval.report.viewer.verdicts import Verdict, Verdicts
from hcot_lmeval.trace import Kind

COLORS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35"}
BARS = " ▁▂▃▄▅▆▇█"
CURVE_ROWS = 6
DEEPEST_INDENT = 12
"""Blocks deeper than this are printed at this indent."""
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb]"
)
"""Controls but tab and newline, line and paragraph separators, overrides of the direction of writing, and halves of
surrogate pairs. Joiners and direction marks, which ordinary text in many languages holds, are left alone."""


@dataclass(frozen=True)
class Style:
    """How to print: `width` columns, in colours or not, to `file`."""

    file: TextIO
    width: int
    colors: bool

    @classmethod
    def of(cls, file: TextIO, width: int | None = None, color: str = "auto") -> Style:
        """Returns the style that fits a terminal, a pipe, ``NO_COLOR`` and what the user asked for."""
        colored = color == "always" or (color == "auto" and file.isatty() and not os.environ.get("NO_COLOR"))
        return cls(file, width or shutil.get_terminal_size((100, 24)).columns, colored)

    def paint(self, text: str, color: str) -> str:
        return f"\x1b[{COLORS[color]}m{text}\x1b[0m" if self.colors and text else text

    def line(self, text: str = "") -> None:
        print(text, file=self.file)


def print_trace(trace: Trace, verdicts: Verdicts, style: Style, *, expand: bool = False) -> None:
    """Prints one trace; with `expand` the thoughts too."""
    outline = outline_of(trace.prompt_tokens, trace.events)
    _head(trace, outline, verdicts.of(trace, outline.statistics.generated_tokens), style)
    for line in curve(live_curve(outline.events), style.width):
        style.line(style.paint(line, "blue"))
    style.line()
    _body(trace, outline, style, expand)
    style.line()


def _head(trace: Trace, outline: Outline, verdict: Verdict, style: Style) -> None:
    marks = {None: ("", "dim"), 1.0: ("right", "green"), 0.0: ("wrong", "red")}
    mark, color = marks.get(verdict.score, (f"{verdict.score or 0:.0%} of the responses right", "yellow"))
    name = f"{trace.task} · problem {trace.doc_id} · response {trace.repeat} · {trace.source.name}"
    parts = [
        style.paint(mark, color),
        verdict.level or "",
        f"gold {verdict.gold}" if verdict.gold else "",
        trace.finish,
    ]
    style.line(style.paint(visible(name), "bold"))
    style.line(" · ".join(visible(text) if text != parts[0] else text for text in parts if text))
    count = outline.statistics
    style.line(
        f"prompt {count.prompt_tokens} · generated {count.generated_tokens} · pruned {count.pruned_tokens} · "
        f"re-forwarded {count.reforwarded_tokens} · peak live {count.peak_live_tokens} · "
        f"live at the end {plural(count.live_tokens, trace.unit)}"
    )
    if count.malformed:
        faults = ", ".join(f"{kind} × {number}" for kind, number in count.malformed.items())
        style.line(style.paint(f"malformed: {faults}", "red"))
    changed = count.forced | ({"loops": count.loops} if count.loops else {})
    if changed:
        counts = ", ".join(f"{kind} × {number}" for kind, number in changed.items())
        style.line(style.paint(f"changed by the decoder: {counts}", "yellow"))
    for line in _wrapped(trace.prompt, style.width - 2):
        style.line(f"  {style.paint(line, 'dim')}")


def curve(heights: list[int], width: int) -> Iterator[str]:
    """Draws the live context over time, in `CURVE_ROWS` rows and at most `width` columns."""
    columns = min(max(width - 8, 10), len(heights))
    stretches = pairwise(len(heights) * i // columns for i in range(columns + 1))
    points = [max(heights[a:b]) for a, b in stretches]
    peak = max(max(points), 1)
    for row in reversed(range(CURVE_ROWS)):
        filled = [round(point / peak * CURVE_ROWS * 8) - row * 8 for point in points]
        label = peak if row == CURVE_ROWS - 1 else 0 if row == 0 else ""
        yield f"{label:>6} " + "".join(BARS[min(max(eighths, 0), 8)] for eighths in filled).rstrip()


def _body(trace: Trace, outline: Outline, style: Style, expand: bool) -> None:
    texts = [trace.text[begin:end] for begin, end in pairwise(borders(trace, outline.segments))]
    blocks = {block.open: block for block in outline.blocks}
    hidden_until = -1
    for place, segment in enumerate(outline.segments):
        if place < hidden_until:
            continue
        if segment.kind is Kind.OPEN:
            block = blocks[place]
            folds = not expand and block.split is not None and outline.segments[block.split].gone is not None
            hidden_until = block.split if folds and block.split is not None else -1
            _opened(block, outline.segments, trace.unit, style, folds)
        else:
            _line(segment, texts[place], style)


def _opened(block: Block, segments: Sequence[Segment], unit: str, style: Style, folded: bool) -> None:
    start, close = segments[block.open].start, block.close
    solution = "no solution" if block.split is None else f"solution {plural(block.solution, unit)}"
    text = f"{'▸' if folded else '▾'} thought {plural(block.thought, unit)} → {solution}"
    fate = "unclosed" if close is None else "kept"
    if close is not None and block.pruned:
        inner, end = segments[block.open + 1 : close], segments[close].start
        before = sum(segment.count for segment in inner if segment.gone is not None and segment.gone < end)
        fate = f"pruned {block.pruned}" + (f" ({before} before, with blocks within)" if before else "")
    rest = f"  depth {block.depth}, from {start}, {fate}"
    style.line(_indent(block.depth - 1) + style.paint(text, "magenta") + style.paint(rest, "dim"))


def _line(segment: Segment, text: str, style: Style) -> None:
    indent = _indent(segment.depth)
    if segment.fault is not None:
        style.line(indent + style.paint(f"{visible(text).strip()} ⚠ {segment.fault.value}", "red"))
    elif segment.kind is Kind.SPLIT:
        style.line(_indent(segment.depth - 1) + style.paint("└ solution", "green"))
    elif segment.kind is Kind.TEXT:
        for line in _wrapped(text, style.width - len(indent)):
            style.line(indent + (style.paint(line, "dim") if segment.gone is not None else line))


def _indent(depth: int) -> str:
    return "  " * min(depth, DEEPEST_INDENT)


def _wrapped(text: str, width: int) -> Iterator[str]:
    for line in visible(text).expandtabs(4).splitlines():
        yield from textwrap.wrap(line.strip(), max(width, 20))


def visible(text: str) -> str:
    r"""Returns the text with every acting character as ``⟨U+001B⟩``, so that it can be printed whatever it holds."""
    return ACTING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def plural(count: int, noun: str) -> str:
    """Returns ``1 token`` or ``3 tokens``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
