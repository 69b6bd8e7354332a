"""The page: one HTML file that needs nothing else and lets nothing in, written one trace at a time.

Model output is untrusted. What keeps it inert, each enough by itself:

* texts, formulas and structure are compressed and in base64, an alphabet without markup; the list's rows are JSON in
  ASCII whose ``<``, ``>`` and ``&`` are escaped;
* the page's script makes text nodes of texts and elements of names on a fixed list, never markup of strings;
* a content security policy allows one script and one style, by their hashes, and no request of any kind; a page that
  is served may ask its own server.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from hcot_lmeval.report.viewer.payload import index_row, pack, shorten_titles
from hcot_lmeval.report.viewer.reading import Source, Trace, ViewerError
from hcot_lmeval.report.viewer.tree import outline_of
from hcot_lmeval.report.viewer.verdicts import Verdicts
from hcot_lmeval.store import replacing
from hcot_lmeval.trace import Malformed

SCRIPTS = ("core.js", "data.js", "rows.js", "draw.js", "curve.js", "pane.js", "list.js", "app.js")
"""Joined in this order into the one script."""
SERVED = (*SCRIPTS, "follow.js")
"""Of a page that `hcot_lmeval.report.viewer.serve` hands out."""


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
