"""Texts that our engine did not generate, as traces: markers found in the text, words and signs in place of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

from hcot_lmeval.markup import Markup, resolve_markers
from hcot_lmeval.report.viewer.reading import USUAL, Columns, Source, Trace, ViewerError, doc_name, records
from hcot_lmeval.trace import LiveContext, Policy

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
    source: Source, markup: Markup, policy: Policy, columns: Columns, cut: Cut | None = None
) -> Iterator[Trace]:
    """Yields the rows of plain files as traces, as if a return had acted as `policy` says; the usual cut is `pieces`.

    Raises:
        ViewerError: a row has no text.
    """
    vocabulary: dict[str, int] = {marker: i for i, marker in enumerate(markup.markers)}
    markers = resolve_markers(markup, vocabulary.get)
    for path, number, row in ((file, *pair) for file in source.paths for pair in enumerate(records(file))):
        column, prompt, gold = (columns.find(row, role) for role in ("text", "prompt", "gold"))
        if column is None or not isinstance(row[column], str):
            wanted = columns.text or " or ".join(USUAL["text"])
            raise ViewerError(
                f"{path}, row {number + 1}: no column {wanted}, only {', '.join(row)}; choose with --text-column"
            )
        tokens = cut_at_markers(row[column], markup, cut or pieces)
        prompt_text = str(row[prompt]) if prompt else ""
        yield Trace(
            source=source,
            task=path.stem,
            doc_id=number if row.get("id") is None else doc_name(row["id"]),
            repeat=0,
            prompt=prompt_text,
            text=row[column],
            prompt_ids=[len(vocabulary)] * len((cut or pieces)(prompt_text)),
            ids=[vocabulary.get(token, len(vocabulary)) for token in tokens],
            offsets=[0, *accumulate(map(len, tokens))],
            context=lambda: LiveContext(markers, policy),
            unit="token" if cut else "piece",
            gold=str(row[gold]) if gold else None,
        )


def cut_at_markers(text: str, markup: Markup, cut: Cut) -> list[str]:
    """Cuts a text into its markers and the tokens between them; joined again they are the text."""
    tokens: list[str] = []
    for part in re.split(f"({'|'.join(map(re.escape, markup.markers))})", text):
        tokens += [part] if part in markup.markers else cut(part)
    return tokens
