"""What the commands of ``scripts/prepare_data.py`` do with their arguments; see `prepare.cli`.

This module imports the standard library alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from hcot_lmeval.markup import get_markup
from hcot_lmeval.prepare import checking, lessons, segmenting, teaching
from hcot_lmeval.prepare import stats as statistics
from hcot_lmeval.prepare.checks import Checker, CheckOptions
from hcot_lmeval.prepare.config import Options, from_file, read_options
from hcot_lmeval.prepare.contamination import identities
from hcot_lmeval.prepare.duplicates import Twins
from hcot_lmeval.prepare.export import ExportOptions, format_of, only_rows, push, write_export
from hcot_lmeval.prepare.folder import StepFolder, is_run, manifests, rows_of, write_json
from hcot_lmeval.prepare.inputs import Input, InputOptions, count_records, find_inputs
from hcot_lmeval.prepare.kinds import KINDS
from hcot_lmeval.prepare.protocols.asking import Asking, AskingOptions
from hcot_lmeval.prepare.protocols.judge import Judge
from hcot_lmeval.prepare.protocols.prompts import load_prompt
from hcot_lmeval.prepare.protocols.refine import Refine
from hcot_lmeval.prepare.protocols.rewrite import Rewrite
from hcot_lmeval.prepare.protocols.segment import Segment
from hcot_lmeval.prepare.reading import check_roles, read_prepared, read_rows
from hcot_lmeval.prepare.reasons import meaning
from hcot_lmeval.prepare.rows import Unreadable
from hcot_lmeval.prepare.segmenter import SegmenterOptions
from hcot_lmeval.prepare.steps import Plain, Progress, Work
from hcot_lmeval.prepare.teacher.options import TeacherOptions


def run(args: argparse.Namespace) -> int:
    """Runs the command of the command line; returns the exit status."""
    return COMMANDS[args.command](args)


def run_segment(args: argparse.Namespace) -> int:
    """Segments flat traces; returns the exit status."""
    given, columns = _given(args), check_roles(_pairs(args.column))
    read, work, teacher = _read(InputOptions, given), _read(Work, given), _read(TeacherOptions, given)
    blocks, form = _read(SegmenterOptions, given), _read(segmenting.FormOptions, given)
    inputs = find_inputs(args.sources, read)
    shared = {"columns": columns, "limit": read.limit}
    if teacher.teacher is None:
        _refuse_without_teacher(given)
        make = segmenting.Segmenting(blocks, form)
        folder = _folder(args, {"method": "segmenter", **shared, **asdict(make)}, inputs)
        return _report(segmenting.run_segment(folder, inputs, columns, read.limit, make, work))
    _refuse_of_segmenter(given)
    protocol = _segmenting(given, teacher, blocks, form.markup)
    lesson = lessons.SegmentLesson(protocol, get_markup(form.markup))
    folder = _folder(args, {**shared, **lesson.made_by, "blocks": asdict(blocks)}, inputs)
    rows = partial(read_rows, inputs, columns, read.limit)
    return _taught(folder, inputs, read.limit, rows, lesson, given, Plain())


def _segmenting(
    given: Mapping[str, Any], teacher: TeacherOptions, blocks: SegmenterOptions, markup: str
) -> Segment | Rewrite:
    asking, rewriting = _read(AskingOptions, given), _read(lessons.RewriteOptions, given)
    if not rewriting.rewrite:
        return Segment(Asking(load_prompt("segment"), teacher, asking), blocks)
    words = Asking(load_prompt("rewrite"), teacher, asking)
    return Rewrite(words, get_markup(markup), blocks.max_depth, rewriting.rewrite_changed)


def run_refine(args: argparse.Namespace) -> int:
    """Lets a teacher find dead ends in segmented rows; returns the exit status."""
    given = _given(args)
    options, teacher = _read(lessons.RefineOptions, given), _read(TeacherOptions, given)
    if teacher.teacher is None:
        raise ValueError("refine needs a teacher; give --teacher PROVIDER:MODEL")
    inputs = find_inputs(_rows_of(args.sources, "refine"))
    asking = Asking(load_prompt("refine"), teacher, _read(AskingOptions, given))
    lesson = lessons.RefineLesson(Refine(asking, options.max_depth), get_markup(options.markup))
    folder = _folder(args, {"limit": args.limit, **lesson.made_by}, inputs)
    return _taught(folder, inputs, args.limit, partial(read_prepared, inputs, args.limit), lesson, given, Plain())


def _refuse_without_teacher(given: Mapping[str, Any]) -> None:
    """Options of a teacher mean nothing without one, and ``--dry-run`` would not be dry."""
    kinds = (TeacherOptions, AskingOptions, teaching.GivingUp, lessons.RewriteOptions)
    names = {one.name for kind in kinds for one in fields(kind)}
    found = sorted(name for name in names & given.keys() if given[name] is not None)
    if found:
        raise ValueError(f"--{found[0].replace('_', '-')} belongs to a teacher; give --teacher PROVIDER:MODEL too")


def _refuse_of_segmenter(given: Mapping[str, Any]) -> None:
    found = [name for name in ("tokenizer", "surprise") if given.get(name) is not None]
    if found:
        raise ValueError(f"--{found[0]} is for segmenting without a teacher; leave it out, or leave --teacher out")


def _taught(
    folder: StepFolder,
    inputs: Sequence[Input],
    limit: int | None,
    read: Callable[[], Iterable[Any]],
    lesson: teaching.Lesson,
    given: Mapping[str, Any],
    decide: Plain,
) -> int:
    """Asks a teacher about all rows, or estimates what that would take; returns the exit status."""
    teacher, work, giving = _read(TeacherOptions, given), _read(Work, given), _read(teaching.GivingUp, given)
    if work.workers > 1:
        raise ValueError("--workers is for steps without a teacher; how many requests are open, says --concurrency")
    if giving.dry_run:
        print(teaching.estimate_text(teaching.estimated(folder.out, lesson, read(), teacher)))
        return 0
    found = teaching.run_lesson(folder, inputs, limit, read, lesson, teacher, work, giving, decide)
    if isinstance(found, StepFolder):
        return _report(found)
    reasons = ", ".join(f"{rows} {code} ({meaning(code)})" for code, rows in found.most_common())
    print(
        f"{found.total()} rows got no reply: {reasons}. Start the same command again to ask for them, "
        "with other limits if these were reached, or with --give-up to reject them",
        file=sys.stderr,
    )
    return 1


def _folder(args: argparse.Namespace, arguments: dict[str, Any], inputs: Sequence[Input]) -> StepFolder:
    return StepFolder(_out(args), args.command, arguments, [each.identity() for each in inputs])


def run_check(args: argparse.Namespace) -> int:
    """Checks prepared rows; returns the exit status."""
    given = _given(args)
    options, work, teacher = _read(CheckOptions, given), _read(Work, given), _read(TeacherOptions, given)
    inputs = find_inputs(_rows_of(args.sources, "check"))
    arguments = {"limit": args.limit, **asdict(options), "problems": identities(options.against)}
    if teacher.teacher is not None:
        return _judge(args, options, arguments, inputs, teacher, given)
    _refuse_without_teacher(given)
    folder = _folder(args, arguments, inputs)
    return _report(checking.run_check(folder, inputs, args.limit, options, work))


def _judge(
    args: argparse.Namespace,
    options: CheckOptions,
    arguments: dict[str, Any],
    inputs: Sequence[Input],
    teacher: TeacherOptions,
    given: Mapping[str, Any],
) -> int:
    """Checks rows, and lets a teacher judge those that pass; returns the exit status."""
    asking = Asking(load_prompt("judge"), teacher, _read(AskingOptions, given))
    lesson = lessons.CheckLesson(Judge(asking, options.notation), Checker(options))
    folder = _folder(args, {**arguments, "judge": lesson.made_by}, inputs)
    with Twins(options.near) as twins:
        rows = partial(read_prepared, inputs, args.limit)
        return _taught(folder, inputs, args.limit, rows, lesson, given, checking.Sifting(options, twins))


def run_stats(args: argparse.Namespace) -> int:
    """Counts and draws; returns the exit status."""
    from hcot_lmeval.report import render

    given, out = _given(args), _out(args)
    options, work = _read(statistics.StatsOptions, given), _read(Work, given)
    inputs = find_inputs(_rows_of(args.sources))
    with Progress("stats", count_records(inputs), 0, work.quiet) as tick:
        found = statistics.gather(read_prepared(inputs), options, work.workers, tick)
    if found.rows == found.unreadable:
        raise ValueError(f"{' '.join(args.sources)}: there is no row to count")
    found.history = manifests(out)

    print("\n\n".join(render.terminal(table) for table in found.tables()))
    shown = statistics.page_rows(read_prepared(inputs), options.page_rows)
    written = statistics.write_stats(found, out / "stats", shown)
    print(f"\nwritten to {out / 'stats'}: {', '.join(sorted(path.name for path in written))}")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Exports prepared rows; returns the exit status."""
    given, out = _given(args), _out(args)
    work = _read(Work, given)
    if args.to is not None:
        given = {"format": format_of(args.to)} | given
    options = _read(ExportOptions, given)
    path = args.to or out / "export" / f"train.{options.format}"
    inputs = find_inputs(_rows_of(args.sources))
    unread: list[Unreadable] = []
    with Progress("export", count_records(inputs), 0, work.quiet) as tick:
        count = write_export(only_rows(read_prepared(inputs), unread), path, options, tick)
    history = manifests(out)
    told = [each.identity() for each in inputs]
    write_json(
        path.with_name(f"{path.name}.manifest.json"),
        {"rows": count, "arguments": asdict(options), "inputs": told, "steps": history},
    )
    print(f"{path}: {count} rows ({', '.join(options.columns)})")
    if unread:
        print(f"{len(unread)} rows could not be read; the first: {unread[0].where}: {unread[0].code}", file=sys.stderr)
    if options.push:
        print(push(path, options, history))
    return 0


