"""Files to traces.

Two kinds of files are read, told apart by their first line, and may stand side by side:

* notes of the engine (`hcot_lmeval.notes`): exact tokens, and what was pruned when;
* plain traces: JSONL rows with a text that some model wrote anywhere. Their markers are found in the text and their
  tokens are words and other pieces, unless a tokenizer is given.

Traces are yielded one at a time, for a file of notes may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hcot_lmeval.notes import SCHEMA
from hcot_lmeval.report.results import STAMP
from hcot_lmeval.trace import LiveContext

FACTS = ("pruning", "ablation", "markup", "max_context")
"""Facts of a run that are told to the reader, in this order."""


class ViewerError(ValueError):
    """The files do not hold what is to be shown."""


@dataclass(frozen=True)
class Source:
    """Traces of one run, or one file of plain texts.

    Attributes:
        name: what the reader calls it; no two sources of a page have the same.
        paths: its files; the ranks of one run are several.
        run: the facts in the header of notes; empty for plain texts.
    """

    name: str
    paths: tuple[Path, ...]
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_notes(self) -> bool:
        return bool(self.run)

    @property
    def facts(self) -> dict[str, Any]:
        """What the page says of the run."""
        return {key: self.run[key] for key in FACTS if self.run.get(key) is not None}


@dataclass(frozen=True)
class Trace:
    """One generation, ready to be replayed.

    Attributes:
        source: where it is from.
        task: name of the task, or the stem of the file.
        doc_id: the problem within the task.
        repeat: which response to the problem, from 0.
        prompt: text of the prompt.
        text: everything generated, markers included.
        prompt_ids: token ids, or numbers of pieces.
        ids: of the generated tokens.
        offsets: for each generated token where its text begins in `text`, and at last the length of `text`.
        context: makes a fresh live context of the right kind.
        prompt_acts: whether markers in the prompt act.
        finish: why the generation ended; empty if nobody knows.
        wall_seconds: how long it took; None if nobody knows.
        unit: what `ids` count: ``token`` or ``piece``.
        recorded: the events in the notes; None for a plain text.
        gold: the right answer, if the file says it.
    """

    source: Source
    task: str
    doc_id: int | str
    repeat: int
    prompt: str
    text: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    offsets: Sequence[int]
    context: Callable[[], LiveContext]
    prompt_acts: bool = False
    finish: str = ""
    wall_seconds: float | None = None
    unit: str = "token"
    recorded: Sequence[Mapping[str, Any]] | None = None
    gold: str | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.task}/{self.doc_id}/{self.repeat} of {self.source.name}"


def doc_name(value: Any) -> int | str:
    """Returns a `Trace.doc_id`: anything but a number as text."""
    return value if isinstance(value, int) else str(value)


USUAL = {
    "text": ("hierarchical_cot", "generated_solution", "text", "response", "output"),
    "prompt": ("question", "problem", "prompt"),
    "gold": ("expected_answer", "answer", "gold"),
}
"""Columns in which data sets keep these, the preferred first."""


@dataclass(frozen=True)
class Columns:
    """Which columns of plain traces hold what; None: the first of `USUAL` that a row has."""

    text: str | None = None
    prompt: str | None = None
    gold: str | None = None

    def find(self, row: Mapping[str, Any], role: str) -> str | None:
        """Returns the name of the column for `role` in this row, or None."""
        wanted = getattr(self, role)
        names = (wanted,) if wanted else USUAL[role]
        return next((name for name in names if row.get(name) is not None), None)


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """Returns what the files hold, or the ``.jsonl`` files below folders, as sources with names of their own.

    Journals and lm-eval's samples, which lie beside notes in the folder of a cell, are neither notes nor traces.

    Raises:
        ViewerError: a path does not exist, holds no traces, or is given twice.
    """
    sources = [source for path in paths for source in _sources_of(path)]
    seen: set[Path] = set()
    for path in (path for source in sources for path in source.paths):
        if path.resolve() in seen:
            raise ViewerError(f"{path} is given twice; name each file or folder once")
        seen.add(path.resolve())
    return _named(sources)


def _sources_of(path: Path) -> list[Source]:
    if not path.exists():
        raise ViewerError(f"{path} does not exist; give a file or folder of notes (model argument notes=DIR)")
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    grouped: dict[str, tuple[Mapping[str, Any], list[Path]]] = {}
    for file in files:
        if file.name.startswith("samples_") and STAMP.search(file.stem):
            continue
        header = _first_record(file)
        if header.get("schema") is None:
            grouped[str(file)] = {}, [file]
        elif header["schema"] == SCHEMA:
            run = header["run"] or {"pruning": None}
            grouped.setdefault(json.dumps(header, sort_keys=True), (run, []))[1].append(file)
    if not grouped:
        raise ViewerError(f"no notes in {path}; run lm_eval with the model argument notes=DIR and give DIR")
    alone = len(grouped) == 1 and path.is_dir()
    return [Source(path.name if alone else found[0].stem, tuple(found), run) for run, found in grouped.values()]


def _named(sources: Sequence[Source]) -> list[Source]:
    """Gives sources names that tell them apart: by model, policy and window where that does, else with a number."""
    facts = ("name", "pruning", "ablation", "max_context")
    told = [[str(source.run[key]) for key in facts if source.run.get(key) is not None] for source in sources]
    labels = [", ".join(words) or source.name for words, source in zip(told, sources, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({source.name})" for label, source in zip(labels, sources, strict=True)]
    taken: list[str] = []
    for label in labels:
        taken.append(label if labels.count(label) == 1 else f"{label} {taken.count(label) + 1}")
    unique = [f"{number + 1}: {name}" if taken.count(name) > 1 else name for number, name in enumerate(taken)]
    return [replace(source, name=name) for name, source in zip(unique, sources, strict=True)]


def _first_record(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as lines:
        record = _parse(lines.readline())
    if record is None:
        raise ViewerError(f"{path}: its first line is no JSON object; give notes or JSONL with a column of text")
    return record


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSONL file, the header of notes left out; a torn line, left by a killed run, is skipped."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None and "schema" not in record:
                yield record


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
