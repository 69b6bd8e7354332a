"""What the commands of ``hcot prepare`` do with their arguments; see `prepare.cli`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hcot_lmeval.files import Input, InputOptions, LimitOptions, count_records, find_inputs
from hcot_lmeval.markup import get_markup
from hcot_lmeval.prepare.checks import Checker, CheckOptions, identities, load_problems
from hcot_lmeval.prepare.export import ExportOptions, export, push
from hcot_lmeval.prepare.folder import StepFolder, is_run, manifests, rows_of
from hcot_lmeval.prepare.measure import CountOptions
from hcot_lmeval.prepare.near import NearRows
from hcot_lmeval.prepare.reading import check_roles, read_prepared, read_rows
from hcot_lmeval.prepare.reasons import REASONS
from hcot_lmeval.prepare.segmenter import SegmenterOptions
from hcot_lmeval.prepare.steps import (
    CheckOutcome,
    MakeCheck,
    MakeSegment,
    Outcome,
    SegmentOutcome,
    WorkOptions,
    progress,
    run_rows,
)
from hcot_lmeval.prepare.teacher.judge import Judge
from hcot_lmeval.prepare.teacher.options import TeacherOptions
from hcot_lmeval.prepare.teacher.protocols import (
    Asking,
    AskingOptions,
    AskingProtocol,
    Refine,
    RefineOptions,
    Segment,
    load_prompt,
)
from hcot_lmeval.prepare.teacher.runner import estimated, run_asking
from hcot_lmeval.settings import Section, parse_settings

Options = TypeVar("Options", bound=Section)
TEACHER = (TeacherOptions, AskingOptions)
SECTIONS: dict[str, tuple[type[Section], ...]] = {
    "segment": (InputOptions, CountOptions, SegmenterOptions, *TEACHER, WorkOptions),
    "refine": (LimitOptions, RefineOptions, *TEACHER, WorkOptions),
    "check": (LimitOptions, CheckOptions, *TEACHER, WorkOptions),
    "stats": (CountOptions, WorkOptions),
    "export": (ExportOptions, WorkOptions),
}
"""Command -> its options."""


class Given:
    """What was given to a command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.command, self.sources, self.values = args.command, args.sources, vars(args)

    def read(self, kind: type[Options]) -> Options:
        """Returns the options of a kind.

        Raises:
            ValueError: a value is not allowed.
        """
        found = {key: self.values[key] for key in kind.model_fields if key in self.values}
        return parse_settings(kind, found, f"the options of {self.command}")

    def refuse(self, *kinds: type[Section], why: str) -> None:
        """Raises an error where an option of these kinds is given, which means nothing here."""
        for kind in kinds:
            for name in kind.model_fields:
                if self.values.get(name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} {why}")

    @property
    def out(self) -> Path:
        """The folder of the run: the one that is named, or the one that is read.

        Raises:
            ValueError: neither is there.
        """
        if self.values.get("out") is not None:
            return Path(self.values["out"])
        runs = [Path(source) for source in self.sources if Path(source).is_dir() and is_run(Path(source))]
        if len(runs) != 1:
            raise ValueError(f"{' '.join(self.sources)} is not the folder of one run; name a folder with --out RUN")
        return runs[0]

    def inputs(self, before: str | None = None) -> list[Input]:
        """Returns the files that are read; of the folder of a run, the rows of its last step before `before`."""
        return find_inputs([rows_of(source, before) for source in self.sources])

    def folder(self, arguments: dict[str, Any], inputs: Sequence[Input]) -> StepFolder:
        """Returns the folder of the step; `arguments` are all that its rows depend on."""
        return StepFolder(self.out, self.command, arguments, [each.identity() for each in inputs])


def run(args: argparse.Namespace) -> int:
    """Runs the command of the command line; returns the exit status."""
    return COMMANDS[args.command](Given(args))