# --- what they share --------------------------------------------------------------------------------------------------


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the file and of the command line, which comes first."""
    sections = {name: [kind for kind, _ in found] for name, found in KINDS.items()}
    file = from_file(args.config, args.command, sections) if args.config else {}
    return file | vars(args)


def _read(kind: type[Options], given: Mapping[str, Any]) -> Options:
    return read_options(kind, given)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    without = [word for word in words if "=" not in word]
    if without:
        raise ValueError(f"--column {without[0]}: expected ROLE=NAME, as in question=problem")
    return {role: name for role, _, name in (word.partition("=") for word in words)}


def _rows_of(sources: Sequence[str], before: str | None = None) -> list[str | Path]:

    return [path for source in sources for path in rows_of(source, before)]


def _out(args: argparse.Namespace) -> Path:
    """The folder of the run: the one that is named, or the one that is read."""
    if args.out is not None:
        return Path(args.out)
    runs = [Path(source) for source in args.sources if Path(source).is_dir() and is_run(Path(source))]
    if len(runs) != 1:
        raise ValueError(f"{' '.join(args.sources)} is not the folder of one run; name a folder with --out RUN")
    return runs[0]


def _report(folder: StepFolder) -> int:
    """Prints what became of the rows; the exit status is 1 where none is left."""
    summary = folder.summary
    print(f"{folder.step}: {summary['passed']} of {summary['rows']} rows passed, {summary['rejected']} rejected")
    for code, found in summary["reasons"].items():
        print(f"  {found['rows']:>7}  {code}: {found['meaning']}")
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


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "segment": run_segment,
    "refine": run_refine,
    "check": run_check,
    "stats": run_stats,
    "export": run_export,
}
