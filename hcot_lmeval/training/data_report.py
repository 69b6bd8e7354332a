"""What became of the rows of a data set: how many are trained on, at what cost, and why others are not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """Something about one row.

    Attributes:
        source: the path of its source, as configured.
        row: its number there, from 0.
        reasons: kinds of malformed tokens, ``too_long``, ``no_trace``, ``no_question``, ``no_chat_template``,
            ``in_held_out`` (its question is a held-out one).
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
        held_out: of those, left out as the held-out share.
        without_answer: of those trained on, without an expected answer.
        truncated: of those trained on, cut to fit.
        documents: compiled documents; as many as rows that are trained on, or more of them under ``form=stages``.
        trace_tokens: of the traces trained on, as far as they are, prompts included.
        forwarded_tokens: of the documents; more than those of the traces, since solutions are read again.
        targets: tokens that there is a loss on.
        longest: forwarded tokens of the longest document.
        packed_rows: rows that the documents are packed into.
        padding: the share of padding in them.
        findings: what is wrong with single rows.
    """

    rows: int = 0
    held_out: int = 0
    without_answer: int = 0
    truncated: int = 0
    documents: int = 0
    trace_tokens: int = 0
    forwarded_tokens: int = 0
    targets: int = 0
    longest: int = 0
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

    def write(self, path: Path) -> None:
        """Writes the findings as JSONL: source, row, reasons, and whether the row is kept."""
        lines = (json.dumps(asdict(finding)) + "\n" for finding in self.findings)
        path.write_text("".join(lines), encoding="utf-8")

    def __str__(self) -> str:
        used = self.rows - self.held_out - len(self.rejected)
        lines = [
            f"{used:,} of {self.rows:,} rows ({self.truncated:,} cut, {self.without_answer:,} without an answer), "
            f"{self.documents:,} documents, the longest {self.longest:,} tokens",
            f"{self.trace_tokens:,} tokens of traces, {self.forwarded_tokens:,} forwarded, {self.targets:,} targets",
            f"{self.packed_rows:,} packed rows, {self.padding:.1%} padding",
        ]
        if self.held_out:
            lines.append(f"held out: {self.held_out:,} rows")
        for verb, findings in (("left out", self.rejected), ("kept", [f for f in self.findings if f.kept])):
            if findings:
                reasons = ", ".join(f"{reason} {count:,}" for reason, count in _count(findings).most_common())
                lines.append(f"{verb}: {len(findings):,} rows ({reasons})")
        return "\n".join(lines)


def _count(findings: Iterable[Finding]) -> Counter[str]:
    return Counter(reason for finding in findings for reason in finding.reasons)
