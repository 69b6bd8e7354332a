"""The steps `segment` and `check`, and what all steps share: how rows pass through, and what is counted.

An entry of a journal is ``{"row": record}`` or ``{"reject": rejection}``; see `prepare.folder`.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from pydantic import Field

from hcot_lmeval.markup import get_markup
from hcot_lmeval.prepare.checks import Checker, CheckOptions, Fault, check_and_repair, fingerprint
from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.measure import CountOptions, make_counter
from hcot_lmeval.prepare.near import NearRows, signature
from hcot_lmeval.prepare.outline import assemble
from hcot_lmeval.prepare.reasons import REASONS, Refused
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow, Unreadable
from hcot_lmeval.prepare.segmenter import SegmenterOptions, count_tokens, segment
from hcot_lmeval.prepare.sentences import split_sentences
from hcot_lmeval.prepare.teacher.questions import Spent
from hcot_lmeval.settings import Section

Item = TypeVar("Item")
Result = TypeVar("Result")
Numbered = tuple[int, Any]
"""A row with its number in the input."""
CHUNK = 8
"""Items that a process is given at once."""
AHEAD = 3
"""Chunks for each process that are in work or waiting."""


class WorkOptions(Section, title="work"):
    """How a step is run; nothing of it changes the rows."""

    workers: int = Field(1, ge=1, description="processes side by side")
    restart: bool = Field(False, description="throw away what an earlier run left of this step")
    quiet: bool = Field(False, description="show no progress")


# --- entries ----------------------------------------------------------------------------------------------------------


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


def refused(row: SourceRow | PreparedRow, code: str, detail: str) -> dict[str, Any]:
    """Returns the entry of a row that is rejected."""
    return {"reject": rejection(row.record(), [Fault(code, detail)])}


def rejection(record: Mapping[str, Any], faults: Sequence[Fault]) -> dict[str, Any]:
    """Returns what is kept of a rejected row; the first fault is its reason."""
    listed = [{"code": fault.code, "detail": fault.detail} for fault in faults]
    return {"id": record["id"], "reason": faults[0].code, "detail": faults[0].detail, "faults": listed, "row": record}


class Outcome:
    """What becomes of the entries of a step, which are given in the order of the rows; here each decides by itself.

    Attributes:
        count: rows by what became of them.
        reasons: rejected rows by reason.
        remarks: what was reported without rejecting a row.
        spent: what a teacher took for all rows; None where none was asked.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.spent: Spent | None = None

    def __call__(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Returns whether a row passes, and the record to write."""
        if "spent" in entry:
            self.spent = (self.spent or Spent()).plus(Spent(**entry["spent"]))
        passes, record = self.decide(entry)
        self.count["passed" if passes else "rejected"] += 1
        if not passes:
            self.reasons[record["reason"]] += 1
        return passes, record

    def decide(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Returns the same, without counting the row."""
        if "remark" in entry:
            self.remarks[entry["remark"]] += 1
        return ("row" in entry), entry["row" if "row" in entry else "reject"]

    def summary(self) -> dict[str, Any]:
        """Returns the counts, the most frequent reasons first."""
        return {
            "rows": self.count.total(),
            "passed": self.count["passed"],
            "rejected": self.count["rejected"],
            "reasons": {code: {"rows": rows, "meaning": REASONS[code]} for code, rows in self.reasons.most_common()},
            "remarks": dict(self.remarks.most_common()),
            **({} if self.spent is None else {"teacher": self.spent._asdict()}),
        }


# --- how rows pass through --------------------------------------------------------------------------------------------


def run_rows(
    folder: StepFolder,
    rows: Iterable[Any],
    count: Callable[[], int | None],
    make: Callable[[], Callable[[Any], dict[str, Any]]],
    work: WorkOptions,
    outcome: Outcome,
) -> None:
    """Works on all rows that are not done, and writes them out.

    Args:
        folder: of the step, open.
        rows: all of them, read as they are needed.
        count: tells how many there are, as far as that is known.
        make: makes the function that turns a row into an entry of the journal.
        work: how.
        outcome: what becomes of an entry.
    """
    with folder.journal() as journal, progress(folder.step, count(), len(journal.done), work.quiet) as bar:
        for (number, _), entry in in_order(numbered(rows, journal.done), partial(_of_row, make), work.workers):
            journal.add(number, entry)
            bar.update()
    folder.finish(outcome, outcome.summary)


def _of_row(make: Callable[[], Callable[[Any], dict[str, Any]]]) -> Callable[[Numbered], dict[str, Any]]:
    """Makes the function that works on a row with its number; one that could not be read needs no work."""
    work = make()
    return lambda item: unread(item[1]) if isinstance(item[1], Unreadable) else work(item[1])


def numbered(rows: Iterable[Any], done: Collection[int]) -> Iterator[Numbered]:
    """Yields the rows that are not done, each with its number."""
    return ((number, row) for number, row in enumerate(rows) if number not in done)


def progress(title: str, total: int | None, done: int, quiet: bool = False) -> Any:
    """Returns a bar with the time left on a terminal; elsewhere nothing is shown."""
    from tqdm import tqdm

    hidden = True if quiet else None  # None: where there is no terminal
    return tqdm(total=total, initial=done, desc=title, unit=" rows", disable=hidden, file=sys.stderr)


def in_order(
    items: Iterable[Item], make: Callable[[], Callable[[Item], Result]], workers: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Yields every item with its result, in the order of the items.

    Args:
        items: read no further ahead than the processes need.
        make: makes the function that works on an item; called once in each process, so that what it holds is loaded
            there. With several processes it is pickled, and so are items and results.
        workers: processes; 1 is this one.
    """
    if workers <= 1:
        work = make()
        yield from ((item, work(item)) for item in items)
        return
    items, waiting = iter(items), deque[tuple[list[Item], Future[list[Result]]]]()
    context = multiprocessing.get_context("spawn")  # safe beside threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,))
    try:
        while True:
            while len(waiting) < AHEAD * workers and (chunk := list(islice(items, CHUNK))):
                waiting.append((chunk, pool.submit(_work_on, chunk)))
            if not waiting:
                return
            done, future = waiting.popleft()
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process has died, perhaps for want of memory; start the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_make: Callable[[], Callable[[Any], Any]] | None = None
_work: Callable[[Any], Any] | None = None


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    global _make
    _make = make  # called with the first chunk: an error there reaches the parent, one here would not


def _work_on(chunk: list[Any]) -> list[Any]:
    global _work
    assert _make is not None, "a process works before it has started"
    _work = _work or _make()
    return [_work(item) for item in chunk]


# --- segment ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MakeSegment:
    """Makes the function that segments a row without a teacher."""

    options: SegmenterOptions
    form: CountOptions

    def __call__(self) -> Callable[[SourceRow], dict[str, Any]]:
        """Returns the function; loads what it needs."""
        form, count = self.form, make_counter(self.form.tokenizer)
        measure = count_tokens if form.tokenizer is None else lambda text: count([text])[0]
        find = partial(segment, options=self.options, measure=measure)
        made_by = {"method": "segmenter", **form.model_dump(), "options": self.options.model_dump()}
        return partial(self._entry, find, made_by)

    def _entry(self, find: Callable[..., Any], made_by: Mapping[str, Any], row: SourceRow) -> dict[str, Any]:
        try:
            pieces = tuple(split_sentences(row.reasoning))
            outline = find(pieces)
            trace = assemble(pieces, outline, get_markup(self.form.markup))
        except Refused as error:
            return refused(row, error.code, error.detail)
        return {"row": PreparedRow(row, trace, outline, pieces, made_by).record()}


class SegmentOutcome(Outcome):
    """Counts the blocks too, for rows without any are rows that `check` rejects."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Counter[str] = Counter()

    def decide(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        if outline := entry.get("row", {}).get("outline"):
            found = len(outline["blocks"])
            self.blocks.update({"blocks": found, "without": int(not found)})
        return super().decide(entry)

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"blocks": self.blocks["blocks"], "rows_without_blocks": self.blocks["without"]}


# --- check ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MakeCheck:
    """Makes the function that checks and repairs a row; `problems` are those that `options.against` names."""

    options: CheckOptions
    problems: Sequence[tuple[str, str]]

    def __call__(self) -> Callable[[PreparedRow], dict[str, Any]]:
        """Returns the function."""
        check = Checker(self.options, self.problems)
        return lambda row: checked_entry(check, *check_and_repair(row, check))


def checked_entry(check: Checker, row: PreparedRow, faults: Sequence[Fault], repairs: Sequence[str]) -> dict[str, Any]:
    """Returns the entry of a row that was checked, with that by which duplicates are found later."""
    options = check.options
    entry: dict[str, Any] = {"row": row.record(), "faults": [fault[:2] for fault in faults], "repairs": list(repairs)}
    if options.duplicates != "off":
        text = row.source.question
        if options.duplicates == "trace":
            text = f"{text}\n{row.source.text if row.source.reasoning else row.text}"
        entry["print"] = fingerprint(text)
        if options.near < 1:
            entry["signature"] = signature(text)
    return entry


class CheckOutcome(Outcome):
    """Decides by the faults of a row and whether an earlier one had the same words, or nearly.

    Only rows that pass are remembered: a copy of a rejected row is no duplicate of anything that is left.
    """

    def __init__(self, options: CheckOptions, near: NearRows) -> None:
        super().__init__()
        self._options, self._near = options, near
        self._ids: set[str] = set()
        self._names: dict[str, str] = {}  # fingerprint -> the first row that has it
        self.repaired: Counter[str] = Counter()

    def decide(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        if "reject" in entry:
            return super().decide(entry)
        record, faults = entry["row"], [Fault(*fault) for fault in entry["faults"]]
        name = str(record["id"])
        if name in self._ids:
            faults.append(Fault("repeated_id", f"{name!r} names an earlier row too"))
        self._ids.add(name)
        if not self._grave(faults):
            faults += self._duplicate(name, entry.get("print"), entry.get("signature"))
        grave = self._grave(faults)
        remarks = [fault for fault in faults if fault not in grave]
        self.remarks.update(fault.code for fault in remarks)
        self.repaired.update({"rows": 1, "repairs": len(entry["repairs"])} if entry["repairs"] else {})
        if grave:
            return False, rejection(record, [*grave, *remarks])
        listed = [{"code": fault.code, "detail": fault.detail} for fault in remarks]
        return True, {**record, "remarks": listed} if listed else record

    def _duplicate(self, name: str, words: str | None, signature: str | None) -> Iterator[Fault]:
        if words in self._names:
            yield Fault("duplicate", f"all of {self._names[words]}")
            return
        if words is not None:
            self._names[words] = name
        if signature is not None and (near := self._near.find_or_add(name, signature)):
            yield Fault("near_duplicate", f"{near[1]:.0%} of {near[0]}")

    def _grave(self, faults: Sequence[Fault]) -> list[Fault]:
        return [fault for fault in faults if fault.code not in self._options.tolerated]

    def summary(self) -> dict[str, Any]:
        against = self._options.against
        return super().summary() | {
            "repaired": {"rows": self.repaired["rows"], "repairs": self.repaired["repairs"]},
            "contamination": f"looked for {', '.join(against)}" if against else "not looked for",
        }
