"""What becomes of a row: token ids, then compiled documents, with the reasons where it cannot be trained on.

These are functions for `datasets.Dataset.map`; the processes that run them share nothing.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from datasets import Features, List, Value

from hcot_lmeval import grammar, markup, tokens, trace
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.provenance import files_digest
from hcot_lmeval.training.data import documents, text
from hcot_lmeval.training.data.documents import (
    COLUMNS,
    Document,
    Example,
    TooLong,
    compile_document,
    faults,
)
from hcot_lmeval.training.data.text import TextForm, Unusable

IDS = List(Value("int32"))
PLACE = {"source": Value("string"), "row": Value("int64"), "key": Value("string"), "answer": Value("string")}
EXAMPLE_FEATURES = Features(
    PLACE | {"prompt_ids": IDS, "completion_ids": IDS, "unusable": Value("string"), "faults": List(Value("string"))}
)
DOCUMENT_FEATURES = Features(
    PLACE
    | {name: List(Value("int8")) if name in ("states", "classes") else IDS for name in COLUMNS}
    | {
        "reasons": List(Value("string")),
        "blocks": Value("bool"),
        "truncated": Value("bool"),
        "trace_tokens": Value("int32"),
        "targets_count": Value("int32"),
        "digest": Value("string"),
    }
)
"""A document for each row; one that is left out has no tokens."""


def tokenise(row: Mapping[str, Any], form: TextForm, grammar: Grammar) -> dict[str, Any]:
    """Returns what `EXAMPLE_FEATURES` has for a row of `sources.FEATURES`."""
    try:
        example, unusable = form.example(row), None
    except Unusable as error:
        example, unusable = Example((), ()), error.args[0]
    return {
        "source": row["source"],
        "row": row["row"],
        "key": question_key(row),
        "answer": row["answer"],
        "prompt_ids": example.prompt_ids,
        "completion_ids": example.completion_ids,
        "unusable": unusable,
        "faults": sorted([*faults(example, grammar), *form.faults(row)]),
    }


def question_key(row: Mapping[str, Any]) -> str:
    """Returns a hex digest of what is asked, system messages and surrounding blanks apart."""
    messages = row["messages"] or [{"role": "user", "content": row["question"]}]
    asked = [(m["role"], (m["content"] or "").strip()) for m in messages if m["role"] != "system"]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def compile_rows(batch: Mapping[str, list[Any]], **options: Any) -> dict[str, list[Any]]:
    """Returns what `DOCUMENT_FEATURES` has for a batch of tokenised rows.

    Args:
        batch: a list for each of `EXAMPLE_FEATURES`.
        options: grammar, policy, max_length (see `compile_document`); keep_malformed, and cut (whether long traces are
            cut or left out).
    """
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    out: dict[str, list[Any]] = {name: [] for name in DOCUMENT_FEATURES}
    for row in rows:
        for name, value in _entry(row, **options).items():
            out[name].append(value)
    return out


def _entry(
    row: Mapping[str, Any], grammar: Grammar, policy: str, max_length: int, *, keep_malformed: bool, cut: bool
) -> dict[str, Any]:
    """Returns what `DOCUMENT_FEATURES` has for one row of the source."""
    example = Example(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["answer"])
    document, reasons = Document(), row["faults"]
    if row["unusable"] is not None:
        reasons = [row["unusable"]]
    elif keep_malformed or not reasons:
        with suppress(TooLong):
            document = compile_document(example, grammar, policy, max_length=max_length)
        if not document.learned or (document.learned < len(example.completion_ids) and not cut):
            document, reasons = Document(), [*reasons, "too_long"]
    learned = document.learned
    return {
        **{name: row[name] for name in PLACE},
        **{name: getattr(document, name) for name in COLUMNS},
        "reasons": reasons,
        "blocks": grammar.markers.open in example.completion_ids,
        "truncated": 0 < learned < len(example.completion_ids),
        "trace_tokens": len(example.prompt_ids) + learned if learned else 0,
        "targets_count": learned,
        "digest": _document_digest(document),
    }


def _document_digest(document: Document) -> str:
    content = b"".join(array("i", getattr(document, name)).tobytes() for name in COLUMNS)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def preparation_code() -> str:
    """Returns a digest of the code that decides what a row becomes."""
    files = (__file__, grammar.__file__, markup.__file__, tokens.__file__, trace.__file__, documents.__file__)
    return files_digest((*files, text.__file__))
