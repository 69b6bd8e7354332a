"""Prepares training data: flat chains of thought in, checked hierarchical traces out. ``scripts/prepare_data.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hcot_lmeval.prepare.folder import StepFolder

SUMMARY = """\
Prepares training data: flat chains of thought in, checked hierarchical traces out.

  segment   find blocks in flat traces; add solutions where the text has none
  check     sort rows into good ones and rejected ones, with reasons; repair common faults
  stats     count blocks, lengths, live context and forwarded tokens; tables, plots, a page
  export    write what training reads: JSONL, parquet, chats, a data set on the hub

The words of a trace are never changed. Each command works on a run folder (--out) or on files, alone or in a row; one
that was killed goes on when it is started again.
"""
EXAMPLES = """\
examples:
  %(prog)s segment traces.jsonl --out run          without a teacher, in seconds
  %(prog)s check run --against aime24 aime25
  %(prog)s stats run
  %(prog)s export run --to train.jsonl             training: data: {train: [{path: train.jsonl}]}
  %(prog)s segment nvidia/OpenMathReasoning --split cot --limit 1000 --out run
  %(prog)s segment mine.parquet --column question=task text=answer_text --out run

Columns are recognised by name (OpenMathReasoning, OpenThoughts, DeepSeek-R1 style); --column names others.
"""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
COMMANDS = ("segment", "check", "stats", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.action(args))
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"error: {error}. The libraries of this command: pip install 'hcot_lmeval[prepare]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return INTERRUPTED


# --- the command line -------------------------------------------------------------------------------------------------


def kinds() -> dict[str, list[tuple[type, str]]]:
    """Returns command -> the kinds of its options, each with a title."""
    from hcot_lmeval.prepare.checks import CheckOptions
    from hcot_lmeval.prepare.export import ExportOptions
    from hcot_lmeval.prepare.inputs import InputOptions
    from hcot_lmeval.prepare.segmenter import SegmenterOptions
    from hcot_lmeval.prepare.segmenting import FormOptions
    from hcot_lmeval.prepare.stats import StatsOptions
    from hcot_lmeval.prepare.steps import Work

    read, work = (InputOptions, "input"), (Work, "work")
    return {
        "segment": [read, (FormOptions, "form"), (SegmenterOptions, "blocks"), work],
        "check": [(CheckOptions, "what is allowed"), work],
        "stats": [(StatsOptions, "statistics"), work],
        "export": [(ExportOptions, "export"), work],
    }


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = argparse.ArgumentParser(
        description=SUMMARY, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    _segment(commands)
    _check(commands)
    _stats(commands)
    _export(commands)
    return parser


def _command(
    commands: Any, name: str, told: str, rows: str, action: Callable[[argparse.Namespace], int], examples: str
) -> argparse.ArgumentParser:
    from hcot_lmeval.prepare.config import add_options

    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=told,
        description=told[0].upper() + told[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(action=action, command=name)
    parser.add_argument("sources", nargs="+", metavar=rows, help=_ROWS[rows])
    parser.add_argument("--config", metavar="FILE.yaml", help="options by command, as in `check: {max_depth: 2}`")
    for kind, title in kinds()[name]:
        add_options(parser, kind, title)
    return parser


_ROWS = {
    "SOURCE": "files (.jsonl, .jsonl.gz, .parquet), folders of them, or data sets on the hub (owner/name)",
    "ROWS": "a run folder, or files of prepared rows (question, hierarchical_cot, expected_answer)",
}


def _segment(commands: Any) -> None:
    parser = _command(
        commands, "segment", "find blocks in flat traces", "SOURCE", run_segment,
        """\
examples:
  %(prog)s traces.jsonl --out run                        a deterministic segmenter, no key, no network
  %(prog)s traces.jsonl --out run --surprise Qwen/Qwen2.5-0.5B    a local model helps to find boundaries
  %(prog)s open-thoughts/OpenThoughts-114k --limit 500 --out run
  %(prog)s mine.jsonl --column question=task text=said --out run

Written to OUT/segment: rows.jsonl, rejected.jsonl (with reasons), manifest.json.
""",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--column", nargs="+", action="extend", default=[], metavar="ROLE=NAME",
        help="which column is what; roles: id question text reasoning response answer messages",
    )  # fmt: skip


def _check(commands: Any) -> None:
    parser = _command(
        commands, "check", "sort rows into good ones and rejected ones, with reasons", "ROWS", run_check,
        """\
examples:
  %(prog)s run                                           after segment
  %(prog)s run --against aime24 aime25 polymath --drop-contaminated
  %(prog)s traces.jsonl --out run --max-tokens 16384 --tokenizer Qwen/Qwen2.5-1.5B
  %(prog)s run --tolerate answer_missing near_duplicate  report these, reject for the others
  %(prog)s --reasons                                     every code and what it means

Written to OUT/check: rows.jsonl, rejected.jsonl (with reasons), manifest.json. With HCOT_LMEVAL_DATA the evaluation
tasks are read from a local folder in place of the hub.
""",
    )  # fmt: skip
    _add_out(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N rows")
    parser.add_argument("--reasons", action=_Reasons, nargs=0, help="print every code with its meaning, and stop")


class _Reasons(argparse.Action):
    """Needs no rows, as ``--help`` does not."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from hcot_lmeval.prepare.checks import REASONS

        print("\n".join(f"{code:<24} {meaning}" for code, meaning in REASONS.items()))
        parser.exit()


