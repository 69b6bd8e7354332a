"""The tree of thoughts in a terminal: solutions in full, thoughts folded to a line, and the live context as a curve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Console
from rich.text import Text

from hcot_lmeval.report.viewer.reading import Trace, plural
from hcot_lmeval.report.viewer.tree import Block, Outline, Segment, borders, live_curve, outline_of
from hcot_lmeval.report.viewer.verdicts import Verdict, Verdicts
from hcot_lmeval.trace import Kind

BARS = " ▁▂▃▄▅▆▇█"
CURVE_ROWS = 6
DEEPEST_INDENT = 12
"""Blocks deeper than this are printed at this indent."""
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufff9-\ufffb]"
)
"""Controls but tab and newline, line and paragraph separators, overrides of the direction of writing, and halves of
surrogate pairs. Joiners and direction marks, which ordinary text in many languages holds, are left alone."""


def print_trace(trace: Trace, verdicts: Verdicts, console: Console, *, expand: bool = False) -> None:
    """Prints one trace; with `expand` the thoughts too."""
    outline = outline_of(trace.prompt_tokens, trace.events)
    _head(trace, outline, verdicts.of(trace, outline.statistics.generated_tokens), console)
    for line in curve(live_curve(outline.events), console.width):
        console.print(Text(line, "blue"))
    console.print()
    _body(trace, outline, console, expand)
    console.print()


def _put(console: Console, depth: int, *parts: tuple[str, str]) -> None:
    """Prints texts, each with its style, wrapped, and indented by two columns for each level of depth."""
    indent = 2 * min(depth, DEEPEST_INDENT)
    text = Text.assemble(*((visible(part), style) for part, style in parts))
    for line in text.wrap(console, max(console.width - indent, 20), tab_size=4):
        line.rstrip()
        console.print(Text(" " * indent).append_text(line), soft_wrap=True)


def _head(trace: Trace, outline: Outline, verdict: Verdict, console: Console) -> None:
    marks = {None: ("", ""), 1.0: ("right", "green"), 0.0: ("wrong", "red")}
    mark = marks.get(verdict.score, (f"{verdict.score or 0:.0%} of the responses right", "yellow"))
    name = f"{trace.task} · problem {trace.doc_id} · response {trace.repeat} · {trace.source.name}"
    _put(console, 0, (name, "bold"))
    gold = f"gold {verdict.gold}" if verdict.gold else ""
    parts = [mark, *((text, "") for text in (verdict.level or "", gold, trace.finish))]
    parted = [piece for part in parts if part[0] for piece in ((" · ", "dim"), part)]
    _put(console, 0, *parted[1:])
    count = outline.statistics
    line = (
        f"prompt {count.prompt_tokens} · generated {count.generated_tokens} · pruned {count.pruned_tokens} · "
        f"re-forwarded {count.reforwarded_tokens} · peak live {count.peak_live_tokens} · "
        f"live at the end {plural(count.live_tokens, trace.unit)}"
    )
    _put(console, 0, (line, ""))
    changed = count.forced | ({"loops": count.loops} if count.loops else {})
    for what, style, kinds in (("malformed", "red", count.malformed), ("changed by the decoder", "yellow", changed)):
        if kinds:
            _put(console, 0, (f"{what}: {', '.join(f'{kind} × {number}' for kind, number in kinds.items())}", style))
    _put(console, 1, (trace.prompt, "dim"))


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


def _body(trace: Trace, outline: Outline, console: Console, expand: bool) -> None:
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
            _opened(block, outline.segments, trace.unit, console, folds)
        elif segment.fault is not None:
            _put(console, segment.depth, (f"{texts[place].strip()} ⚠ {segment.fault.value}", "red"))
        elif segment.kind is Kind.SPLIT:
            _put(console, segment.depth - 1, ("└ solution", "green"))
        elif segment.kind is Kind.TEXT and (text := texts[place].strip()):
            _put(console, segment.depth, (text, "dim" if segment.gone is not None else ""))


def _opened(block: Block, segments: Sequence[Segment], unit: str, console: Console, folded: bool) -> None:
    start, close = segments[block.open].start, block.close
    solution = "no solution" if block.split is None else f"solution {plural(block.solution, unit)}"
    text = f"{'▸' if folded else '▾'} thought {plural(block.thought, unit)} → {solution}"
    fate = "unclosed" if close is None else "kept"
    if close is not None and block.pruned:
        inner, end = segments[block.open + 1 : close], segments[close].start
        before = sum(segment.count for segment in inner if segment.gone is not None and segment.gone < end)
        fate = f"pruned {block.pruned}" + (f" ({before} before, with blocks within)" if before else "")
    _put(console, block.depth - 1, (text, "magenta"), (f"  depth {block.depth}, from {start}, {fate}", "dim"))


def visible(text: str) -> str:
    r"""Returns the text with every acting character as ``⟨U+001B⟩``, so that it can be printed whatever it holds."""
    return ACTING.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)
