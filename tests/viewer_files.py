"""Writes notes as the engine leaves them, and takes pages apart again."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hcot_lmeval.events import Recorder
from hcot_lmeval.markup import PRESETS, MarkerIds
from hcot_lmeval.notes import Note, NoteTaker
from hcot_lmeval.trace import LiveContext
from tests.reference import CLOSE, LEAD, MARKERS, OPEN, SPLIT


def spell(token: int, markup: str = "hcot") -> str:
    """The text of one token of the tests' vocabulary."""
    names = PRESETS[markup]
    special = {OPEN: names.open, SPLIT: names.split, CLOSE: names.close, LEAD: names.lead or "lead "}
    return special.get(token, f"w{token} ")


def write_notes(
    path: Path,
    traces: Iterable[tuple[Sequence[int], int]],
    markup: str = "hcot",
    policy: str = "recompute",
    *,
    words: Mapping[int, str] | None = None,
    decode: Any = "words",
    prompt_acts: bool = False,
    context: Any = None,
    run: Mapping[str, Any] | None = None,
    first: int = 0,
) -> Path:
    """Adds one note for each (token ids, length of the prompt), as problems `first`, ... of the task ``toy``."""
    markers = MARKERS[markup]

    def text(ids: Sequence[int]) -> str:
        return "".join((words or {}).get(i) or spell(i, markup) for i in ids)

    facts = {"pruning": policy, "markup": markup, "max_context": 1024, **(run or {})}
    facts |= {"prompt_markers": "acting"} if prompt_acts else {}
    with NoteTaker(path, text if decode == "words" else decode, facts) as taker:
        for number, (ids, prompt_len) in enumerate(traces, first):
            made = context(prompt_len) if context else LiveContext(markers, policy)
            taker.add(note_of(ids, prompt_len, made, doc_id=number, prompt_acts=prompt_acts))
    return path


def note_of(
    ids: Sequence[int],
    prompt_len: int,
    context: LiveContext,
    *,
    doc_id: int = 0,
    finish: str = "eos",
    prompt_acts: bool = False,
    clock: Callable[[], float] = lambda: 0.0,
) -> Note:
    """The note that the engine makes of a trace, which it pushes through a fresh live context."""
    recorder = Recorder(clock)
    for token in ids[:prompt_len]:
        _ = context.push(token) if prompt_acts else context.push_inert(token)
    recorder.prefill(prompt_len, len(context.live), 0)
    for index, token in enumerate(ids[prompt_len:], prompt_len):
        recorder.step(index, token, context.push(token), len(context.live))
    recorder.finish(finish, None, context.depth)
    meta = {"task": "toy", "doc_id": doc_id, "repeat": 0, "seed": 0}
    prompt, generated = tuple(ids[:prompt_len]), tuple(ids[prompt_len:])
    return Note(f"toy/{doc_id}/0/0", 0, prompt, generated, tuple(recorder.events), meta)


def nested_ids(seed: int, length: int, markers: MarkerIds = MARKERS["hcot"]) -> list[int]:
    """A well-formed trace of about that length: text, and blocks up to three deep."""
    rng = random.Random(seed)

    def text(most: int) -> list[int]:
        return [rng.randrange(10, 60) for _ in range(rng.randint(1, most))]

    def block(depth: int) -> list[int]:
        inner = block(depth - 1) + text(4) if depth > 1 and rng.random() < 0.7 else []
        return [markers.open, *text(12), *inner, markers.split, *text(3), markers.close]

    ids = text(4)
    while len(ids) < length:
        ids += block(3) + text(4)
    return ids


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes plain traces."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Page(HTMLParser):
    """A page, read as a browser would: its elements, and what its scripts and its style hold.

    Attributes:
        elements: (tag, attributes) in order.
        contents: (tag, attributes, text) of every script and style.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, dict[str, str | None], str]] = []
        self._raw: str | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.contents.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style"):
            tag, attrs, text = self.contents[-1]
            self.contents[-1] = (tag, attrs, text + data)

    def handle_endtag(self, tag: str) -> None:
        self.lasttag = ""

    def content(self, name: str) -> str:
        """Text of the script or style with this id."""
        return next(text for _, attrs, text in self.contents if attrs.get("id") == name)

    @property
    def index(self) -> dict[str, Any]:
        return json.loads(self.content("index"))

    def trace(self, place: int) -> tuple[str, str, dict[str, Any]]:
        """Prompt, text and structure of one trace."""
        lines = gzip.decompress(base64.b64decode(self.content(f"blob{place}"))).decode("ascii")
        first, second = lines.split("\n")
        prompt, text = json.loads(first)
        return prompt, text, json.loads(second)
