"""Draws docs/pruning.svg: a trace that tiny-hcot writes, what of it is thrown away, and the live tokens meanwhile.

python scripts/picture.py            writes the picture; a test fails where it is out of date
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path
from typing import NamedTuple

from hcot_lmeval import Engine, Request, SamplingParams
from hcot_lmeval.trace import LiveContext

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pruning.svg"
PROBLEM = "a=b-c;e=d*d;d=7-3;c=e+4;b=c*d;a?"
WIDTH, MARGIN, LINE, CHART = 900, 24, 20, 170
"""Of the picture, around it, between lines of text, and the height of the chart, in pixels."""
LETTERS = 106
"""Of a line."""


class Written(NamedTuple):
    """A trace that a model wrote.

    Attributes:
        tokens: the text of each generated token.
        kept: whether each is live at the end.
        live: live tokens after the prompt and after each generated token.
    """

    tokens: list[str]
    kept: list[bool]
    live: list[int]


def write_trace() -> Written:
    """Has the bundled model solve the problem, and follows its trace by the rule."""
    engine = Engine.from_pretrained("tiny-hcot")
    prompt_ids = engine.encode(PROBLEM)
    [done] = engine.generate([Request("1", prompt_ids, SamplingParams(max_gen_toks=1000))])
    context = LiveContext(engine.markers, engine.policy)
    for token in prompt_ids:
        context.push_inert(token)
    live = [len(context.live)]
    for token in done.token_ids:
        context.push(token)
        live.append(len(context.live))
    kept = set(context.source)
    return Written(
        [engine.tokenizer.decode([token]) for token in done.token_ids],
        [index + len(prompt_ids) in kept for index in range(len(done.token_ids))],
        live,
    )


def draw(written: Written) -> str:
    """Returns the picture as SVG: the text above, the live tokens below."""
    lines = text_of(written)
    below = MARGIN + (len(lines) + 3) * LINE
    height = below + CHART + 2 * LINE + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">',
            "<title>A trace, what of it is thrown away, and the live tokens meanwhile</title>",
            "<style>text{font:13px monospace;white-space:pre;fill:#1f2733}.gone{fill:#a9b1bd}"
            ".note{font:13px sans-serif;fill:#4a5568}.axis{stroke:#7a869a}"
            ".off{stroke:#a9b1bd;stroke-dasharray:5 4}.on{stroke:#2f5fb3;"
            "stroke-width:2}polyline,line{fill:none}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *(label(MARGIN, MARGIN + LINE * number, line) for number, line in enumerate(lines, start=1)),
            *chart_of(written.live, below),
            "</svg>\n",
        ]
    )


def text_of(written: Written) -> list[str]:
    """Returns the lines of the text; tokens that were thrown away are grey."""
    rows, width = [""], 0
    for token, kept in zip(written.tokens, written.kept, strict=True):
        if width + len(token) > LETTERS:
            rows, width = [*rows, ""], 0
        rows[-1] += escape(token) if kept else f'<tspan class="gone">{escape(token)}</tspan>'
        width += len(token)
    live = "".join(token for token, kept in zip(written.tokens, written.kept, strict=True) if kept)
    said = f'<tspan class="note">{len(written.tokens)} tokens are generated; what is grey was thrown away</tspan>'
    left = '<tspan class="note">what the model sees at the end, beside the problem</tspan>'
    return [f"{PROBLEM}   {said}", *rows, "", f"{escape(live)}   {left}"]


def chart_of(live: list[int], top: int) -> list[str]:
    """Returns the chart of live tokens over generated ones, pruned and unpruned."""
    most = live[0] + len(live) - 1
    left, right, bottom = MARGIN + 30, WIDTH - MARGIN, top + CHART

    def place(generated: int, tokens: float) -> str:
        x = left + (right - left) * generated / (len(live) - 1)
        return f"{x:.1f},{bottom - CHART * tokens / most:.1f}"

    saw = " ".join(place(index, tokens) for index, tokens in enumerate(live))
    peak = max(live)
    return [
        f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>',
        f'<line class="axis" x1="{left}" y1="{top}" x2="{left}" y2="{bottom}"/>',
        f'<polyline class="off" points="{place(0, live[0])} {place(len(live) - 1, most)}"/>',
        f'<polyline class="on" points="{saw}"/>',
        label(left + 8, top + 14, f'<tspan class="note">live tokens: at most {peak} pruned, {most} unpruned</tspan>'),
        label(right - 130, bottom + LINE, '<tspan class="note">generated tokens</tspan>'),
    ]


def label(x: int, y: int, text: str) -> str:
    """Returns an SVG text; `text` may hold elements."""
    return f'<text x="{x}" y="{y}">{text}</text>'


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PICTURE.write_text(draw(write_trace()), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
