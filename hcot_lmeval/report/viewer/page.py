"""The page: one HTML file that needs nothing else and lets nothing in.

Model output is untrusted. What keeps it inert, each enough by itself:

* texts, formulas and structure are compressed and in base64, an alphabet without markup; the list's rows are JSON in
  ASCII whose ``<``, ``>`` and ``&`` are escaped;
* the page's script makes text nodes of texts and elements of names on a fixed list, never markup of strings;
* a content security policy allows one script and one style, by their hashes, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

SCRIPTS = ("core.js", "data.js", "rows.js", "draw.js", "curve.js", "pane.js", "list.js", "app.js")
"""Joined in this order into the one script."""


def render(
    title: str, sources: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], blobs: Iterable[str]
) -> Iterator[str]:
    """Yields the page in parts, to be written one after another.

    Args:
        title: of the page.
        sources: name and facts of each source.
        rows: `payload.index_row` of each trace.
        blobs: `payload.pack` of each trace, in the same order.
    """
    script, style = _joined(SCRIPTS), _asset("style.css")
    parts = {
        "title": html.escape(title),
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "index": inert_json({"title": title, "sources": sources, "rows": rows}),
    }
    for part in re.split(r"\{\{(\w+)\}\}", _asset("page.html"))[:]:
        if part == "blobs":
            yield from (f'<script type="text/plain" id="blob{i}">{blob}</script>\n' for i, blob in enumerate(blobs))
        else:
            yield parts.get(part, part)


def inert_json(value: Any) -> str:
    """Returns JSON that can stand in a script element: ASCII, without ``<``, ``>`` and ``&``."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _joined(names: Sequence[str]) -> str:
    body = "\n".join(_asset(name) for name in names)
    return f'(() => {{\n"use strict";\n{body}\n}})();\n'


def _asset(name: str) -> str:
    return files("hcot_lmeval.report.viewer").joinpath("web", name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
