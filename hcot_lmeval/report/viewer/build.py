"""From traces to the file: replays, packs and writes one trace at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from hcot_lmeval.report.viewer.page import render
from hcot_lmeval.report.viewer.payload import index_row, pack, shorten_titles
from hcot_lmeval.report.viewer.reading import Source, Trace, ViewerError
from hcot_lmeval.report.viewer.tree import outline_of
from hcot_lmeval.report.viewer.verdicts import Verdicts


def write_page(
    path: Path,
    traces: Iterable[Trace],
    sources: Sequence[Source],
    verdicts: Verdicts,
    title: str,
    progress: bool = False,
) -> int:
    """Writes the page and returns the number of its traces. An old page stays until the new one is whole.

    Args:
        path: the file; its folder is made if need be.
        traces: what to show, of any of the sources.
        sources: all sources.
        verdicts: what is known of right and wrong.
        title: of the page.
        progress: show a progress bar.

    Raises:
        ViewerError: there are no traces, or one of them does not follow the rule.
    """
    numbers = {source.name: number for number, source in enumerate(sources)}
    rows: list[dict[str, Any]] = []
    with TemporaryFile("w+", encoding="ascii") as blobs:
        for trace in tqdm(traces, unit=" traces", disable=not progress):
            outline = outline_of(trace)
            verdict = verdicts.of(trace, len(trace.ids))
            rows.append(index_row(trace, outline, verdict, numbers[trace.source.name]))
            blobs.write(pack(trace, outline) + "\n")
        if not rows:
            raise ViewerError("there are no traces to show; see --task, --doc and --limit, or another folder")
        verdicts.check_used()
        shorten_titles(rows)
        blobs.seek(0)
        described = [{"name": source.name, "facts": source.facts, "notes": source.is_notes} for source in sources]
        _replace(path, render(title, described, rows, (line.rstrip("\n") for line in blobs)))
    return len(rows)


def _replace(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
