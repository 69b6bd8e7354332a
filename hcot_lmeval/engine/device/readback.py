"""What the device emitted, on its way to the host while the device goes on."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch


@dataclass
class _Copy:
    lines: torch.Tensor
    first: int
    count: int
    done: torch.cuda.Event | None


class Readback:
    """Copies a log to the host on a stream of its own.

    Args:
        emitted: int64 [lines, slots]; step n writes line n modulo lines.
    """

    def __init__(self, emitted: torch.Tensor) -> None:
        self._emitted = emitted
        self._copies: deque[_Copy] = deque()
        self._stream = torch.cuda.Stream(emitted.device) if emitted.device.type == "cuda" else None

    def start(self, first: int, count: int) -> None:
        """Asks for the lines of the steps [first, first + count), whose kernels are queued."""
        if self._stream is None:
            self._copies.append(_Copy(self._emitted.clone(), first, count, None))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._emitted.device))
        lines = torch.empty(self._emitted.shape, dtype=self._emitted.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            lines.copy_(self._emitted, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._emitted.record_stream(self._stream)
        self._copies.append(_Copy(lines, first, count, done))

    def finished(self, behind: int) -> list[list[int]]:
        """Waits for all lines asked for but those of the last `behind` requests, and returns them, each once."""
        found: list[list[int]] = []
        while len(self._copies) > behind:
            copy = self._copies.popleft()
            if copy.done is not None:
                copy.done.synchronize()
            table, lines = copy.lines.tolist(), len(copy.lines)
            found += [table[step % lines] for step in range(copy.first, copy.first + copy.count)]
        return found
