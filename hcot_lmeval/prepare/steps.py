"""What all steps share: how rows pass through, what is written down of each, and what is counted.

An entry of a journal is ``{"row": record}`` or ``{"reject": rejection}``; see `prepare.folder`.

This module imports the standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcot_lmeval.prepare.checks import Fault
from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.inputs import Input, count_records
from hcot_lmeval.prepare.reasons import meaning
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow, Unreadable
from hcot_lmeval.prepare.workers import in_order

Numbered = tuple[int, Any]
"""A row with its number in the input."""


@dataclass(frozen=True)
class Work:
    """How a step is run; nothing of it changes the rows.

    Attributes:
        workers: processes.
        restart: throw away what an earlier run left.
        quiet: show no progress.
    """

    workers: int = field(default=1, metadata={"help": "processes side by side"})
    restart: bool = field(default=False, metadata={"help": "throw away what an earlier run left of this step"})
    quiet: bool = field(default=False, metadata={"help": "show no progress"})

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers}: give at least 1")


def unread(row: Unreadable) -> dict[str, Any]:
    """Returns the entry of a row that could not be read; values that JSON does not have (dates, bytes) as texts."""
    try:
        record = json.loads(json.dumps(dict(row.record), default=str))
    except (TypeError, ValueError, RecursionError):
        record = {"columns": [str(name) for name in row.record]}
    return {
        "reject": {
            "id": record.get("id"),
            "reason": row.code,
            "detail": f"{row.where}: {row.detail}",
            "faults": [{"code": row.code, "detail": row.detail}],
            "row": record,
        }
    }


def refused(row: SourceRow | PreparedRow, faults: Sequence[Fault]) -> dict[str, Any]:
    """Returns the entry of a row that is rejected; the first fault is its reason."""
    record = (
        row.record()
        if isinstance(row, PreparedRow)
        else {"id": row.id, "question": row.question, "expected_answer": row.answer, "generated_solution": row.text}
        | {"meta": dict(row.meta)}
    )
    return {"reject": rejection(record, faults)}


def rejection(record: Mapping[str, Any], faults: Sequence[Fault]) -> dict[str, Any]:
    """Returns what is kept of a rejected row."""
    told = [{"code": fault.code, "detail": fault.detail} for fault in faults]
    return {"id": record["id"], "reason": faults[0].code, "detail": faults[0].detail, "faults": told, "row": record}


SPENT = ("requests", "input_tokens", "output_tokens", "usd", "seconds")
"""What a teacher took for a row, added up."""


class Plain:
    """Decides by the entry alone; counts.

    Attributes:
        count: rows by what became of them.
        reasons: rejected rows by reason.
        remarks: what was reported without rejecting a row.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self._spent: dict[str, float | None] | None = None

    def __call__(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Returns whether a row passes, and the record to write."""
        self._pay(entry.get("spent"))
        return self._decide(entry)

    def _decide(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        passes = "row" in entry
        if "remark" in entry:
            self.remarks[entry["remark"]] += 1
        self._counted(passes, "" if passes else entry["reject"]["reason"])
        return passes, entry["row"] if passes else entry["reject"]

    def _pay(self, spent: Mapping[str, float | None] | None) -> None:
        """Adds up; a sum with an unknown part is unknown."""
        if spent is not None:
            before = self._spent or dict.fromkeys(SPENT, 0)
            self._spent = {key: _plus(before[key], spent[key]) for key in SPENT}

    def _counted(self, passes: bool, reason: str) -> None:
        self.count["passed" if passes else "rejected"] += 1
        if not passes:
            self.reasons[reason] += 1

    def summary(self) -> dict[str, Any]:
        """Returns the counts, the most frequent reasons first."""
        return {
            "rows": sum(self.count.values()),
            "passed": self.count["passed"],
            "rejected": self.count["rejected"],
            "reasons": {code: {"rows": rows, "meaning": meaning(code)} for code, rows in self.reasons.most_common()},
            "remarks": dict(self.remarks.most_common()),
            **({} if self._spent is None else {"teacher": self._spent}),
        }


def _plus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def run_rows(
    folder: StepFolder,
    inputs: Sequence[Input],
    limit: int | None,
    read: Callable[[], Iterable[Any]],
    make: Callable[[], Callable[[Numbered], dict[str, Any]]],
    work: Work,
    decide: Plain,
) -> StepFolder:
    """Works on all rows that are not done, and writes the rows out.

    Args:
        folder: of the step, open.
        inputs: what is read, for the number of rows.
        limit: so many are read at most.
        read: yields all rows.
        make: makes the function that turns a row with its number into an entry of the journal.
        work: how.
        decide: what becomes of an entry.
    """
    with folder.journal() as journal:
        total = count_records(inputs, limit)
        with Progress(folder.step, total, len(journal.done), work.quiet) as tick:
            for (number, _), entry in in_order(numbered(read(), journal.done), make, work.workers):
                journal.add(number, entry)
                tick()
    folder.finish(decide, decide.summary)
    return folder


class Progress:
    """A bar with the time left on a terminal; elsewhere nothing."""

    def __init__(self, title: str, total: int | None, done: int, quiet: bool = False) -> None:
        from tqdm import tqdm

        hidden = True if quiet else None  # None: where there is no terminal
        self._bar = tqdm(total=total, initial=done, desc=title, unit=" rows", disable=hidden, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __call__(self) -> None:
        """Counts a row."""
        self._bar.update()

    def says(self, words: str) -> None:
        """Shows some words behind the bar."""
        self._bar.set_postfix_str(words, refresh=False)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def numbered(rows: Iterable[Any], done: set[int]) -> Iterator[Numbered]:
    """Yields the rows that are not done, each with its number."""
    return ((number, row) for number, row in enumerate(rows) if number not in done)
