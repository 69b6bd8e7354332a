"""Compares language models with and without pruning: runs what is missing through lm-eval, and makes the tables.

``hcot compare``, which `scripts/compare.py` is too.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcot_lmeval.errors import run_command
from hcot_lmeval.store import check_folder

if TYPE_CHECKING:
    from hcot_lmeval.report.folder import CellFolder
    from hcot_lmeval.report.results import Run
    from hcot_lmeval.report.runner import Failure

SUMMARY = """\
Compares language models with and without pruning of their chain of thought.

  run    evaluate a grid of models x policies x context windows x tasks x seeds, then compare;
         what is finished is not run again, so start it once more after a kill
  read   compare results that lm_eval wrote (--log_samples --output_path DIR), of any model

The tables go to the terminal and, as Markdown, CSV, LaTeX, JSON and plots, into --out. `run --help` and `read --help`
have examples.
"""
RUN_EXAMPLES = """\
examples:
  %(prog)s --models tiny-hcot --tasks hcot_arith --windows 128 256 --limit 20 --device cpu --out cmp
  %(prog)s --models org/model base=hf:org/base --tasks aime24_boxed --policies off recompute --out cmp
  %(prog)s GRID.yaml --out cmp --dry-run         what is done, and the commands of the rest
  %(prog)s --keys                                what GRID.yaml may hold

By default each model runs with pruning off and as it was trained, at windows of 1024, 2048, 4096, 8192 live tokens,
as far as it has positions.
Several GPUs: start the same command for each (CUDA_VISIBLE_DEVICES=0 ..., =1 ...); they share the cells out.
"""
READ_EXAMPLES = """\
examples:
  %(prog)s out_off out_pruned                    two output folders of lm_eval, named by their settings
  %(prog)s flat=out_a hcot=out_b --baseline flat
  %(prog)s cmp --by level --out tables           the folder of a grid: its finished cells
"""
EXAMPLE_LINE = "models: [tiny-hcot]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0, 1 if something failed, 130 if it was interrupted."""
    return run_command(lambda: _run_command_line(argv), extra="report")


def _run_command_line(argv: Sequence[str] | None) -> int:
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:  # said with the usage of the command, not of the whole
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return int(args.action(args))


# --- the command line -------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser; every option of ``run`` that a grid file may hold has the name of the key there."""
    form: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=SUMMARY, **form)
    kinds = parser.add_subparsers(required=True, metavar="{run,read}")
    summary = "evaluate what is missing of a grid, then compare"
    run = kinds.add_parser("run", help=summary, description=f"{summary.capitalize()}.", epilog=RUN_EXAMPLES, **form)
    run.set_defaults(action=run_grid, parser=run)
    _add_grid_options(run)
    _add_table_options(run)
    summary = "compare results that are there"
    read = kinds.add_parser("read", help=summary, description=f"{summary.capitalize()}.", epilog=READ_EXAMPLES, **form)
    read.set_defaults(action=read_results, parser=read)
    read.add_argument("folders", nargs="+", metavar="[NAME=]DIR", help="output folder of lm_eval, or of a grid")
    read.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    _add_table_options(read)
    return parser


def _add_grid_options(parser: argparse.ArgumentParser) -> None:
    from hcot_lmeval.report.grid import GridConfig
    from hcot_lmeval.settings import add_options

    parser.add_argument("grid", nargs="?", metavar="GRID.yaml", help="file with the grid; options take precedence")
    grid = parser.add_argument_group("the grid (keys of the file have the same names)")
    add_options(grid, GridConfig)
    # as a short form it would stand for two options
    grid.add_argument("--model", dest="models", nargs="+", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--dry-run", action="store_true", help="list the cells, done and to do, with commands; run nothing"
    )
    parser.add_argument("--keys", action="store_true", help="print every key of GRID.yaml with its meaning, and stop")


def _add_table_options(parser: argparse.ArgumentParser) -> None:
    tables = parser.add_argument_group("the comparison")
    tables.add_argument(
        "--out", type=Path, default=Path("comparison"), metavar="DIR", help="output folder (%(default)s)"
    )
    tables.add_argument("--baseline", metavar="NAME", help="run that the others are tested against (the first)")
    tables.add_argument("--by", metavar="COLUMN", help="column of the documents to group by, such as level")
    tables.add_argument("--metric", metavar="NAME", help="what counts as accuracy (acc, avg@k or exact_match)")
    tables.add_argument("--filter", metavar="NAME", help="lm-eval's filter, where a task has several (the first)")
    tables.add_argument("--no-plots", action="store_true", help="tables alone")
    tables.add_argument("--allow-versions", action="store_true", help="compare runs of different library versions")


# --- run --------------------------------------------------------------------------------------------------------------


