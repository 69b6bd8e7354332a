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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from hcot_lmeval import columns as column_rules
from hcot_lmeval import grammar as grammar_rules
from hcot_lmeval import markup as markup_rules
from hcot_lmeval import tokens
from hcot_lmeval import trace as trace_rules
from hcot_lmeval.grammar import Grammar
from hcot_lmeval.markup import Markup
from hcot_lmeval.provenance import files_digest
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.config import DataConfig, SourceConfig
from hcot_lmeval.training.data import documents as document_rules
from hcot_lmeval.training.data import text as text_rules
from hcot_lmeval.training.data.documents import (
    COLUMNS,
    Document,
    Example,
    TooLong,
    compile_document,
    faults,
    split_stages,
)
from hcot_lmeval.training.data.rows import PackedRows, assign, columns_of, largest, list_lengths
from hcot_lmeval.training.data.sources import cached_map, load_source
from hcot_lmeval.training.data.text import TextForm, Unusable, digest_of

BATCH = 100
"""Rows that a worker holds at a time."""


@dataclass(frozen=True)
class Finding:
    """Something about one row.

    Attributes:
        source: the path of its source, as configured.
        row: its number there, from 0.
        reasons: those of `documents.faults` and `TextForm.faults`; ``too_long``, ``no_trace``, ``no_question``,
            ``no_chat_template``, ``in_held_out`` (its question is a held-out one).
        kept: whether it is trained on all the same.
    """

    source: str
    row: int
    reasons: tuple[str, ...]
    kept: bool


@dataclass
class Report:
    """Counts over the rows of one or more sources.

    Attributes:
        rows: all of them.
        elsewhere: of those, on the other side of the held-out split.
        without_answer: of those trained on, without an expected answer.
        without_block: of those trained on, by source, that hold no block, so that there is nothing to prune.
        truncated: of those trained on, cut to fit.
        trace_tokens: of the traces trained on, as far as they are, prompts included.
        forwarded_tokens: after compiling; more than those of the traces, since solutions are read again.
        targets: tokens that there is a loss on.
        longest: forwarded tokens of the longest document.
        positions: positions that the model needs: the largest position id, and one.
        packed_rows: rows that the documents are packed into.
        padding: the share of padding in them.
        findings: what is wrong with single rows.
    """

    rows: int = 0
    elsewhere: int = 0
    without_answer: int = 0
    without_block: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    trace_tokens: int = 0
    forwarded_tokens: int = 0
    targets: int = 0
    longest: int = 0
    positions: int = 0
    packed_rows: int = 0
    padding: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def rejected(self) -> list[Finding]:
        """The rows that were left out because of something about them."""
        return [finding for finding in self.findings if not finding.kept]

    @property
    def used(self) -> int:
        """The rows that are trained on."""
        return self.rows - self.elsewhere - len(self.rejected)

    def __str__(self) -> str:
        lines = [
            f"{self.used:,} of {self.rows:,} rows ({self.truncated:,} cut, {self.without_answer:,} without an answer), "
            f"the longest {self.longest:,} tokens",
            f"{self.trace_tokens:,} tokens of traces, {self.forwarded_tokens:,} forwarded, {self.targets:,} targets",
            f"{self.packed_rows:,} packed rows, {self.padding:.1%} padding",
        ]
        if self.elsewhere:
            lines.append(f"on the other side of the held-out split: {self.elsewhere:,} rows")
        if self.without_block:
            sources = ", ".join(f"{count:,} of {source}" for source, count in self.without_block.most_common())
            lines.append(f"without a single block, so nothing is pruned in them: {sources}")
        for verb, findings in (("left out", self.rejected), ("kept", [f for f in self.findings if f.kept])):
            if findings:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in _count(findings).most_common())
                lines.append(f"{verb}: {len(findings):,} rows ({reasons})")
        return "\n".join(lines)


def make_report(rows: PackedRows, lengths: np.ndarray, wanted: np.ndarray, *, leaked: bool) -> Report:
    """Sums up what `compile_rows` says of each row.

    Args:
        rows: with documents as in `DOCUMENT_FEATURES`.
        lengths: forwarded tokens of each document, 0 for rows that are left out, int [documents].
        wanted: whether a document is on this side of the held-out split, bool [documents].
        leaked: whether the others ask what a held-out source asks, which is worth a finding each.
    """
    documents = rows.documents
    columns = columns_of(documents, "first", "blocks", "truncated", "trace_tokens", "targets_count", "answer", "source")
    first, used = columns["first"], wanted & (lengths > 0)
    unanswered = np.array([answer is None for answer in columns["answer"]], dtype=bool)
    return Report(
        rows=int(first.sum()),
        elsewhere=0 if leaked else int((first & ~wanted).sum()),
        without_answer=int((first & used & unanswered).sum()),
        without_block=Counter(columns["source"][first & used & ~columns["blocks"]].tolist()),
        truncated=int((columns["truncated"] & used).sum()),
        trace_tokens=int(columns["trace_tokens"][used].sum()),
        forwarded_tokens=int(lengths[used].sum()),
        targets=int(columns["targets_count"][used].sum()),
        longest=int(lengths[used].max(initial=0)),
        positions=largest(documents, "positions") + 1,
        packed_rows=len(rows),
        padding=rows.padding,
        findings=list(_findings(documents, lengths, wanted, first & leaked)),
    )


