"""Prepares training data: flat chains of thought in, checked hierarchical traces out. ``scripts/prepare_data.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcot_lmeval.errors import run_command

SUMMARY = """\
Prepares training data: flat chains of thought in, checked hierarchical traces out.

  segment   find blocks in flat traces, with a teacher or without; add solutions where the text has none
  refine    let a teacher wrap dead ends and redundant branches as blocks
  check     sort rows into good ones and rejected ones, with reasons; repair common faults
  stats     count blocks, lengths, live context and forwarded tokens; tables, plots, a page
  export    write what training reads: JSONL, parquet, chats, a data set on the hub

The words of a trace are never changed, but for `segment --rewrite`. Each command works on a run folder (--out) or on
files, alone or in a row; one that was killed goes on when it is started again.
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
COMMANDS = ("segment", "refine", "check", "stats", "export")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(lambda: _run(argv), extra="prepare")


def _run(argv: Sequence[str] | None) -> int:
    from hcot_lmeval.prepare import commands

    return commands.run(make_parser().parse_args(argv))


# --- the command line -------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = argparse.ArgumentParser(
        description=SUMMARY, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    _segment(commands)
    _refine(commands)
    _check(commands)
    _stats(commands)
    _export(commands)
    return parser


def _command(commands: Any, name: str, told: str, rows: str, examples: str) -> argparse.ArgumentParser:
    from hcot_lmeval.prepare.commands import SECTIONS
    from hcot_lmeval.settings import add_options

    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=told,
        description=told[0].upper() + told[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name)
    parser.add_argument("sources", nargs="+", metavar=rows, help=_ROWS[rows])
    parser.add_argument("--config", metavar="FILE.yaml", help="options by command, as in `check: {max_depth: 2}`")
    for kind in SECTIONS[name]:
        add_options(parser.add_argument_group(kind.model_config["title"]), kind)
    return parser


_ROWS = {
    "SOURCE": "files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders of them, or data sets on the hub (owner/name)",
    "ROWS": "a run folder, or files of prepared rows (question, hierarchical_cot, expected_answer)",
}


def _segment(commands: Any) -> None:
    parser = _command(
        commands, "segment", "find blocks in flat traces", "SOURCE",
        """\
examples:
  %(prog)s traces.jsonl --out run                        a deterministic segmenter, no key, no network
  %(prog)s traces.jsonl --out run --teacher gemini:gemini-2.5-flash --dry-run         what it would cost
  %(prog)s traces.jsonl --out run --teacher gemini:gemini-2.5-flash --max-usd 5       the key is in GEMINI_API_KEY
  %(prog)s traces.jsonl --out run --teacher local:qwen --base-url http://localhost:8000/v1
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


def _refine(commands: Any) -> None:
    parser = _command(
        commands, "refine", "let a teacher wrap dead ends and redundant branches as blocks", "ROWS",
        """\
examples:
  %(prog)s run --teacher claude:claude-sonnet-4-5 --dry-run             what it would cost
  %(prog)s run --teacher claude:claude-sonnet-4-5 --max-usd 5           the key is in ANTHROPIC_API_KEY
  %(prog)s run --teacher local:qwen --base-url http://localhost:8000/v1

Rows keep their blocks and may get further ones. Written to OUT/refine: rows.jsonl, rejected.jsonl, manifest.json.
""",
    )  # fmt: skip
    _add_out(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N rows")


def _check(commands: Any) -> None:
    parser = _command(
        commands, "check", "sort rows into good ones and rejected ones, with reasons", "ROWS",
        """\
examples:
  %(prog)s run                                           after segment or refine
  %(prog)s run --against aime24 aime25 polymath --drop-contaminated
  %(prog)s traces.jsonl --out run --max-tokens 16384 --tokenizer Qwen/Qwen2.5-1.5B
  %(prog)s run --tolerate answer_missing near_duplicate  report these, reject for the others
  %(prog)s run --teacher gemini:gemini-2.5-flash --max-usd 5        let it judge whether solutions suffice
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
        from hcot_lmeval.prepare.steps import REASONS

        print("\n".join(f"{code:<24} {meaning}" for code, meaning in REASONS.items()))
        parser.exit()


def _stats(commands: Any) -> None:
    parser = _command(
        commands, "stats", "count blocks, lengths, live context and forwarded tokens", "ROWS",
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
        commands, "export", "write what training reads", "ROWS",
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
