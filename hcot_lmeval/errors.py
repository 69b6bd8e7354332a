"""How commands end when something is wrong: in one line where a user can mend it.

Our own commands run in `run_command`. Within lm_eval's, a ``raise`` in this package or in its tasks tells a user what
was given, what is allowed and what to do; the frames above it would hide that. All else, a fault of ours or of a
library, keeps its traceback. ``HCOT_LMEVAL_TRACEBACK=1`` shows it always.

This module imports the standard library alone.
"""

from __future__ import annotations

import difflib
import linecache
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

VARIABLE = "HCOT_LMEVAL_TRACEBACK"
COMMANDS = frozenset({"lm_eval", "lm-eval", "lm_eval.exe", "lm-eval.exe", "hcot eval"})
PACKAGE = Path(__file__).resolve().parent


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

Allowed = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and in words what is."""


def check_values(record: object, allowed: Mapping[str, Allowed]) -> None:
    """Raises `ValueError` for the first of these attributes of `record` whose value is not allowed."""
    for name, (fits, words) in allowed.items():
        value = getattr(record, name)
        if not fits(value):
            raise ValueError(f"{name}={value!r} is not allowed; {words}")


def one_of(*names: str | None) -> Allowed:
    """Allows these names; None stands for leaving the value out."""
    listed = ", ".join(name for name in names if name is not None)
    return lambda value: value in names, f"choose one of {listed}" + (", or leave it out" if None in names else "")


def whole_number(least: int, *, optional: bool = False) -> Allowed:
    """Allows whole numbers from `least` up, and None if it is `optional`."""
    words = f"give a whole number from {least} up" + (", or leave it out" if optional else "")
    return lambda value: (optional and value is None) or (type(value) is int and value >= least), words


FLAG: Allowed = (lambda value: isinstance(value, bool), "give true or false")


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Returns ``; did you mean ...?`` with that of the known names which is nearest; nothing if none is near."""
    near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def run_command(action: Callable[[], int | None], *, extra: str = "") -> int:
    """Runs one of our own commands and returns its exit status: 0, 1 for an error, 130 after Ctrl-C.

    A `KeyboardInterrupt` with a message says what is kept; one with an attribute ``status`` sets the status.

    Args:
        action: the command; it returns its exit status, or None for 0.
        extra: of the package, that holds the libraries of the command.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as with `>&-`: what is said there goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        status = action()
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'stopped; the same command goes on from here'}", file=sys.stderr)
        return int(getattr(stop, "status", INTERRUPTED))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if os.environ.get(VARIABLE) or not extra or str(error.name).startswith("hcot_lmeval"):
            raise
        print(f"error: the library {error.name} is missing; pip install 'hcot_lmeval[{extra}]'", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get(VARIABLE):
            raise
        what = (
            error
            if is_raised_here(error.__traceback__)
            else f"{type(error).__name__}: {error} ({VARIABLE}=1 tells more)"
        )
        print(f"error: {what}", file=sys.stderr)
    return 1


def in_command() -> bool:
    """Whether this process is lm-eval's command line: the script, or ``python -m lm_eval``."""
    program = Path(sys.argv[0] if sys.argv else "")
    return program.name in COMMANDS or program.parts[-2:] == ("lm_eval", "__main__.py")


def message_for_users(error: BaseException) -> str | None:
    """Returns the one line to show in place of a traceback; None if the traceback is what helps."""
    if os.environ.get(VARIABLE) or isinstance(error, AssertionError):
        return None
    if isinstance(error, KeyboardInterrupt):
        return "stopped" + (f": {error}" if str(error) else "")
    if not is_raised_here(error.__traceback__):
        return None
    return f"error: {' '.join(str(error).split())}"


def is_raised_here(trace: TracebackType | None) -> bool:
    """Whether the innermost frame is at a `raise` of this package or of its tasks."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename)
    ours = path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE.parent / "tasks")
    return ours and linecache.getline(str(path), trace.tb_lineno).lstrip().startswith("raise")


def install() -> None:
    """Has uncaught errors of users end this process in one line. Idempotent."""
    before = sys.excepthook
    if hasattr(before, "_hcot_lmeval"):
        return

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = message_for_users(error)
        if message is None:
            before(kind, error, trace)
        else:
            print(message, file=sys.stderr)

    show._hcot_lmeval = True  # type: ignore[attr-defined]
    sys.excepthook = show
