"""The steps that write rows: each reads rows, works on them one at a time, and leaves a folder.

This module imports the standard library alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from hcot_lmeval.markup import PRESETS, Markup, get_markup
from hcot_lmeval.prepare.checks import REASONS, Checker, CheckOptions, Fault
from hcot_lmeval.prepare.contamination import load_problems
from hcot_lmeval.prepare.duplicates import Fingerprint, Twins, fingerprint
from hcot_lmeval.prepare.folder import StepFolder
from hcot_lmeval.prepare.inputs import Input, count_records
from hcot_lmeval.prepare.measure import make_counter
from hcot_lmeval.prepare.outline import OutlineError, assemble
from hcot_lmeval.prepare.repair import check_and_repair
from hcot_lmeval.prepare.rows import PreparedRow, SourceRow, Unreadable, read_prepared, read_rows
from hcot_lmeval.prepare.segmenter import SegmenterOptions, count_tokens, segment
from hcot_lmeval.prepare.sentences import split_sentences
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


# --- segment, without a teacher ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormOptions:
    """In which notation traces are written, and by what their lengths are measured."""

    markup: str = field(default="hcot", metadata={"help": "notation of the blocks", "choices": tuple(PRESETS)})
    tokenizer: str | None = field(
        default=None, metadata={"help": "count the tokens of this tokenizer (words, digits, pairs of signs)"}
    )
    surprise: str | None = field(
        default=None, metadata={"help": "local language model: where it is surprised, a block tends to begin"}
    )


@dataclass(frozen=True)
class Segmenting:
    """Makes the function that segments a row without a teacher.

    Attributes:
        options: of the segmenter.
        form: notation, tokenizer, model.
    """

    options: SegmenterOptions
    form: FormOptions

    def __call__(self) -> Callable[[Numbered], dict[str, Any]]:
        """Returns the function; loads what it needs."""
        form, surprise = self.form, None
        if form.surprise is not None:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            from hcot_lmeval.prepare.surprise import model_surprise

            model = AutoModelForCausalLM.from_pretrained(form.surprise)
            surprise = model_surprise(model.eval(), AutoTokenizer.from_pretrained(form.surprise))
        count = make_counter(form.tokenizer)
        measure = count_tokens if form.tokenizer is None else lambda text: count([text])[0]
        find = partial(segment, options=self.options, measure=measure, surprise=surprise)
        made_by = {"method": "segmenter", **asdict(form), "options": asdict(self.options)}
        return partial(_segmented, find=find, markup=get_markup(form.markup), made_by=made_by)


def _segmented(item: Numbered, find: Callable[..., Any], markup: Markup, made_by: Mapping[str, Any]) -> dict[str, Any]:
    row = item[1]
    if isinstance(row, Unreadable):
        return unread(row)
    try:
        pieces = tuple(split_sentences(row.reasoning))
        outline = find(pieces)
        trace = assemble(pieces, outline, markup)
    except OutlineError as error:
        return refused(row, [Fault(error.code, error.detail)])
    return {"row": PreparedRow(row, trace, outline, pieces, made_by).record()}


def unread(row: Unreadable) -> dict[str, Any]:
    """Returns the entry of a row that could not be read."""
    return {
        "reject": {
            "id": row.record.get("id"),
            "reason": row.code,
            "detail": f"{row.where}: {row.detail}",
            "faults": [{"code": row.code, "detail": row.detail}],
            "row": dict(row.record),
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


def run_segment(
    folder: StepFolder,
    inputs: Sequence[Input],
    columns: Mapping[str, str],
    limit: int | None,
    make: Segmenting,
    work: Work,
) -> StepFolder:
    """Segments all rows without a teacher; goes on where an earlier run stopped."""
    return _run(folder, inputs, limit, lambda: read_rows(inputs, columns, limit), make, work, Plain())


# --- check ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checking:
    """Makes the rows of `check`: checked, repaired, with a fingerprint by which duplicates are found later.

    Attributes:
        options: what is allowed.
        problems: of the evaluation tasks.
    """

    options: CheckOptions
    problems: tuple[tuple[str, str], ...] = ()

    def __call__(self) -> Callable[[Numbered], dict[str, Any]]:
        return partial(_checked, check=Checker(self.options, self.problems))


def _checked(item: Numbered, check: Checker) -> dict[str, Any]:
    row = item[1]
    if isinstance(row, Unreadable):
        return unread(row)
    row, faults, repairs = check_and_repair(row, check)
    options = check.options
    entry: dict[str, Any] = {"row": row.record(), "faults": [fault[:2] for fault in faults], "repairs": repairs}
    if options.duplicates != "off":
        text = row.source.question
        if options.duplicates == "trace":
            text = f"{text}\n{row.source.text if row.source.reasoning else row.text}"
        entry["print"] = fingerprint(text, near=options.near < 1).to_json()
    return entry


def run_check(
    folder: StepFolder, inputs: Sequence[Input], limit: int | None, options: CheckOptions, work: Work
) -> StepFolder:
    """Checks all rows; goes on where an earlier run stopped."""
    make = Checking(options, tuple(load_problems(options.against)))
    with Twins(options.near) as twins:
        return _run(folder, inputs, limit, lambda: read_prepared(inputs, limit), make, work, Sifting(options, twins))


class Plain:
    """Decides by the entry alone; counts.

    Attributes:
        count: rows by what became of them.
        reasons: rejected rows by reason.
    """

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    def __call__(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        passes = "row" in entry
        self._counted(passes, "" if passes else entry["reject"]["reason"])
        return passes, entry["row"] if passes else entry["reject"]

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
            "reasons": {
                code: {"rows": rows, "meaning": REASONS.get(code, "a fault of the teacher's reply")}
                for code, rows in self.reasons.most_common()
            },
        }


class Sifting(Plain):
    """Decides by the faults of a row and whether an earlier one had the same words.

    Only rows that pass are remembered: a copy of a rejected row is no duplicate of anything that is left.
    """

    def __init__(self, options: CheckOptions, twins: Twins) -> None:
        super().__init__()
        self._options, self._twins = options, twins
        self.remarks: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def __call__(self, entry: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        if "reject" in entry:
            return super().__call__(entry)
        record, faults = entry["row"], [Fault(*fault) for fault in entry["faults"]]
        grave = [fault for fault in faults if fault.code not in self._options.tolerated]
        if not grave and "print" in entry:
            faults += self._twin(str(record["id"]), Fingerprint.from_json(entry["print"]))
            grave = [fault for fault in faults if fault.code not in self._options.tolerated]
        remarks = [fault for fault in faults if fault not in grave]
        self.remarks.update(fault.code for fault in remarks)
        self.repaired.update({"rows": 1, "repairs": len(entry["repairs"])} if entry["repairs"] else {})
        self._counted(not grave, grave[0].code if grave else "")
        if grave:
            return False, rejection(record, [*grave, *remarks])
        told = [{"code": fault.code, "detail": fault.detail} for fault in remarks]
        return True, {**record, "remarks": told} if told else record

    def _twin(self, name: str, print_: Fingerprint) -> list[Fault]:
        twin = self._twins.find_or_add(name, print_)
        if twin is None:
            return []
        code, share = ("duplicate", "all") if twin.exact else ("near_duplicate", f"{100 * twin.similarity:.0f} %")
        return [Fault(code, f"{share} of {twin.name}")]

    def summary(self) -> dict[str, Any]:
        options = self._options
        return super().summary() | {
            "repaired": {"rows": self.repaired["rows"], "repairs": self.repaired["repairs"]},
            "remarks": dict(self.remarks.most_common()),
            "contamination": f"looked for {', '.join(options.against)}" if options.against else "not looked for",
        }


# --- any step ---------------------------------------------------------------------------------------------------------


def _run(
    folder: StepFolder,
    inputs: Sequence[Input],
    limit: int | None,
    read: Callable[[], Iterable[Any]],
    make: Callable[[], Callable[[Numbered], dict[str, Any]]],
    work: Work,
    decide: Plain,
) -> StepFolder:
    if folder.open(restart=work.restart):
        return folder
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

    def __enter__(self) -> Callable[[], Any]:
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def numbered(rows: Iterable[Any], done: set[int]) -> Iterator[Numbered]:
    """Yields the rows that are not done, each with its number."""
    return ((number, row) for number, row in enumerate(rows) if number not in done)
