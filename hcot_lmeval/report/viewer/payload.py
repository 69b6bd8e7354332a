"""A trace as the page stores it: a small row for the list, and everything else compressed.

The compressed part is two lines of JSON. The first is ``[prompt, text]``, which is all that a search reads. The second
is the structure, in flat lists (a trace may nest a thousand blocks deep, JSON readers may not):

* ``segments``: ``[kind, tokens, characters, depth, gone, fault]`` each; kind is one of ``t o s c``, gone is 0 for a
  segment that is live at the end, fault is 0 or a name. Starts follow from the counts.
* ``blocks``: ``[open, split, close, depth, thought, solution, pruned]`` each; the first three are indices of segments
  or -1.
* ``growth``: see `Outline.growth`.
* ``formulas``, ``prompt_formulas``: ``[start, stop, tree]`` each, tree an index into ``trees``.
* ``trees``: MathML, see `mathml`.

Characters are counted as JavaScript counts them, in units of UTF-16.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise, takewhile
from typing import Any

from hcot_lmeval.report.viewer.mathml import Tree, formulas, mathml
from hcot_lmeval.report.viewer.reading import Trace
from hcot_lmeval.report.viewer.tree import Outline, Segment, borders, live_curve
from hcot_lmeval.report.viewer.verdicts import Verdict

SPARK = 48
"""Points of the small curve in the list."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Heights of such a point."""
TITLE = 160
"""Characters that the list shows of a problem."""


def pack(trace: Trace, outline: Outline) -> str:
    """Returns the compressed part in base64."""
    lines = json.dumps([trace.prompt, trace.text]) + "\n" + json.dumps(structure(trace, outline), separators=(",", ":"))
    return base64.b64encode(gzip.compress(lines.encode("ascii"), compresslevel=9, mtime=0)).decode("ascii")


def structure(trace: Trace, outline: Outline) -> dict[str, Any]:
    """Returns the second line: what the trace is made of."""
    trees: dict[str, int] = {}
    return {
        "segments": _segments(trace, outline.segments),
        "blocks": [
            [b.open, *(-1 if i is None else i for i in (b.split, b.close)), b.depth, b.thought, b.solution, b.pruned]
            for b in outline.blocks
        ],
        "growth": outline.growth,
        "formulas": _formulas(trace.text, borders(trace, outline.segments), trees),
        "prompt_formulas": _formulas(trace.prompt, [0, len(trace.prompt)], trees),
        "trees": [json.loads(tree) for tree in trees],
    }


def index_row(trace: Trace, outline: Outline, verdict: Verdict, source: int) -> dict[str, Any]:
    """Returns what the list, the filters and the totals need to know."""
    return {
        "source": source,
        "task": trace.task,
        "doc": trace.doc_id,
        "repeat": trace.repeat,
        "title": trace.prompt or trace.text[:TITLE],
        "finish": trace.finish,
        "unit": trace.unit,
        "policy": trace.policy,
        "seconds": trace.seconds,
        "started": outline.started,
        "prompt_acts": trace.prompt_acts,
        **asdict(verdict),
        **{key: value for key, value in outline.statistics.as_dict().items() if key in COUNTS},
        "spark": spark(outline),
    }


COUNTS = frozenset(
    """prompt_tokens generated_tokens pruned_tokens reforwarded_tokens live_tokens peak_live_tokens live_token_steps
    prune_events blocks max_depth malformed illegal_tokens forced loops""".split()
)
"""Fields of `Statistics` that the page shows."""


def shorten_titles(rows: Sequence[dict[str, Any]]) -> None:
    """Cuts the titles, prompts until now, to what tells the problems of a task apart, in place.

    Whole lines with which all prompts of a task begin (a chat template, examples) are left out.
    """
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["task"]), []).append(row)
    for group in groups.values():
        first, last = min(row["title"] for row in group), max(row["title"] for row in group)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        skip = 0 if first == last else first.rfind("\n", 0, shared) + 1
        for row in group:
            row["title"] = " ".join(row["title"][skip : skip + 4 * TITLE].split())[:TITLE]


def spark(outline: Outline) -> str:
    """Returns the live context over time in `SPARK` characters: the largest of each stretch, on a scale to the peak."""
    heights = live_curve(outline.events)
    peak, count = max(*heights, 1), len(heights)
    starts = (count * i // SPARK for i in range(SPARK + 1))
    stretches = (heights[start : max(stop, start + 1)] for start, stop in pairwise(starts))
    return "".join(DIGITS[(len(DIGITS) - 1) * max(stretch) // peak] for stretch in stretches)


def _segments(trace: Trace, segments: Sequence[Segment]) -> list[list[Any]]:
    widths = (stop - start for start, stop in pairwise(utf16_units(trace.text, borders(trace, segments))))
    return [
        [s.kind.value[0], s.count, width, s.depth, s.gone or 0, s.fault.value if s.fault else 0]
        for s, width in zip(segments, widths, strict=True)
    ]


def _formulas(text: str, edges: Sequence[int], trees: dict[str, int]) -> list[list[int]]:
    """The formulas within the stretches between `edges`; none reaches across a marker."""
    found: list[tuple[int, int, int]] = []
    for begin, end in pairwise(edges):
        for formula in formulas(text[begin:end]):
            tree: Tree | None = mathml(formula.latex, formula.display)
            if tree is not None:
                number = trees.setdefault(json.dumps(tree), len(trees))
                found.append((begin + formula.start, begin + formula.stop, number))
    flat = utf16_units(text, [at for start, stop, _ in found for at in (start, stop)])
    return [[flat[2 * i], flat[2 * i + 1], tree] for i, (_, _, tree) in enumerate(found)]


def utf16_units(text: str, indices: Sequence[int]) -> list[int]:
    """Maps indices of characters, ascending, to UTF-16 units: a character beyond U+FFFF counts twice."""
    if not text or max(text) <= "\uffff":
        return list(indices)
    parts = [text[a:b] for a, b in zip([0, *indices], indices, strict=False)]
    return list(accumulate(len(part) + sum(char > "\uffff" for char in part) for part in parts))
