"""``python -m hcot_lmeval COMMAND``: the commands beside lm_eval and training."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "compare": ("hcot_lmeval.report.cli", "compare models with and without pruning: run a grid, make the tables"),
    "diagnose": ("hcot_lmeval.diagnosis.cli", "why a checkpoint loops, breaks the notation or never ends"),
    "prepare": ("hcot_lmeval.prepare.cli", "flat chains of thought in, checked hierarchical traces out"),
    "view": ("hcot_lmeval.report.viewer.cli", "look at what was thought and what was thrown away"),
}
"""Command -> the module whose ``main(argv)`` it is, imported when asked for, and what it does."""

USAGE = "\n".join(
    [
        "usage: python -m hcot_lmeval COMMAND ...",
        "",
        *(f"  {name:<10} {meaning}" for name, (_, meaning) in COMMANDS.items()),
        "",
        "python -m hcot_lmeval COMMAND --help tells more. Evaluations are run by lm_eval --model hcot.",
    ]
)


def main(argv: list[str]) -> int:
    """Hands the rest of the command line to the command that it begins with; returns the exit status."""
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if not argv or argv[0] not in COMMANDS:
        told = f"error: there is no command {argv[0]!r}\n" if argv else ""
        print(told + USAGE, file=sys.stderr)
        return 2
    module, _ = COMMANDS[argv[0]]
    sys.argv = [f"python -m hcot_lmeval {argv[0]}", *argv[1:]]  # what help and errors call the program
    return import_module(module).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
