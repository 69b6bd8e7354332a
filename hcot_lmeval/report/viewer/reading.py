"""Files to traces.

Two kinds of files are read, told apart by their first line, and may stand side by side:

* notes of the engine (`hcot_lmeval.notes`): exact tokens, and what was pruned when;
* plain traces: rows (`hcot_lmeval.files`) with a text that some model wrote. Their markers are found in it and their
  tokens are words and other pieces, unless a tokenizer is given.

Traces are yielded one at a time, for a file of notes may be larger than memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from hcot_lmeval.columns import ROLES, TRAINED, find_columns
from hcot_lmeval.events import Event, Finish, Recorder
from hcot_lmeval.files import Input
from hcot_lmeval.markup import Markup, resolve_markers
from hcot_lmeval.notes import SCHEMA, Note, NotesFile, RunNotes
from hcot_lmeval.report.results import STAMP
from hcot_lmeval.trace import LiveContext, Policy

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
    """One generation.

    Attributes:
        source: where it is from.
        task: name of the task, or the stem of the file.
        doc_id: the problem within the task.
        repeat: which response to the problem, from 0.
        prompt: text of the prompt.
        text: everything generated, markers included.
        prompt_tokens: length of the prompt; the index of the first generated token.
        events: what happened to the generated tokens, in order.
        offsets: index of a token -> where it begins in `text`; see `hcot_lmeval.notes.Note`.
        policy: what a return did, or would have done.
        prompt_acts: whether markers in the prompt acted.
        seconds: how long it took; None if nobody knows.
        unit: what is counted: ``token`` or ``piece``.
        gold: the right answer, if the file says it.
    """

    source: Source
    task: str
    doc_id: int | str
    repeat: int
    prompt: str
    text: str
    prompt_tokens: int
    events: Sequence[Event]
    offsets: Mapping[int, int]
    policy: str
    prompt_acts: bool = False
    seconds: float | None = None
    unit: str = "token"
    gold: str | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.task}/{self.doc_id}/{self.repeat} of {self.source.name}"

    @property
    def finish(self) -> str:
        """Why the generation ended; empty if nobody knows."""
        last = self.events[-1]
        return last.reason if isinstance(last, Finish) else ""


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
        header = next(rows(file), {})
        schema = str(header.get("schema", ""))
        if schema == SCHEMA:
            run = NotesFile(file).run or {"pruning": None}
            grouped.setdefault(json.dumps(header, sort_keys=True), (run, []))[1].append(file)
        elif schema.startswith(SCHEMA.partition("/")[0]):
            raise ViewerError(
                f"{file} holds notes as another version wrote them ({schema}, not {SCHEMA}); view them with that "
                "version, or run lm_eval again with another notes=DIR and journal=off"
            )
        elif not schema:
            grouped[str(file)] = {}, [file]
    if not grouped:
        raise ViewerError(f"no notes in {path}; run lm_eval with the model argument notes=DIR and give DIR")
    alone = len(grouped) == 1 and path.is_dir()
    return [Source(path.name if alone else found[0].stem, tuple(found), run) for run, found in grouped.values()]


def _named(sources: Sequence[Source]) -> list[Source]:
    """Gives sources names that tell them apart: by model, policy and window where that does, else with a number."""
    facts = ("name", "pruning", "ablation", "max_context")
    words = [[str(source.run[key]) for key in facts if source.run.get(key) is not None] for source in sources]
    labels = [", ".join(parts) or source.name for parts, source in zip(words, sources, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({source.name})" for label, source in zip(labels, sources, strict=True)]
    taken: list[str] = []
    for label in labels:
        taken.append(label if labels.count(label) == 1 else f"{label} {taken.count(label) + 1}")
    unique = [f"{number + 1}: {name}" if taken.count(name) > 1 else name for number, name in enumerate(taken)]
    return [replace(source, name=name) for name, source in zip(unique, sources, strict=True)]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file.

    Raises:
        ViewerError: a line is no JSON object.
    """
    for record in Input(str(path), path).records():
        if record.data is None:
            raise ViewerError(f"{record.where} is no JSON object; give notes or rows with a column of text")
        yield record.data


