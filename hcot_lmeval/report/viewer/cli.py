"""Shows what was thought and what was thrown away: one HTML page of traces, or a tree in the terminal.

    hcot view NOTES --out page.html                      notes of one run (model argument notes=DIR)
    hcot view NOTES --samples RESULTS --out page.html    with right and wrong
    hcot view NOTES NOTES2 --out page.html               two runs side by side
    hcot view traces.jsonl --text-column response        texts of any model
    hcot view NOTES --terminal --doc 7                   no browser
    hcot view NOTES --serve                              a run that is going on, at http://127.0.0.1:8123/

The page is one file that opens from disk and needs no network.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from hcot_lmeval.errors import run_command
from hcot_lmeval.markup import PRESETS, get_markup
from hcot_lmeval.notes import RunNotes
from hcot_lmeval.report.viewer.page import write_page
from hcot_lmeval.report.viewer.reading import (
    Source,
    Trace,
    ViewerError,
    find_sources,
    note_traces,
    plain_traces,
    plural,
)
from hcot_lmeval.report.viewer.serve import serve
from hcot_lmeval.report.viewer.verdicts import Verdicts, read_verdicts
from hcot_lmeval.store import check_folder
from hcot_lmeval.trace import Policy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parser().parse_args(argv)
    return run_command(lambda: view(args), extra="report")


def view(args: argparse.Namespace) -> None:
    """Writes the page, prints the traces, or serves the page."""
    if args.serve is not None:
        return _serve(args)
    if not args.terminal:
        check_folder(args.out.parent, f"--out {args.out}", "name another file")
        if any(args.out.absolute().is_relative_to(place.absolute()) and args.out.exists() for place in args.notes):
            raise ViewerError(f"--out {args.out} is among the notes, and would take their place; name another file")
    sources = find_sources(args.notes)
    verdicts = _verdicts(args, sources)
    traces = _traces(args, sources)
    if args.terminal:
        _print(args, traces, verdicts)
    else:
        _write(args, traces, verdicts, sources)
    remark = verdicts.remark()
    if remark:
        print(f"note: {remark}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """Returns the parser; it needs no heavy import."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument(
        "notes", nargs="+", type=Path, metavar="NOTES",
        help="files of notes or plain traces, or folders that hold any, such as that of a grid or of one of its cells",
    )  # fmt: skip
    parse.add_argument("--out", type=Path, default=Path("traces.html"), help="the page to write (%(default)s)")
    parse.add_argument("--title", help="title of the page (the names of the runs)")
    parse.add_argument(
        "--samples", type=Path, action="append", default=[], metavar="DIR",
        help="--output_path of the evaluation, for right, wrong, answers, levels; one for all NOTES, or again for each",
    )  # fmt: skip
    parse.add_argument("--task", action="append", help="only traces of this task (again for more)")
    parse.add_argument("--doc", action="append", help="only traces of this problem (again for more)")
    parse.add_argument("--limit", type=_positive, help="only the first N traces of each run")
    parse.add_argument(
        "--serve", type=int, nargs="?", const=8123, metavar="PORT",
        help="serve the page to this machine, and make it anew when the files grow (%(const)s)",
    )  # fmt: skip
    plain = parse.add_argument_group("plain traces (JSONL with a column of text)")
    plain.add_argument("--text-column", help="column of the text (the first of the usual ones that a row has)")
    plain.add_argument("--prompt-column", help="column of the problem")
    plain.add_argument("--gold-column", help="column of the right answer")
    plain.add_argument("--markup", choices=list(PRESETS), default="hcot", help="notation of the blocks (%(default)s)")
    plain.add_argument(
        "--policy", choices=[p.value for p in Policy], default="recompute",
        help="what a return would have done (%(default)s)",
    )  # fmt: skip
    terminal = parse.add_argument_group("terminal")
    terminal.add_argument("--terminal", action="store_true", help="print instead of writing a page")
    terminal.add_argument("--expand", action="store_true", help="print the thoughts too, not only what came of them")
    return parse


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 up")
    return number


def _verdicts(args: argparse.Namespace, sources: Sequence[Source]) -> Verdicts:
    if args.samples and not any(source.is_notes for source in sources):
        raise ViewerError("--samples belongs to notes, and NOTES are plain traces; leave it out")
    return read_verdicts(sources, args.samples) if args.samples else Verdicts()


def _traces(args: argparse.Namespace, sources: Sequence[Source]) -> Iterator[Trace]:
    return chain.from_iterable(_chosen(args, _read(args, source)) for source in sources)


def _read(args: argparse.Namespace, source: Source) -> Iterator[Trace]:
    if source.is_notes:
        notes = RunNotes(source.paths)
        if notes.repeated:
            repeated = plural(notes.repeated, "request")
            print(f"note: {source.name} holds {repeated} more than once; the last of each is shown", file=sys.stderr)
        return note_traces(source, notes)
    given = {"text": args.text_column, "question": args.prompt_column, "answer": args.gold_column}
    columns = {role: name for role, name in given.items() if name}
    return plain_traces(source, get_markup(args.markup), Policy(args.policy), columns)


def _chosen(args: argparse.Namespace, traces: Iterator[Trace]) -> Iterator[Trace]:
    fitting = (
        trace
        for trace in traces
        if (not args.task or trace.task in args.task) and (not args.doc or str(trace.doc_id) in args.doc)
    )
    return islice(fitting, args.limit)


def _print(args: argparse.Namespace, traces: Iterator[Trace], verdicts: Verdicts) -> None:
    from rich.console import Console

    from hcot_lmeval.report.viewer.terminal import print_trace

    console, printed = Console(highlight=False), False
    for trace in traces:
        print_trace(trace, verdicts, console, expand=args.expand)
        printed = True
    if not printed:
        raise ViewerError("no trace fits --task, --doc; leave them out to see all")
    verdicts.check_used()


def _serve(args: argparse.Namespace) -> None:
    if args.terminal:
        raise ViewerError("--serve and --terminal are two ways to show the traces; leave out one")
    for place in args.notes:
        if not place.exists():
            print(f"{place} does not exist yet; it is the folder of the model argument notes=DIR", file=sys.stderr)

    def write(path: Path, state: str) -> None:
        sources = find_sources(args.notes)
        write_page(path, _traces(args, sources), sources, _verdicts(args, sources), _title(args, sources), state=state)

    serve([*args.notes, *args.samples], write, args.serve)


def _title(args: argparse.Namespace, sources: Sequence[Source]) -> str:
    return args.title or " · ".join(source.name for source in sources)


def _write(args: argparse.Namespace, traces: Iterator[Trace], verdicts: Verdicts, sources: Sequence[Source]) -> None:
    start = time.perf_counter()
    title = _title(args, sources)
    count = write_page(args.out, traces, sources, verdicts, title, progress=sys.stderr.isatty())
    size, seconds = args.out.stat().st_size, time.perf_counter() - start
    print(f"{args.out}: {plural(count, 'trace')}, {size / 1e6:.1f} MB, {seconds:.1f} s")
