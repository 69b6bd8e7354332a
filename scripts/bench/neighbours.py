"""Who else used the processors while figures were taken; these hold on a machine that does nothing else."""

from __future__ import annotations

import time

import psutil

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Kinds of time in which a processor is not free; `steal` is what a virtual machine's host took."""

TOLERABLE = 0.05
"""Cores, of each, that others may use before it is worth a word; an idle system uses about a hundredth."""


class Neighbours:
    """Counts the processors' time that was used by neither this process nor its children, from its making on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._others, self._time = self._read(), time.perf_counter()

    def _read(self) -> float:
        everyone = psutil.cpu_times()
        own = self._process.cpu_times()
        return sum(getattr(everyone, kind, 0.0) for kind in BUSY) - sum(own[:4])

    def cores(self) -> float:
        """Returns how many cores others kept busy on average."""
        return max(0.0, self._read() - self._others) / max(time.perf_counter() - self._time, 1e-9)

    def warning(self) -> str:
        """Returns what to say if that was much, else an empty text."""
        used, cores = self.cores(), psutil.cpu_count() or 1
        if used <= TOLERABLE * cores:
            return ""
        return (
            f"warning: others used {used:.1f} of {cores} cores meanwhile. Steps wait for their slowest thread, so times"
            " are too long and ratios off: measure again when nothing else runs."
        )