def run_segment(given: Given) -> int:
    """Segments flat traces; returns the exit status."""
    read, work, teacher = given.read(InputOptions), given.read(WorkOptions), given.read(TeacherOptions)
    blocks, form, columns = given.read(SegmenterOptions), given.read(CountOptions), _columns(given.values["column"])
    inputs = find_inputs(given.sources, read)
    rows, count = read_rows(inputs, columns, read.limit), partial(count_records, inputs, read.limit)
    shared = {"columns": columns, "limit": read.limit}
    if teacher.teacher is None:
        given.refuse(*TEACHER, why=WITHOUT_TEACHER)
        make = MakeSegment(blocks, form)
        made_by = {"method": "segmenter", "options": blocks.model_dump(), "form": form.model_dump()}
        folder = given.folder({**shared, **made_by}, inputs)
        if not folder.open(restart=work.restart):
            run_rows(folder, rows, count, make, work, SegmentOutcome())
        return _report(folder)
    if form.tokenizer is not None:
        raise ValueError("--tokenizer is for segmenting without a teacher; leave it out, or leave --teacher out")
    asking = Asking(load_prompt("segment"), teacher, given.read(AskingOptions))
    protocol = Segment(asking, get_markup(form.markup), blocks)
    folder = given.folder({**shared, **protocol.made_by, "blocks": blocks.model_dump()}, inputs)
    return _ask(folder, rows, count, protocol, teacher, work, SegmentOutcome())


def run_refine(given: Given) -> int:
    """Lets a teacher find dead ends in segmented rows; returns the exit status."""
    read, work, teacher = given.read(LimitOptions), given.read(WorkOptions), given.read(TeacherOptions)
    if teacher.teacher is None:
        raise ValueError("refine needs a teacher; give --teacher PROVIDER:MODEL")
    inputs = given.inputs("refine")
    asking = Asking(load_prompt("refine"), teacher, given.read(AskingOptions))
    protocol = Refine(asking, given.read(RefineOptions))
    folder = given.folder({"limit": read.limit, **protocol.made_by}, inputs)
    rows, count = read_prepared(inputs, read.limit), partial(count_records, inputs, read.limit)
    return _ask(folder, rows, count, protocol, teacher, work, Outcome())


def run_check(given: Given) -> int:
    """Checks prepared rows, and lets a teacher judge those that pass, if there is one; returns the exit status."""
    options, work, teacher = given.read(CheckOptions), given.read(WorkOptions), given.read(TeacherOptions)
    read = given.read(LimitOptions)
    inputs = given.inputs("check")
    rows, count = read_prepared(inputs, read.limit), partial(count_records, inputs, read.limit)
    arguments = {"limit": read.limit, **options.model_dump(), "problems": identities(options.against)}
    with NearRows(options.near) as near:
        outcome = CheckOutcome(options, near)
        if teacher.teacher is not None:
            judge = Judge(Asking(load_prompt("judge"), teacher, given.read(AskingOptions)), Checker(options))
            folder = given.folder({**arguments, "judge": judge.made_by}, inputs)
            return _ask(folder, rows, count, judge, teacher, work, outcome)
        given.refuse(*TEACHER, why=WITHOUT_TEACHER)
        folder = given.folder(arguments, inputs)
        if not folder.open(restart=work.restart):
            make = MakeCheck(options, tuple(load_problems(options.against)))
            run_rows(folder, rows, count, make, work, outcome)
        return _report(folder)


WITHOUT_TEACHER = "belongs to a teacher; give --teacher PROVIDER:MODEL too"
"""What is said of an option that would be ignored; with ``--dry-run`` the run would not be dry."""


def _ask(
    folder: StepFolder,
    rows: Iterable[Any],
    count: Callable[[], int | None],
    protocol: AskingProtocol,
    teacher: TeacherOptions,
    work: WorkOptions,
    outcome: Outcome,
) -> int:
    """Asks a teacher about all rows, or estimates what that would take; returns the exit status."""
    if work.workers > 1:
        raise ValueError("--workers is for steps without a teacher; how many requests are open, says --concurrency")
    if teacher.dry_run:
        print(estimated(folder.out, protocol, rows, teacher))
        return 0
    if folder.open(restart=work.restart):
        return _report(folder)
    open_ = run_asking(folder, rows, count, protocol, teacher, work, outcome)
    if not open_:
        return _report(folder)
    reasons = ", ".join(f"{number} {code} ({REASONS[code]})" for code, number in open_.most_common())
    print(
        f"{open_.total()} rows got no reply: {reasons}. Start the same command again to ask for them, "
        "with other limits if these were reached, or with --give-up to reject them",
        file=sys.stderr,
    )
    return 1


