"""How the kernel reads weights: found by trying, since it changes the time of a step and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from hcot_lmeval.engine.native.packing import NoCopyError, Source, WeightCopy, copy_weights
from hcot_lmeval.engine.pages import LEAST_BYTES

logger = logging.getLogger(__name__)

DISTANCES = (512, 2560, 0)
"""Bytes by which the weights for one row of activations are fetched ahead, one row of weights after the other; or (0)
several rows side by side. Of the first two, the first was the faster on a Zen 3, by up to a tenth, the second on a
Zen 4, by up to a third; the last is faster in bfloat16 where rows are long and there is no instruction for it."""
PACKED_DISTANCES = (1536, 1024, 2560)
"""The same for packed rows, of which every eight are read together."""
TRIALS = 10
"""How often each way is tried."""
GAIN, COPY_GAIN = 1.05, 1.02
"""How many times as fast as the first distance another has to be; and a copy, which takes memory, as the weights."""


class WeightForm(StrEnum):
    """How weights are read: as the model has them, from a copy in fewer bits, or whichever is faster."""

    AUTO = "auto"
    PLAIN = "plain"
    PACKED = "packed"


SHARE = {WeightForm.AUTO: 0.5, WeightForm.PACKED: 0.9}
"""Of the free memory, at most, goes to a copy of the weights."""


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


OWN = tuple(Reading(False, distance) for distance in DISTANCES)
"""The ways to read the model's own weights."""


class WeightReader:
    """Has the kernel read weights in the fastest way.

    Args:
        form: which weights: the model's own, those of a copy, or whichever are read faster.
        rows: that run at the same time at most; a copy serves few.

    Attributes:
        reading: the way in which they are read now.
        copy: of the weights, in fewer bits; None where it would not be read.
    """

    def __init__(self, form: WeightForm | str, rows: int) -> None:
        self.form, self._rows = WeightForm(form), rows
        self.reading = OWN[0]
        self.copy: WeightCopy | None = None
        self._opened = False

    def open(self, source: Source, seconds: Callable[[], float]) -> None:
        """Reads these weights from now on, in a way found by trying if the model is large.

        Weights that take the place of others are read as they are, unless a copy was asked for: while a model is
        trained, a copy would not live long enough to pay.

        Args:
            source: the weights.
            seconds: returns the time that products of a single token take, in the way of the moment.

        Raises:
            NoCopyError: a copy was asked for, and cannot be had.
        """
        self.copy, self._source = None, source
        self._use(source, OWN[0] if self.reading.copied else self.reading)
        if not self._opened or self.form is WeightForm.PACKED:
            self._find(source, seconds)
        self._opened = True

    def is_outdated(self) -> bool:
        """Whether the weights are others than those of the copy that is read."""
        return self.copy is not None and self.copy.digest != self._source.digest()

    def _find(self, source: Source, seconds: Callable[[], float]) -> None:
        large = sum(p.nbytes for p in source.weights.parameters) >= LEAST_BYTES
        asked = self.form is WeightForm.PACKED
        own, copied = [] if asked else OWN, self._copied(source) if large or asked else []
        timed = partial(self._timed, source, seconds)
        self._use(source, choose_reading(own, copied, timed) if large else [*own, *copied][0])
        logger.info("for a single row, weights are read %s", self.reading)
        if not self.reading.copied:
            self.copy = None

    def _copied(self, source: Source) -> list[Reading]:
        """Copies the weights into fewer bits; returns the ways to read them, none if there is no copy."""
        if self.form is WeightForm.PLAIN:
            return []
        asked = self.form is WeightForm.PACKED
        try:
            self.copy = copy_weights(source, rows=1 if asked else self._rows, share=SHARE[self.form])
        except NoCopyError:
            if asked:
                raise
            return []
        return [Reading(True, distance) for distance in (DISTANCES if self.copy.narrow else PACKED_DISTANCES)]

    def _timed(self, source: Source, seconds: Callable[[], float], reading: Reading) -> float:
        self._use(source, reading)
        return seconds()

    def _use(self, source: Source, reading: Reading) -> None:
        self.reading, source.model.far = reading, reading.distance
        if self.copy is not None:
            self.copy.show_to(source.matrices, shown=reading.copied)


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
