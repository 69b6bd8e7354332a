"""How much memory something takes at most."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

MIB = 2**20


class PeakMemory:
    """The largest memory in use since it was made, beyond what was in use then.

    On the CPU it is the resident memory of the process, read from Linux; on CUDA what torch has allocated.

    Args:
        device: a `torch.device`.
    """

    def __init__(self, device: Any) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._start = self._settle()

    def forget(self) -> None:
        """Leaves out what was taken and given back until now."""
        self._settle()

    def mib(self) -> float | None:
        """Returns the growth in MiB, None where the system does not tell."""
        if self._start is None:
            return None
        return (self._peak() - self._start) / MIB

    def _settle(self) -> int | None:
        """Gives free memory back, sets the peak to what is in use, and returns that in bytes."""
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
