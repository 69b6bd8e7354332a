"""The page: one HTML file that needs nothing else and lets nothing in, written one trace at a time.

Model output is untrusted. What keeps it inert, each enough by itself:

* texts and structure are compressed and in base64, an alphabet without markup; the list's rows are JSON in
  ASCII whose ``<``, ``>`` and ``&`` are escaped;
* the page's script makes text nodes of texts and elements of names on a fixed list, never markup of strings;
* a content security policy allows one script and one style, by their hashes, and no request of any kind; a page that
  is served may ask its own server.

The compressed part of a trace is two lines of JSON. The first is ``[prompt, text]``, which is all that a search reads.
The second is the structure, in flat lists (a trace may nest a thousand blocks deep, JSON readers may not):

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
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from hcot_lmeval.report.viewer.mathml import formulas, mathml
from hcot_lmeval.report.viewer.reading import Source, Trace, ViewerError
from hcot_lmeval.report.viewer.tree import Outline, Segment, borders, live_curve, outline_of
from hcot_lmeval.report.viewer.verdicts import Verdict, Verdicts
from hcot_lmeval.store import replacing
from hcot_lmeval.trace import Malformed

SCRIPTS = ("traces.js", "pane.js", "app.js")
"""Joined in this order into the one script."""
SERVED = (*SCRIPTS, "follow.js")
"""Of a page that `hcot_lmeval.report.viewer.serve` hands out."""

SPARK = 48
"""Points of the small curve in the list."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""Heights of such a point."""
TITLE = 160
"""Characters that the list shows of a problem."""


def write_page(
    path: Path,
    traces: Iterable[Trace],
    sources: Sequence[Source],
    verdicts: Verdicts,
    title: str,
    progress: bool = False,
    state: str | None = None,
) -> int:
    """Writes the page and returns the number of its traces. An old page stays until the new one is whole.

    Args:
        path: of the page.
        traces: to show.
        sources: that they are of.
        verdicts: on them.
        title: of the page.
        progress: show a bar.
        state: of the files, for a page that is served and asks its server for more; it may send requests there.

    Raises:
        ViewerError: there are no traces, or the notes of one were changed.
    """
    numbers = {source.name: number for number, source in enumerate(sources)}
    rows: list[dict[str, Any]] = []
    with TemporaryFile("w+", encoding="ascii") as blobs:
        for trace in tqdm(traces, unit=" traces", disable=not progress):
            outline = outline_of(trace.prompt_tokens, trace.events)
            verdict = verdicts.of(trace, outline.statistics.generated_tokens)
            rows.append(index_row(trace, outline, verdict, numbers[trace.source.name]))
            blobs.write(pack(trace, outline) + "\n")
        if not rows:
            raise ViewerError(
                "there are no traces to show; see --task, --doc and --limit, or name another folder (requests that a "
                "journal had leave no notes: run them with journal=off)"
            )
        verdicts.check_used()
        shorten_titles(rows)
        blobs.seek(0)
        described = [{"name": source.name, "facts": source.facts, "notes": source.is_notes} for source in sources]
        faults = {kind.value: kind.meaning for kind in Malformed}
        index = {"title": title, "sources": described, "rows": rows, "faults": faults, "state": state}
        with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
            file.writelines(_parts(index, (line.rstrip("\n") for line in blobs)))
    return len(rows)


def _parts(index: dict[str, Any], blobs: Iterable[str]) -> Iterator[str]:
    """The page in parts, to be written one after another."""
    served = index["state"] is not None
    body = "\n".join(map(_asset, SERVED if served else SCRIPTS))
    script, style = f'(() => {{\n"use strict";\n{body}\n}})();\n', _asset("style.css")
    text = json.dumps(index, separators=(",", ":"))  # what follows lets it stand in a script element
    parts = {
        "title": html.escape(index["title"]),
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'" + ("; connect-src 'self'" if served else ""),
        "style": style,
        "script": script,
        "index": text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"),
    }
    for part in re.split(r"\{\{(\w+)\}\}", _asset("page.html")):
        if part == "blobs":
            yield from (f'<script type="text/plain" id="blob{i}">{blob}</script>\n' for i, blob in enumerate(blobs))
        else:
            yield parts.get(part, part)


def _asset(name: str) -> str:
    return files("hcot_lmeval.report.viewer").joinpath("web", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


# --- a trace as the page stores it ------------------------------------------------------------------------------------


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
    """The formulas within the stretches between `edges`, none across a marker; adds what is new to `trees`."""
    found: list[tuple[int, int, int]] = []
    for begin, end in pairwise(edges):
        for formula in formulas(text[begin:end]):
            tree = mathml(formula.latex, formula.display)
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