def _findings(documents: Dataset, lengths: np.ndarray, wanted: np.ndarray, leaked: np.ndarray) -> Iterator[Finding]:
    telling = (list_lengths(documents, "reasons") > 0) | (leaked & ~wanted)
    for index in np.flatnonzero(telling & (wanted | leaked)).tolist():
        entry = documents[index]
        reasons = (*entry["reasons"], *(() if wanted[index] else ("in_held_out",)))
        yield Finding(entry["source"], entry["row"], reasons, kept=bool(wanted[index] and lengths[index]))


def _count(findings: Iterable[Finding]) -> Counter[str]:
    return Counter(reason for finding in findings for reason in finding.reasons)


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
            partial(tokenise, form=self.form, grammar=self.grammar),
            (self.form.digest, digest_of(self.grammar), preparation_code()),
            EXAMPLE_FEATURES,
            workers=self.config.workers,
            desc=f"Tokenising {source.path}",
        )

    def _documents(self, source: SourceConfig, policy: Policy) -> Dataset:
        config = self.config
        options: dict[str, Any] = {
            "policy": policy.value,
            "keep_malformed": config.malformed == "keep",
            "cut": config.too_long == "cut",
            "max_length": config.row_length,
            "stages": config.form == "stages",
        }
        return cached_map(
            self._examples(source),
            partial(compile_rows, grammar=self.grammar, **options),
            (sorted(options.items()), digest_of(self.grammar), preparation_code()),
            DOCUMENT_FEATURES,
            batched=True,
            batch_size=BATCH,
            workers=self.config.workers,
            desc=f"Compiling {source.path}",
        )

    def _prepare(self, sources: Sequence[SourceConfig], policy: Policy, *, held_out: bool) -> Prepared:
        documents = self.documents(sources, policy)
        wanted = self._held_out(documents["key"]) == held_out
        lengths = list_lengths(documents, "ids")
        used = np.flatnonzero(wanted & (lengths > 0))
        groups = [used[group].tolist() for group in assign(lengths[used], self.config.row_length, self.seed)]
        rows = PackedRows(documents, groups, self.config.row_length)
        leaked = not held_out and bool(self.config.held_out)
        return Prepared(rows, make_report(rows, lengths, wanted, leaked=leaked), _digest(documents, used))

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


def _digest(documents: Dataset, used: np.ndarray) -> str:
    return hashlib.sha256("".join(columns_of(documents, "digest")["digest"][used]).encode()).hexdigest()


# --- what becomes of a row: functions for `Dataset.map`; the processes that run them share nothing --------------------

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
        "blocks": Value("bool"),
        "truncated": Value("bool"),
        "trace_tokens": Value("int32"),
        "targets_count": Value("int32"),
        "digest": Value("string"),
    }
)
"""A document for each row, or several, its stages, of which the first has what is said of the row as a whole; one that
is left out has no tokens."""


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
            cut or left out), and stages (whether traces are split at their prunes).
    """
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    out: dict[str, list[Any]] = {name: [] for name in DOCUMENT_FEATURES}
    for row in rows:
        for entry in _entries(row, **options):
            for name, value in entry.items():
                out[name].append(value)
    return out


def _entries(
    row: Mapping[str, Any], *, keep_malformed: bool, cut: bool, stages: bool, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yields what `DOCUMENT_FEATURES` has for one row of the source."""
    example = Example(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["answer"])
    documents, reasons = list[Document](), row["faults"]
    if row["unusable"] is not None:
        reasons = [row["unusable"]]
    elif keep_malformed or not reasons:
        with suppress(TooLong):
            documents = split_stages(example, **options) if stages else [compile_document(example, **options)]
        learned = sum(document.learned for document in documents)
        if not learned or (learned < len(example.completion_ids) and not cut):
            documents, reasons = [], [*reasons, "too_long"]
    learned = sum(document.learned for document in documents)
    for number, document in enumerate(documents or [Document()]):
        first = number == 0
        yield {
            **{name: row[name] for name in PLACE},
            **{name: getattr(document, name) for name in COLUMNS},
            "reasons": reasons if first else [],
            "first": first,
            "blocks": options["grammar"].markers.open in example.completion_ids,
            "truncated": first and 0 < learned < len(example.completion_ids),
            "trace_tokens": len(example.prompt_ids) + learned if first and learned else 0,
            "targets_count": document.learned,
            "digest": _document_digest(document),
        }


def _document_digest(document: Document) -> str:
    content = b"".join(array("i", getattr(document, name)).tobytes() for name in COLUMNS)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def preparation_code() -> str:
    """Returns a digest of the code that decides what a row becomes."""
    modules = (column_rules, grammar_rules, markup_rules, tokens, trace_rules, document_rules, text_rules)
    return files_digest((__file__, *(str(module.__file__) for module in modules)))
