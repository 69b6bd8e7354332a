"""The command ``hcot``: what this package does, each part a subcommand; the same as the scripts in ``scripts/``.

A part is a module with ``main(argv)``, which returns an exit status; how all of them end when something is wrong is
`errors.run_command`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

WRONG_USAGE = 2


class Part(NamedTuple):
    """A subcommand.

    Attributes:
        module: where its ``main`` is, imported when it is asked for.
        meaning: what it does.
    """

    module: str
    meaning: str


PARTS = {
    "eval": Part("hcot_lmeval.plugin", "evaluate: lm_eval --model hcot"),
    "chat": Part("hcot_lmeval.chat", "talk to a model, and watch its thoughts fold as they return"),
    "watch": Part("hcot_lmeval.watch", "follow a run that is going on"),
    "compare": Part("hcot_lmeval.report.cli", "with and without pruning: run a grid, make the tables"),
    "view": Part("hcot_lmeval.report.viewer.cli", "see what was thought and what was thrown away"),
    "diagnose": Part("hcot_lmeval.diagnosis.cli", "why a checkpoint loops, breaks the notation or never ends"),
    "doctor": Part("hcot_lmeval.doctor", "is every way to decode right on this machine?"),
    "prepare": Part("hcot_lmeval.prepare.cli", "flat chains of thought in, checked hierarchical traces out"),
    "train": Part("hcot_lmeval.training.cli", "train on exactly the contexts that the decoder sees"),
    "push": Part("hcot_lmeval.push", "make a checkpoint one that strangers can run: card, custom_generate, upload"),
}

USAGE = "\n".join(
    [
        "usage: hcot COMMAND ...",
        "",
        *(f"  {name:<10} {part.meaning}" for name, part in PARTS.items()),
        "",
        "hcot COMMAND --help tells more. `python -m hcot_lmeval` is the same. The benchmark needs a clone of the",
        "repository: python scripts/bench.py --help",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the rest of the command line to the subcommand that it begins with; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not argv or argv[0] not in PARTS:
        print((f"error: there is no command {argv[0]!r}\n" if argv else "") + USAGE, file=sys.stderr)
        return WRONG_USAGE
    sys.argv = [f"hcot {argv[0]}", *argv[1:]]  # what help and errors call the program
    return run(argv[0], argv[1:])


def run(name: str, argv: Sequence[str]) -> int:
    """Runs a subcommand with its arguments; returns the exit status."""
    return int(import_module(PARTS[name].module).main(argv))
