"""From sources to packed rows: rows are read, tokenised, checked, compiled and packed.

    data = TrainingData(config.data, tokenizer, grammar, markup, seed=0)
    prepared = data.train(Policy.RECOMPUTE)
    print(prepared.report)
    prepared.rows[0]                      # {"ids": [...], "positions": [...], ...}

Reading, tokenising and compiling run in `config.workers` processes and are kept in the cache of `datasets`, under a
name that says what they were made from and with; the second time they take no time. Packing is done each time.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hcot_lmeval import grammar as grammar_module
from hcot_lmeval import markup as markup_module
from hcot_lmeval import tokens, trace
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import Markup
from hcot_lmeval.trace import Policy
from hcot_lmeval.training import documents as documents_module
from hcot_lmeval.training import text as text_module
from hcot_lmeval.training.config import DataConfig, SourceConfig
from hcot_lmeval.training.data_report import Finding, Report
from hcot_lmeval.training.documents import (
    COLUMNS,
    Document,
    Example,
    TooLong,
    compile_document,
    faults,
    split_stages,
)
from hcot_lmeval.training.rows import PackedRows, assign, list_lengths
from hcot_lmeval.training.sources import cached_map, code_digest, load_source
from hcot_lmeval.training.text import TextForm, Unusable, digest_of

CODE: tuple[ModuleType, ...] = (grammar_module, markup_module, tokens, trace, documents_module, text_module)
"""Modules that decide, beside this one, what a row becomes."""

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
        "first": Value("bool"),
        "truncated": Value("bool"),
        "trace_tokens": Value("int32"),
        "targets_count": Value("int32"),
        "digest": Value("string"),
    }
)
"""One row a document, or one without tokens for a row that is left out; `first` marks the first of each row."""
BATCH = 100
"""Rows that a worker holds at a time."""


@dataclass(frozen=True)
class Prepared:
    """Rows ready for training.

    Attributes:
        rows: packed rows, read by index.
        report: what became of the source's rows.
        digest: hex digest of the documents in order; equal data, tokenizer and policy give an equal one.
    """

    rows: PackedRows
    report: Report
    digest: str


class TrainingData:
    """What a run trains on and what it holds out.

    Args:
        config: sources and options.
        tokenizer: with the markers in its vocabulary.
        grammar: the same markers, and the thinking and end tokens.
        markup: the notation of the traces.
        seed: of the packing and the choice of problems.

    Raises:
        ValueError: see `TextForm`.
    """

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, grammar: Grammar, markup: Markup, *, seed: int = 0
    ) -> None:
        self.config, self.grammar, self.seed = config, grammar, seed
        self.form = TextForm(tokenizer, markup, config.system_prompt)

    def train(self, policy: Policy | str, sources: Sequence[SourceConfig] = ()) -> Prepared:
        """Returns the training rows of `sources` (default: ``data.train``) without those that are held out.

        Raises:
            ValueError, FileNotFoundError: a source cannot be read; see `sources.load_source`.
        """
        return self._prepare(sources or self.config.train, Policy(policy), held_out=False)

    def held_out(self, policy: Policy | str) -> Prepared:
        """Returns the held-out rows: of the held-out sources, or else the share of ``data.train``."""
        return self._prepare(self.config.held_out or self.config.train, Policy(policy), held_out=True)

    def problems(self, count: int) -> list[tuple[list[int], str]]:
        """Returns up to `count` held-out problems; see `held_out_problems`."""
        examples = self.examples(self.config.held_out or self.config.train)
        return held_out_problems(examples, count, seed=self.seed, chosen=self._held_out(examples["key"]))

    def examples(self, sources: Sequence[SourceConfig]) -> Dataset:
        """Returns the tokenised rows of `sources`, those that are unusable included."""
        return concatenate_datasets([self._examples(source) for source in sources])

    def documents(self, sources: Sequence[SourceConfig], policy: Policy) -> Dataset:
        """Returns the compiled documents of `sources`, with a row for each row that is left out."""
        return concatenate_datasets([self._documents(source, policy) for source in sources])

    def _examples(self, source: SourceConfig) -> Dataset:
        return cached_map(
            load_source(source, self.form.markup.name),
            partial(_tokenise, form=self.form, grammar=self.grammar),
            (self.form.digest, digest_of(self.grammar), _code()),
            EXAMPLE_FEATURES,
            num_proc=self._workers,
            desc=f"Tokenising {source.path}",
        )

    def _documents(self, source: SourceConfig, policy: Policy) -> Dataset:
        config = self.config
        options: dict[str, Any] = {
            "policy": policy.value,
            "stages": config.form == "stages",
            "keep_malformed": config.malformed == "keep",
            "cut": config.too_long == "cut",
            "max_length": config.row_length,
        }
        return cached_map(
            self._examples(source),
            partial(_compile, grammar=self.grammar, **options),
            (sorted(options.items()), digest_of(self.grammar), _code()),
            DOCUMENT_FEATURES,
            batched=True,
            batch_size=BATCH,
            num_proc=self._workers,
            desc=f"Compiling {source.path}",
        )

    @property
    def _workers(self) -> int | None:
        return self.config.workers if self.config.workers > 1 else None  # None: in this process

    def _prepare(self, sources: Sequence[SourceConfig], policy: Policy, *, held_out: bool) -> Prepared:
        documents = self.documents(sources, policy)
        wanted = self._held_out(documents["key"]) == held_out
        lengths = list_lengths(documents, "ids")
        used = np.flatnonzero(wanted & (lengths > 0))
        groups = [used[group].tolist() for group in assign(lengths[used], self.config.row_length, self.seed)]
        rows = PackedRows(documents, groups, self.config.row_length)
        leaked = not held_out and bool(self.config.held_out)
        return Prepared(rows, _report(documents, lengths, wanted, rows, leaked=leaked), _digest(documents, used))

    def _held_out(self, keys: Sequence[str]) -> np.ndarray:
        """Which rows are held out, bool: by their question alone, so that no question is on both sides."""
        if self.config.held_out:
            return np.array([key in self._held_out_keys for key in keys], dtype=bool)
        share = self.config.held_out_share
        return np.array([int(key, 16) < share * 16 ** len(key) for key in keys], dtype=bool)

    @cached_property
    def _held_out_keys(self) -> frozenset[str]:
        return frozenset(self.examples(self.config.held_out)["key"])


def held_out_problems(
    examples: Dataset, count: int, *, seed: int = 0, chosen: np.ndarray | None = None
) -> list[tuple[list[int], str]]:
    """Returns prompts and answers for free-running generation, in the order of the rows.

    Args:
        examples: tokenised rows (`TrainingData.examples`); those without an answer or a prompt are passed over.
        count: most problems.
        seed: of the choice among them.
        chosen: bool for each row, whether it may be chosen; by default all may.

    Returns:
        (prompt_ids, answer) of up to `count` problems with distinct questions.
    """
    columns = zip(examples["answer"], examples["unusable"], examples["key"], strict=True)
    first: dict[str, int] = {}
    for index, (answer, unusable, key) in enumerate(columns):
        if answer is not None and unusable is None and (chosen is None or chosen[index]):
            first.setdefault(key, index)
    found = list(first.values())
    if len(found) > count:
        found = sorted(random.Random(seed).sample(found, count))
    return [(list(row["prompt_ids"]), row["answer"]) for row in (examples[index] for index in found)]


# --- what runs in the workers -----------------------------------------------------------------------------------------


def _tokenise(row: Mapping[str, Any], form: TextForm, grammar: Grammar) -> dict[str, Any]:
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
        "faults": faults(example, grammar),
    }


def question_key(row: Mapping[str, Any]) -> str:
    """Returns a hex digest of what is asked, system messages and surrounding blanks apart."""
    messages = row["messages"] or [{"role": "user", "content": row["question"]}]
    asked = [(m["role"], (m["content"] or "").strip()) for m in messages if m["role"] != "system"]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _compile(batch: Mapping[str, list[Any]], **options: Any) -> dict[str, list[Any]]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    out: dict[str, list[Any]] = {name: [] for name in DOCUMENT_FEATURES}
    for row in rows:
        for entry in _entries(row, **options):
            for name, values in out.items():
                values.append(entry[name])
    return out


def _entries(row: Mapping[str, Any], *, keep_malformed: bool, cut: bool, **options: Any) -> Iterator[dict[str, Any]]:
    """Yields what `DOCUMENT_FEATURES` has for one row of the source."""
    example = Example(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["answer"])
    found, reasons = list[Document](), row["faults"]
    if row["unusable"] is not None:
        reasons = [row["unusable"]]
    elif keep_malformed or not row["faults"]:
        found = _compiled(example, **options)
        learned = sum(document.learned for document in found)
        if not found or (learned < len(example.completion_ids) and not cut):
            found, reasons = [], [*reasons, "too_long"]
    for number, document in enumerate(found or [Document()]):
        first, learned = number == 0, sum(d.learned for d in found) if number == 0 else 0
        yield {
            **{name: row[name] for name in PLACE},
            **{name: getattr(document, name) for name in COLUMNS},
            "reasons": reasons if first else [],
            "first": first,
            "truncated": first and bool(found) and learned < len(example.completion_ids),
            "trace_tokens": len(example.prompt_ids) + learned if first and found else 0,
            "targets_count": document.learned,
            "digest": _document_digest(document),
        }


def _compiled(example: Example, *, grammar: Grammar, policy: str, stages: bool, max_length: int) -> list[Document]:
    """The documents of an example, or none if no beginning of it fits."""
    try:
        if stages and policy != Policy.OFF:  # without prunes there is one stage, the plain document
            return split_stages(example, grammar, policy=policy, max_length=max_length)
        return [compile_document(example, grammar, policy, max_length=max_length)]
    except TooLong:
        return []


def _document_digest(document: Document) -> str:
    content = b"".join(array("i", getattr(document, name)).tobytes() for name in COLUMNS)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# --- summaries --------------------------------------------------------------------------------------------------------


def _report(documents: Dataset, lengths: np.ndarray, wanted: np.ndarray, rows: PackedRows, *, leaked: bool) -> Report:
    """Sums up; `leaked` says that unwanted rows ask what a held-out source asks, which is worth a finding."""
    columns = _columns(documents, "first", "truncated", "trace_tokens", "targets_count")
    used = wanted & (lengths > 0)
    first = columns["first"]
    answered = documents.data["answer"].is_valid().to_numpy()
    return Report(
        rows=int(first.sum()),
        held_out=0 if leaked else int((first & ~wanted).sum()),
        without_answer=int((first & used & ~answered).sum()),
        truncated=int((columns["truncated"] & used).sum()),
        documents=int(used.sum()),
        trace_tokens=int(columns["trace_tokens"][used].sum()),
        forwarded_tokens=int(lengths[used].sum()),
        targets=int(columns["targets_count"][used].sum()),
        longest=int(lengths[used].max(initial=0)),
        packed_rows=len(rows),
        padding=rows.padding,
        findings=list(_findings(documents, lengths, wanted, leaked)),
    )


def _findings(documents: Dataset, lengths: np.ndarray, wanted: np.ndarray, leaked: bool) -> Iterator[Finding]:
    telling = list_lengths(documents, "reasons") > 0
    if leaked:
        telling |= ~wanted & _columns(documents, "first")["first"]
    for index in np.flatnonzero(telling & (wanted | leaked)).tolist():
        entry = documents[index]
        reasons = (*entry["reasons"], *(() if wanted[index] else ("in_held_out",)))
        yield Finding(entry["source"], entry["row"], reasons, kept=bool(wanted[index] and lengths[index]))


def _columns(documents: Dataset, *names: str) -> dict[str, np.ndarray]:
    table = documents.select_columns(list(names)).with_format("arrow")[:]
    return {name: table[name].to_numpy() for name in names}


def _digest(documents: Dataset, used: np.ndarray) -> str:
    return hashlib.sha256("".join(_columns(documents, "digest")["digest"][used]).encode()).hexdigest()


def _code() -> str:
    return code_digest(__file__, *(Path(str(module.__file__)) for module in CODE))
