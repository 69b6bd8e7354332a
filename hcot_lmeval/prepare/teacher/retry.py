"""When to try again: exponential backoff with jitter, and not before the server wants.

This module imports the standard library alone.
"""

from __future__ import annotations

import random

LONGEST = 60.0
"""Seconds of the longest wait that the server did not ask for."""
PATIENCE = 600.0
"""Seconds; a server that asks to wait longer is not waited for."""


def delay(attempt: int, after: float | None, first: float, rng: random.Random) -> float | None:
    """Returns the seconds to wait before the next attempt.

    Half of the wait is by chance, or all that were turned away together would come back together.

    Args:
        attempt: number of the attempt that failed, from 0.
        after: what the server asks for; None if it does not.
        first: longest wait behind the first attempt; doubles each time, up to `LONGEST`.
        rng: for the jitter.

    Returns:
        The seconds; None if the server asks for more than `PATIENCE`.
    """
    wait = min(LONGEST, first * 2**attempt) * rng.uniform(0.5, 1.0)
    if after is None:
        return wait
    return None if after > PATIENCE else after + wait / 10