def run_grid(args: argparse.Namespace) -> int:
    """Evaluates what is missing of a grid and compares what is there; returns the exit status."""
    from hcot_lmeval.report.grid import GridConfig
    from hcot_lmeval.report.preflight import check_cells
    from hcot_lmeval.report.reading import Reader
    from hcot_lmeval.settings import describe_settings

    if args.keys:
        print("\n".join(describe_settings(GridConfig)))
        return 0
    folders = plan(args)
    check_cells([folder.cell for folder in folders if not folder.is_done])
    if args.dry_run:
        print("\n".join(_listed(folder) for folder in folders))
        return 0
    check_folder(args.out, f"--out {args.out}", "name another folder")
    failures = _run(folders, args)
    reader = Reader(None, args.metric, args.filter)
    runs = [run for folder in folders if folder.is_done for run in reader.cell(folder.path)]
    if not runs:
        raise ValueError(f"no cell is finished; the logs are in {args.out / 'cells'}")
    _compare(runs, args)
    if failures:
        names = "; ".join(failure.folder.cell.title for failure in failures)
        print(f"{len(failures)} of {len(folders)} cells failed and are not in the tables: {names}", file=sys.stderr)
    return 1 if failures else 0


def plan(args: argparse.Namespace) -> list[CellFolder]:
    """Returns the cells of the grid that the command line describes."""
    from hcot_lmeval.report.folder import CellFolder, with_other_versions
    from hcot_lmeval.report.grid import GridConfig
    from hcot_lmeval.settings import parse_settings, read_yaml

    settings = read_yaml(args.grid, EXAMPLE_LINE) if args.grid else {}
    grid = parse_settings(
        GridConfig, settings | _given(args, GridConfig.model_fields), args.grid or "the grid of the command line"
    )
    folders = [CellFolder(args.out, cell) for cell in grid.cells]
    return [with_other_versions(folder) for folder in folders] if args.allow_versions else folders


def _given(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The keys of a grid that stand on the command line."""
    given = {key: getattr(args, key) for key in keys if hasattr(args, key)}
    for key, words in given.items():
        option = f"--{key.replace('_', '-')}"
        for file in (word for word in words if word.endswith((".yaml", ".yml"))) if isinstance(words, list) else ():
            raise ValueError(
                f"{file} stands among the values of {option}; name the grid first: run {file} {option} ..."
            )
    if "lm_eval_args" in given:
        given["lm_eval_args"] = shlex.split(" ".join(given["lm_eval_args"]))
    return given


def _listed(folder: CellFolder) -> str:
    state = "done " if folder.is_done else "to do"
    line = f"{state}  {folder.cell.title}  {folder.path}"
    return line if folder.is_done else f"{line}\n       {shlex.join(['lm_eval', *folder.command([])])}"


def _run(folders: Sequence[CellFolder], args: argparse.Namespace) -> list[Failure]:
    from hcot_lmeval.report.runner import run_cells
    from hcot_lmeval.store import write_json

    write_json(args.out / "grid.json", {"cells": [folder.path.name for folder in folders]})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended like by Ctrl-C: lm_eval is ended too
    return run_cells(folders, lambda folder: _check_early(folder, folders, args))


def _check_early(folder: CellFolder, folders: Sequence[CellFolder], args: argparse.Namespace) -> None:
    """Says when a cell ends, and not after the last one, that it cannot be compared with the first of its task."""
    from hcot_lmeval.report.comparable import check_comparable
    from hcot_lmeval.report.reading import Reader
    from hcot_lmeval.report.results import ResultsError

    alike = [one for one in folders if one.is_done and one.cell.task == folder.cell.task]
    reader = Reader(None, args.metric, args.filter)
    pair = dict.fromkeys((alike[0], folder))
    try:
        check_comparable([run for one in pair for run in reader.cell(one.path)], allow_versions=args.allow_versions)
    except ResultsError as error:
        print(f"warning: {error}", file=sys.stderr)


# --- read -------------------------------------------------------------------------------------------------------------


def read_results(args: argparse.Namespace) -> int:
    """Compares the results in the folders given; returns the exit status."""
    from hcot_lmeval.report.reading import Reader

    check_folder(args.out, f"--out {args.out}", "name another folder")
    reader = Reader(args.tasks, args.metric, args.filter)
    runs = reader.read(args.folders)
    for line in reader.remarks:
        print(f"note: {line}", file=sys.stderr)
    _compare(runs, args)
    return 0


def _compare(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Prints the comparison and writes it into ``--out``."""
    from hcot_lmeval.report.comparable import check_comparable, remarks

    check_comparable(runs, allow_versions=args.allow_versions)

    from hcot_lmeval.report.comparison import compare  # heavy, hence behind the checks

    comparison = compare(runs, by=args.by, baseline=args.baseline)
    print(comparison.text())
    for line in remarks(runs):
        print(f"note: {line}")
    written = comparison.write(args.out, plots=not args.no_plots)
    whole = sorted(path.name for path in written if path.stem == "comparison")
    parts = Counter(path.suffix for path in written if path.stem != "comparison")
    summary = ", ".join([*whole, *(f"{count} {suffix}" for suffix, count in sorted(parts.items()))])
    print(f"\nwritten to {args.out}: {summary}")
