"""How the command lm_eval ends when something is wrong: in one line where a user can mend it.

A ``raise`` in this package or in its tasks tells a user what was given, what is allowed and what to do; the frames
above it would hide that. All else, a fault of ours or of a library, keeps its traceback. ``HCOT_LMEVAL_TRACEBACK=1``
shows it always.

This module imports the standard library alone.
"""

from __future__ import annotations

import linecache
import os
import sys
from pathlib import Path
from types import TracebackType

VARIABLE = "HCOT_LMEVAL_TRACEBACK"
COMMANDS = frozenset({"lm_eval", "lm-eval", "lm_eval.exe", "lm-eval.exe", "hcot-eval", "hcot-eval.exe"})
PACKAGE = Path(__file__).resolve().parent


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
    if not _is_raised_here(error.__traceback__):
        return None
    return f"error: {' '.join(str(error).split())}"


def _is_raised_here(trace: TracebackType | None) -> bool:
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
