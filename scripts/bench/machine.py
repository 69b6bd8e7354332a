"""What the figures depend on besides the code: memory, and who else used the processors."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

import psutil

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
"""Kinds of time in which a processor is not free; `steal` is what a virtual machine's host took."""
TOLERABLE = 0.05
"""Cores, of each, that others may use before it is worth a warning; an idle system uses about a hundredth."""


class OtherLoad:
    """Counts the processors' time that was used by neither this process nor its children, from its making on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._others, self._time = self._read(), time.perf_counter()

    def _read(self) -> float:
        everyone, own = psutil.cpu_times(), self._process.cpu_times()
        return sum(getattr(everyone, kind, 0.0) for kind in BUSY) - sum(own[:4])

    def cores(self) -> float:
        """Returns how many cores others kept busy on average."""
        return max(0.0, self._read() - self._others) / max(time.perf_counter() - self._time, 1e-9)

    def warning(self) -> str:
        """Returns a warning if that was much, else an empty text."""
        used, cores = self.cores(), psutil.cpu_count() or 1
        if used <= TOLERABLE * cores:
            return ""
        return (
            f"warning: others used {used:.1f} of {cores} cores meanwhile. Steps wait for their slowest thread, so times"
            " are too long and ratios off: measure again when nothing else runs."
        )


class PeakMemory:
    """The largest memory in use since it was made, beyond what was in use then.

    On the CPU it is the resident memory of the process, read from Linux; on CUDA what torch has allocated.

    Args:
        device: a `torch.device`.
    """

    def __init__(self, device: Any) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._start = self.forget()

    def mib(self) -> float | None:
        """Returns the growth in MiB, None where the system does not tell."""
        return None if self._start is None else (self._peak() - self._start) / 2**20

    def forget(self) -> int | None:
        """Leaves out what was taken and given back until now. Returns the bytes in use."""
        gc.collect()
        if self._cuda is not None:
            import torch

            torch.cuda.reset_peak_memory_stats(self._cuda)
            return int(torch.cuda.memory_allocated(self._cuda))
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5): the peak is now the present value
            return _status("VmRSS")
        except (OSError, AttributeError):  # not Linux, or not glibc
            return None

    def _peak(self) -> int:
        if self._cuda is not None:
            import torch

            return int(torch.cuda.max_memory_allocated(self._cuda))
        return _status("VmHWM")


def _status(name: str) -> int:
    """A line of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {name}")
