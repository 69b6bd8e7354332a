"""What became of the rows of a data set: how many are trained on, at what cost, and why others are not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset

from hcot_lmeval.training.data.rows import PackedRows, columns_of, largest, list_lengths


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
        documents: compiled documents; as many as rows that are trained on, or more of them under ``form=stages``.
        trace_tokens: of the traces trained on, as far as they are, prompts included.
        forwarded_tokens: of the documents; more than those of the traces, since solutions are read again.
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
    documents: int = 0
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
    def reasons(self) -> Counter[str]:
        """How many left-out rows have each reason; a row may have several."""
        return _count(self.rejected)

    @property
    def used(self) -> int:
        """The rows that are trained on."""
        return self.rows - self.elsewhere - len(self.rejected)

    def write(self, path: Path) -> None:
        """Writes the findings as JSONL: source, row, reasons, and whether the row is kept."""
        lines = (json.dumps(asdict(finding)) + "\n" for finding in self.findings)
        path.write_text("".join(lines), encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"{self.used:,} of {self.rows:,} rows ({self.truncated:,} cut, {self.without_answer:,} without an answer), "
            f"{self.documents:,} documents, the longest {self.longest:,} tokens",
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
    """Sums up what `preparation` says of each document.

    Args:
        rows: with documents as in `preparation.DOCUMENT_FEATURES`.
        lengths: forwarded tokens of each document, 0 for rows that are left out, int [documents].
        wanted: whether a document is on this side of the held-out split, bool [documents].
        leaked: whether the others ask what a held-out source asks, which is worth a finding each.
    """
    documents = rows.documents
    columns = columns_of(documents, "first", "blocks", "truncated", "trace_tokens", "targets_count", "answer", "source")
    used = wanted & (lengths > 0)
    first = columns["first"]
    unanswered = np.array([answer is None for answer in columns["answer"]], dtype=bool)
    return Report(
        rows=int(first.sum()),
        elsewhere=0 if leaked else int((first & ~wanted).sum()),
        without_answer=int((first & used & unanswered).sum()),
        without_block=Counter(columns["source"][first & used & ~columns["blocks"]].tolist()),
        truncated=int((columns["truncated"] & used).sum()),
        documents=int(used.sum()),
        trace_tokens=int(columns["trace_tokens"][used].sum()),
        forwarded_tokens=int(lengths[used].sum()),
        targets=int(columns["targets_count"][used].sum()),
        longest=int(lengths[used].max(initial=0)),
        positions=largest(documents, "positions") + 1,
        packed_rows=len(rows),
        padding=rows.padding,
        findings=list(_findings(documents, lengths, wanted, leaked)),
    )


def _findings(documents: Dataset, lengths: np.ndarray, wanted: np.ndarray, leaked: bool) -> Iterator[Finding]:
    telling = list_lengths(documents, "reasons") > 0
    if leaked:
        telling |= ~wanted & columns_of(documents, "first")["first"]
    for index in np.flatnonzero(telling & (wanted | leaked)).tolist():
        entry = documents[index]
        reasons = (*entry["reasons"], *(() if wanted[index] else ("in_held_out",)))
        yield Finding(entry["source"], entry["row"], reasons, kept=bool(wanted[index] and lengths[index]))


def _count(findings: Iterable[Finding]) -> Counter[str]:
    return Counter(reason for finding in findings for reason in finding.reasons)
