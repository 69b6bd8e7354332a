"""How the kernel reads weights: found by trying, since it changes the time of a step and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

DISTANCES = (512, 2560, 0)
"""Bytes by which the weights for one row of activations are fetched ahead, one row of weights after the other; or (0)
several rows side by side. Of the first two, the first was the faster on a Zen 3, by up to a tenth, the second on a
Zen 4, by up to a third; the last is faster in bfloat16 where rows are long and there is no instruction for it."""
PACKED_DISTANCES = (1536, 1024, 2560)
"""The same for packed rows, of which every eight are read together."""
TRIED_BYTES, TRIALS = 2**28, 10
"""Weights that are read, and how often, to choose a way."""
LEAST_BYTES = 2**26
"""Weights of a smaller model stay in the processor's cache, more or less; there nothing is tried."""
GAIN, COPY_GAIN = 1.05, 1.02
"""How many times as fast as the first distance another has to be; and a copy, which takes memory, as the weights."""


class Reading(NamedTuple):
    """A way to read weights.

    Attributes:
        copied: from the copy in fewer bits.
        distance: one of `DISTANCES`, or of `PACKED_DISTANCES`.
    """

    copied: bool
    distance: int

    def __str__(self) -> str:
        order = f"{self.distance} bytes ahead" if self.distance else "several rows side by side"
        return f"{'from the copy' if self.copied else 'as they are'}, {order}"


def choose_reading(own: Sequence[Reading], copied: Sequence[Reading], time: Callable[[Reading], float]) -> Reading:
    """Returns the fastest way, where `time` gives the seconds of one; either list may be empty."""
    tried = [*own, *copied]
    times = zip(*([time(way) for way in tried] for _ in range(TRIALS)), strict=True)  # by turns
    best = dict(zip(tried, map(min, times), strict=True))
    found = [_choose(ways, best) for ways in (own, copied) if ways]
    return found[-1] if COPY_GAIN * best[found[-1]] < best[found[0]] else found[0]


def _choose(ways: Sequence[Reading], seconds: dict[Reading, float]) -> Reading:
    fastest = min(ways, key=lambda way: seconds[way])
    return fastest if GAIN * seconds[fastest] < seconds[ways[0]] else ways[0]
