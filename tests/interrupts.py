"""Processes that tests interrupt."""

from __future__ import annotations

import signal


def accept_interrupts() -> None:
    """Undoes that SIGINT is ignored, as it is in what a shell without job control starts in the background.

    For ``preexec_fn``: a child inherits it, and Python then raises no KeyboardInterrupt.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
