"""Prepares training data: flat chains of thought in, checked hierarchical traces out: ``hcot prepare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hcot_lmeval.errors import run_command

SUMMARY = """\
Prepares training data: flat chains of thought in, checked hierarchical traces out.

  segment   find blocks in flat traces, with a teacher or without; add solutions where the text has none
  refine    let a teacher wrap dead ends and redundant branches as blocks
  check     sort rows into good ones and rejected ones, with reasons; repair common faults
  stats     count blocks, lengths, live context and forwarded tokens
  export    write what training reads: columns or chats, as JSONL or parquet, and to the hub

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(lambda: _run(argv), extra="prepare")


def _run(argv: Sequence[str] | None) -> int:
    from hcot_lmeval.prepare import commands

    return commands.run(make_parser().parse_args(argv))


# --- the command line -------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """What help says of a command.

    Attributes:
        summary: what it does, in one line.
        sources: what it reads, a key of `SOURCES`.
        examples: how it is called, and where it writes.
    """

    summary: str
    sources: str
    examples: str


SOURCES = {
    "SOURCE": "files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders of them, or data sets on the hub (owner/name)",
    "ROWS": "a run folder, or files of prepared rows (question, hierarchical_cot, expected_answer)",
}
COMMANDS = {
    "segment": Command(
        "find blocks in flat traces", "SOURCE",
        """\
examples:
  %(prog)s traces.jsonl --out run                        a deterministic segmenter, no key, no network
  %(prog)s traces.jsonl --out run --teacher gemini:gemini-2.5-flash --dry-run         what it would cost
  %(prog)s traces.jsonl --out run --teacher gemini:gemini-2.5-flash --max-usd 5       the key is in GEMINI_API_KEY
  %(prog)s traces.jsonl --out run --teacher local:qwen --base-url http://localhost:8000/v1
  %(prog)s open-thoughts/OpenThoughts-114k --limit 500 --out run
  %(prog)s mine.jsonl --column question=task text=said --out run

Written to OUT/segment: rows.jsonl, rejected.jsonl (with reasons), manifest.json.
""",
    ),
    "refine": Command(
        "let a teacher wrap dead ends and redundant branches as blocks", "ROWS",
        """\
examples:
  %(prog)s run --teacher claude:claude-sonnet-4-5 --dry-run             what it would cost
  %(prog)s run --teacher claude:claude-sonnet-4-5 --max-usd 5           the key is in ANTHROPIC_API_KEY
  %(prog)s run --teacher local:qwen --base-url http://localhost:8000/v1

Rows keep their blocks and may get further ones. Written to OUT/refine: rows.jsonl, rejected.jsonl, manifest.json.
""",
    ),
    "check": Command(
        "sort rows into good ones and rejected ones, with reasons", "ROWS",
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
    ),
    "stats": Command(
        "count blocks, lengths, live context and forwarded tokens", "ROWS",
        """\
examples:
  %(prog)s run
  %(prog)s run --tokenizer Qwen/Qwen2.5-1.5B --workers 4
  %(prog)s traces.parquet --out run

Written to OUT/stats: stats.md, stats.json, a CSV for each table.
""",
    ),
    "export": Command(
        "write what training reads", "ROWS",
        """\
examples:
  %(prog)s run                                           OUT/export/train.jsonl
  %(prog)s run --form chat --to data/train.parquet
  %(prog)s run --format parquet --push owner/name        private unless --public; the token comes from the environment
""",
    ),
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser."""
    from hcot_lmeval.prepare.commands import SECTIONS
    from hcot_lmeval.settings import add_options

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=SUMMARY, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, (summary, sources, examples) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description, epilog=examples, formatter_class=raw)
        command.set_defaults(command=name)
        command.add_argument("sources", nargs="+", metavar=sources, help=SOURCES[sources])
        out = {"help": "folder of the run"} if name == "segment" else {"help": "folder of the run (that of ROWS)"}
        command.add_argument("--out", type=Path, metavar="RUN", required=name == "segment", **out)
        _add_own(command, name)
        for kind in SECTIONS[name]:
            add_options(command.add_argument_group(kind.model_config["title"]), kind)
    return parser


def _add_own(command: argparse.ArgumentParser, name: str) -> None:
    """Adds what one command has alone."""
    if name == "segment":
        command.add_argument(
            "--column", nargs="+", action="extend", default=[], metavar="ROLE=NAME",
            help="which column is what; roles: id question text reasoning response answer messages",
        )  # fmt: skip
    if name == "check":
        command.add_argument("--reasons", action=_Reasons, nargs=0, help="print every code with its meaning, and stop")
    if name == "export":
        command.add_argument("--to", type=Path, metavar="FILE", help="the file to write (OUT/export/train.FORMAT)")


class _Reasons(argparse.Action):
    """Needs no rows, as ``--help`` does not."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from hcot_lmeval.prepare.reasons import REASONS

        print("\n".join(f"{code:<24} {meaning}" for code, meaning in REASONS.items()))
        parser.exit()