def run_stats(given: Given) -> int:
    """Counts; returns the exit status."""
    from hcot_lmeval.prepare.stats import gather, make_tables, write_stats
    from hcot_lmeval.report import render

    out, options, work = given.out, given.read(CountOptions), given.read(WorkOptions)
    inputs = given.inputs()
    with progress("stats", count_records(inputs), 0, work.quiet) as bar:
        found = gather(read_prepared(inputs), options, work.workers, bar.update)
    if found.rows == found.unreadable:
        why = found.first_fault or "the files hold none"
        raise ValueError(f"{' '.join(given.sources)}: there is no row to count: {why}")
    print("\n\n".join(render.terminal(table) for table in make_tables(found)))
    written = write_stats(found, out / "stats")
    print(f"\nwritten to {out / 'stats'}: {', '.join(sorted(path.name for path in written))}")
    return 0


def run_export(given: Given) -> int:
    """Exports prepared rows; returns the exit status."""
    out, options, work = given.out, given.read(ExportOptions), given.read(WorkOptions)
    path = given.values.get("to") or out / "export" / f"train.{options.format or 'jsonl'}"
    inputs, history = given.inputs(), manifests(out)
    with progress("export", count_records(inputs), 0, work.quiet) as bar:
        count, unread = export(read_prepared(inputs), path, options, bar.update, inputs, history)
    print(f"{path}: {count} rows ({', '.join(options.columns)})")
    if unread:
        print(f"{len(unread)} rows could not be read; the first: {unread[0].where}: {unread[0].code}", file=sys.stderr)
    if options.push:
        print(push(path, count, options, history))
    return 0


# --- what they share --------------------------------------------------------------------------------------------------


def _columns(words: Sequence[str]) -> dict[str, str]:
    without = [word for word in words if "=" not in word]
    if without:
        raise ValueError(f"--column {without[0]}: expected ROLE=NAME, as in question=problem")
    return dict(check_roles({role: name for role, _, name in (word.partition("=") for word in words)}))


def _report(folder: StepFolder) -> int:
    """Prints what became of the rows; the exit status is 1 where none is left."""
    summary = folder.summary
    print(f"{folder.step}: {summary['passed']} of {summary['rows']} rows passed, {summary['rejected']} rejected")
    for code, found in summary["reasons"].items():
        print(f"  {found['rows']:>7}  {code}: {found['meaning']}")
    if without := summary.get("rows_without_blocks"):
        print(f"  {without:>7}  passed without a block, which `check` rejects; shorter blocks: --min-tokens N")
    if spent := summary.get("teacher"):
        money = "at an unknown price" if spent["usd"] is None else f"${spent['usd']:.4f}"
        tokens = f"{spent['input_tokens']:,} input and {spent['output_tokens']:,} output tokens"
        print(f"  the teacher: {spent['requests']} requests, {tokens}, {money}")
    if summary.get("repaired", {}).get("rows"):
        print(f"  {summary['repaired']['rows']} rows were repaired ({summary['repaired']['repairs']} repairs)")
    for code, rows in summary.get("remarks", {}).items():
        print(f"  {rows:>7}  {code}: reported, not rejected")
    if "contamination" in summary:
        print(f"  problems of evaluation tasks: {summary['contamination']}")
    print(f"written to {folder.path}")
    return 0 if summary["passed"] else 1


COMMANDS: dict[str, Callable[[Given], int]] = {
    "segment": run_segment,
    "refine": run_refine,
    "check": run_check,
    "stats": run_stats,
    "export": run_export,
}
