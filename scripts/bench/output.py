"""How a measurement runs and ends, for ``bench.py`` and ``check_gpu.py``: progress, facts, a file, the exit status."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Report = Callable[[str], None]
"""Called with what is being done, once for each run."""


@contextmanager
def progress(total: int | None) -> Iterator[Report]:
    """A bar on the standard error; yields what moves it on."""
    from tqdm import tqdm

    with tqdm(total=total, file=sys.stderr, leave=False) as bar:

        def report(doing: str) -> None:
            bar.set_postfix_str(doing)
            bar.update()

        yield report


def finish(args: argparse.Namespace, threads: int, results: dict[str, Any]) -> None:
    """Prints what the figures were measured with, and writes the file if `args.json` names one."""
    from hcot_lmeval.provenance import machine, versions

    facts = {"versions": versions(), "machine": machine(args.device, threads)}
    if load := getattr(args, "load", None):
        facts["machine"]["cores used by others"] = f"{load.cores():.2f}"
        if warning := load.warning():
            print(warning, file=sys.stderr)
    print(", ".join(f"{name} {value}" for part in facts.values() for name, value in part.items()))
    if args.json:
        hidden = ("action", "json", "load")
        arguments = {name: value for name, value in vars(args).items() if name not in hidden}
        args.json.write_text(json.dumps({**facts, "arguments": arguments, **results}, indent=1, default=str) + "\n")


def run(action: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Returns the exit status of a command: its own, 1 for an error, 130 if it was interrupted."""
    try:
        return action(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, MemoryError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows as lines; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