def plural(count: int, noun: str) -> str:
    """Returns ``1 token`` or ``3 tokens``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- notes of the engine ----------------------------------------------------------------------------------------------


def note_traces(source: Source, notes: RunNotes | None = None) -> Iterator[Trace]:
    """Yields the traces of a source of notes, in the order of its files, each request once (`RunNotes`).

    Raises:
        StoreError: a line is no note, or one that contradicts itself.
    """
    for note in notes or RunNotes(source.paths):
        yield _of_note(source, note)


def _of_note(source: Source, note: Note) -> Trace:
    return Trace(
        source=source,
        task=str(note.meta.get("task", note.request)),
        doc_id=doc_name(note.meta.get("doc_id", note.request)),
        repeat=int(note.meta.get("repeat", note.sample)),
        prompt=note.prompt,
        text=note.text,
        prompt_tokens=len(note.prompt_ids),
        events=note.events,
        offsets=note.offsets,
        policy=source.run.get("pruning") or Policy.RECOMPUTE.value,
        prompt_acts=source.run.get("prompt_markers") == "acting",
        seconds=note.statistics.wall_seconds,
    )


def doc_name(value: Any) -> int | str:
    """Returns a `Trace.doc_id`: anything but a number as text."""
    return value if isinstance(value, int) else str(value)


# --- texts that any model wrote ---------------------------------------------------------------------------------------


def columns_of(row: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Returns the columns of the roles ``text``, ``question`` and ``answer`` of a row, as far as it has them.

    Args:
        row: of any data set; a hierarchical trace comes before flat ones.
        given: role -> column, in place of the usual ones.
    """
    present = [name for name, value in row.items() if value is not None]
    text = next(({"text": name} for name in (TRAINED["trace"], "text") if name in present), {})
    return find_columns(present, {**text, **given})


Cut = Callable[[str], list[str]]
"""Cuts a text that holds no marker into tokens; joined again they are the text."""

pieces: Cut = re.compile(r"\s*\w+|\s*[^\w\s]|\s+").findall
"""Words and other signs, with the space before them: about what a tokenizer makes of English."""


def tokenizer_cut(name: str) -> Cut:
    """Returns the cut of a tokenizer of transformers.

    Raises:
        ViewerError: the tokenizer does not say which characters its tokens are.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.is_fast:
        raise ViewerError(f"the tokenizer {name} has no offsets; choose one with a tokenizer.json")

    def cut(text: str) -> list[str]:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        starts = list(accumulate((start for start, _ in spans), max))  # the bytes of one character share its start
        return [text[a:b] for a, b in pairwise([0, *starts[1:], len(text)])] if spans else []

    return cut


def plain_traces(
    source: Source, markup: Markup, policy: Policy, columns: Mapping[str, str] | None = None, cut: Cut | None = None
) -> Iterator[Trace]:
    """Yields the rows of plain files as traces, as if a return had acted as `policy` says.

    Args:
        source: the files.
        markup: notation of the blocks.
        policy: what a return would have done.
        columns: see `columns_of`.
        cut: makes tokens of text; None: `pieces`.

    Raises:
        ViewerError: a row has no text.
    """
    vocabulary: dict[str, int] = {marker: i for i, marker in enumerate(markup.markers)}
    markers = resolve_markers(markup, vocabulary.get)
    for path, number, row in ((file, *pair) for file in source.paths for pair in enumerate(rows(file))):
        found = columns_of(row, columns or {})
        column, prompt, gold = (found.get(role) for role in ("text", "question", "answer"))
        if column is None or not isinstance(row[column], str):
            expected = (columns or {}).get("text") or " or ".join((TRAINED["trace"], "text", *ROLES["text"]))
            raise ViewerError(
                f"{path}, row {number + 1}: no column {expected}, only {', '.join(row)}; choose with --text-column"
            )
        tokens = cut_at_markers(row[column], markup, cut or pieces)
        prompt_text = str(row[prompt]) if prompt else ""
        prompt_tokens = len((cut or pieces)(prompt_text))
        ids = [vocabulary.get(token, len(vocabulary)) for token in tokens]
        yield Trace(
            source=source,
            task=path.stem,
            doc_id=number if row.get("id") is None else doc_name(row["id"]),
            repeat=0,
            prompt=prompt_text,
            text=row[column],
            prompt_tokens=prompt_tokens,
            events=replay(LiveContext(markers, policy), [len(vocabulary)] * prompt_tokens, ids),
            offsets=dict(enumerate(accumulate(map(len, tokens[:-1]), initial=0), start=prompt_tokens)),
            policy=policy.value,
            unit="token" if cut else "piece",
            gold=str(row[gold]) if gold else None,
        )


def cut_at_markers(text: str, markup: Markup, cut: Cut) -> list[str]:
    """Cuts a text into its markers and the tokens between them; joined again they are the text."""
    tokens: list[str] = []
    for part in re.split(f"({'|'.join(map(re.escape, markup.markers))})", text):
        tokens += [part] if part in markup.markers else cut(part)
    return tokens


def replay(context: LiveContext, prompt: Sequence[int], ids: Sequence[int]) -> list[Event]:
    """Pushes a prompt and a generation through a fresh live context and returns what happened, without times."""
    recorder = Recorder(clock=lambda: 0.0)
    for token in prompt:
        context.push_inert(token)
    recorder.prefill(len(prompt), len(context.live), 0)
    for index, token in enumerate(ids, len(prompt)):
        recorder.step(index, token, context.push(token), len(context.live))
    recorder.finish("", None, context.depth)
    return recorder.events
