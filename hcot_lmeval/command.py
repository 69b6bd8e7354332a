"""The command ``hcot``: what this package does, each part a subcommand; the same as the scripts in ``scripts/``.

A part is a module with ``main(argv)``, which does the work, prints, and returns an exit status or None. How it ends
when something is wrong is decided here alone: an error of users is one line and status 1, Ctrl-C 130, SIGTERM 143.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from hcot_lmeval.errors import VARIABLE, is_raised_here

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
WRONG_USAGE = 2


class Part(NamedTuple):
    """A subcommand.

    Attributes:
        module: where its ``main`` is, imported when it is asked for.
        meaning: what it does.
        extra: the extra of the package that brings its libraries, or an empty string.
    """

    module: str
    meaning: str
    extra: str = ""


PARTS = {
    "eval": Part("hcot_lmeval.plugin", "evaluate: lm_eval --model hcot"),
    "compare": Part("hcot_lmeval.report.cli", "with and without pruning: run a grid, make the tables", "report"),
    "view": Part("hcot_lmeval.report.viewer.cli", "see what was thought and what was thrown away", "report"),
    "diagnose": Part("hcot_lmeval.diagnosis.cli", "why a checkpoint loops, breaks the notation or never ends", "train"),
    "prepare": Part("hcot_lmeval.prepare.cli", "flat chains of thought in, checked hierarchical traces out", "prepare"),
    "train": Part("hcot_lmeval.training.cli", "train on exactly the contexts that the decoder sees", "train"),
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
    part = PARTS[name]
    try:
        status = import_module(part.module).main(argv)
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; the same command goes on from here'}", file=sys.stderr)
        return getattr(stop, "status", INTERRUPTED)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if not part.extra or str(error.name).startswith("hcot_lmeval"):
            raise
        print(f"error: {error.name} is missing; pip install 'hcot_lmeval[{part.extra}]'", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(_line(error), file=sys.stderr)
    return 1


def _line(error: Exception) -> str:
    """What a user reads of an error; one that nobody here has raised may be a fault, so it says how to see more."""
    if os.environ.get(VARIABLE):
        return "".join(traceback.format_exception(error)).rstrip()
    if is_raised_here(error.__traceback__):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error} ({VARIABLE}=1 shows where)"