def _stats(commands: Any) -> None:
    parser = _command(
        commands, "stats", "count blocks, lengths, live context and forwarded tokens", "ROWS", run_stats,
        """\
examples:
  %(prog)s run
  %(prog)s run --tokenizer Qwen/Qwen2.5-1.5B --workers 4
  %(prog)s traces.parquet --out run --page-rows 0 --no-plots

Written to OUT/stats: stats.md, stats.json, a CSV for each table, plots as PNG and SVG, before-after.html.
""",
    )  # fmt: skip
    _add_out(parser)


def _export(commands: Any) -> None:
    parser = _command(
        commands, "export", "write what training reads", "ROWS", run_export,
        """\
examples:
  %(prog)s run                                           OUT/export/train.jsonl
  %(prog)s run --format parquet --form chat --to data/train.parquet
  %(prog)s run --push owner/name                         private unless --public; the token comes from the environment
""",
    )  # fmt: skip
    _add_out(parser)
    parser.add_argument("--to", type=Path, metavar="FILE", help="the file to write (OUT/export/train.FORMAT)")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (that of ROWS, if it is one)")


# --- the commands -----------------------------------------------------------------------------------------------------


def run_segment(args: argparse.Namespace) -> int:
    """Segments flat traces; returns the exit status."""
    from hcot_lmeval.prepare import segmenting
    from hcot_lmeval.prepare.folder import StepFolder
    from hcot_lmeval.prepare.inputs import InputOptions, find_inputs
    from hcot_lmeval.prepare.reading import check_roles
    from hcot_lmeval.prepare.segmenter import SegmenterOptions
    from hcot_lmeval.prepare.steps import Work

    given, columns = _given(args), check_roles(_pairs(args.column))
    read, work = _read(InputOptions, given), _read(Work, given)
    form = _read(segmenting.FormOptions, given)
    make = segmenting.Segmenting(_read(SegmenterOptions, given), form)
    inputs = find_inputs(args.sources, read)
    arguments = {"method": "segmenter", "columns": columns, "limit": read.limit, **asdict(make)}
    folder = StepFolder(args.out, "segment", arguments, [each.identity() for each in inputs])
    return _report(segmenting.run_segment(folder, inputs, columns, read.limit, make, work))


def run_check(args: argparse.Namespace) -> int:
    """Checks prepared rows; returns the exit status."""
    from hcot_lmeval.prepare import checking
    from hcot_lmeval.prepare.checks import CheckOptions
    from hcot_lmeval.prepare.contamination import identities
    from hcot_lmeval.prepare.folder import StepFolder
    from hcot_lmeval.prepare.inputs import find_inputs
    from hcot_lmeval.prepare.steps import Work

    given = _given(args)
    options, work = _read(CheckOptions, given), _read(Work, given)
    inputs = find_inputs(_rows_of(args.sources, "check"))
    arguments = {"limit": args.limit, **asdict(options), "problems": identities(options.against)}
    folder = StepFolder(_out(args), "check", arguments, [each.identity() for each in inputs])
    return _report(checking.run_check(folder, inputs, args.limit, options, work))


def run_stats(args: argparse.Namespace) -> int:
    """Counts and draws; returns the exit status."""
    from hcot_lmeval.prepare import stats as statistics
    from hcot_lmeval.prepare.folder import manifests
    from hcot_lmeval.prepare.inputs import count_records, find_inputs
    from hcot_lmeval.prepare.reading import read_prepared
    from hcot_lmeval.prepare.steps import Progress, Work
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
    from hcot_lmeval.prepare.export import ExportOptions, only_rows, push, write_export
    from hcot_lmeval.prepare.folder import manifests, write_json
    from hcot_lmeval.prepare.inputs import count_records, find_inputs
    from hcot_lmeval.prepare.reading import read_prepared
    from hcot_lmeval.prepare.rows import Unreadable
    from hcot_lmeval.prepare.steps import Progress, Work

    given, out = _given(args), _out(args)
    options, work = _read(ExportOptions, given), _read(Work, given)
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
    from hcot_lmeval.prepare.config import from_file

    sections = {name: [kind for kind, _ in found] for name, found in kinds().items()}
    file = from_file(args.config, args.command, sections) if args.config else {}
    return file | vars(args)


def _read(kind: Any, given: Mapping[str, Any]) -> Any:
    from hcot_lmeval.prepare.config import read_options

    return read_options(kind, given)


def _pairs(words: Sequence[str]) -> dict[str, str]:
    without = [word for word in words if "=" not in word]
    if without:
        raise ValueError(f"--column {without[0]}: expected ROLE=NAME, as in question=problem")
    return {role: name for role, _, name in (word.partition("=") for word in words)}


def _rows_of(sources: Sequence[str], before: str | None = None) -> list[str | Path]:
    from hcot_lmeval.prepare.folder import rows_of

    return [path for source in sources for path in rows_of(source, before)]


def _out(args: argparse.Namespace) -> Path:
    """The folder of the run: the one that is named, or the one that is read."""
    from hcot_lmeval.prepare.folder import is_run

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
    if summary.get("repaired", {}).get("rows"):
        print(f"  {summary['repaired']['rows']} rows were repaired ({summary['repaired']['repairs']} repairs)")
    for code, rows in summary.get("remarks", {}).items():
        print(f"  {rows:>7}  {code}: reported, not rejected")
    if "contamination" in summary:
        print(f"  problems of evaluation tasks: {summary['contamination']}")
    print(f"written to {folder.path}")
    return 0 if summary["passed"] else 1
