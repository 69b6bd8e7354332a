"""How a step is run: as it is, compiled, or as a CUDA graph for each size of the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hcot_lmeval.engine.slots import upload

logger = logging.getLogger(__name__)

SMALL = (1, 2, 4, 8)
EVERY = 16
"""Sizes of batches: the small ones, then every 16th."""
WARM_UP = 3
"""Runs before a capture: kernels are compiled and chosen, and libraries take their memory."""
PROGRAMS = 64
"""Compiled forms of a step that may live side by side: one for each size of the batch, of several engines."""


def bucket(rows: int) -> int:
    """The size of the batch that serves so many rows."""
    return next((size for size in SMALL if size >= rows), -(-rows // EVERY) * EVERY)


class Runner:
    """Runs a step over rows of a batch, padded to the next size with a row that never runs.

    A graph is captured when its size is needed for the first time and no other serves that is less than twice as
    large: padding costs little, a capture several steps. A batch begins full and empties, so the largest comes first
    and the others share its memory.

    Args:
        step: works on rows, int64 [size], and keeps everything else in memory that does not move.
        most: rows of the largest batch.
        padding: the row that never runs.
        device: where the rows are.
        counter: what each run changes even if no row runs; warming up leaves it as it was.
        graphs: capture graphs.
        compiled: compile the step first, in one piece.
        backend: who compiles.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor], None],
        most: int,
        padding: int,
        device: torch.device,
        *,
        counter: torch.Tensor,
        graphs: bool,
        compiled: bool = False,
        backend: str = "inductor",
    ) -> None:
        self._step = torch.compile(step, fullgraph=True, dynamic=False, backend=backend) if compiled else step
        self._rows = torch.full((bucket(most),), padding, dtype=torch.int64, device=device)
        self._padding, self.size, self._capture, self._counter = padding, 0, graphs, counter
        self._compiled = compiled
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._memory: Any = None  # what the graphs share
        self._aside: Any = None  # the stream on which they are captured

    @property
    def captured(self) -> tuple[int, ...]:
        """Sizes that have a graph."""
        return tuple(self._graphs)

    def load(self, rows: Sequence[int]) -> None:
        """The next runs are over `rows`; takes effect in the order of the stream."""
        self.size = self._choose(bucket(len(rows)))
        padded = [*rows, *[self._padding] * (self.size - len(rows))]
        self._rows[: self.size].copy_(upload(padded, torch.int64, self._rows.device), non_blocking=True)

    def _choose(self, size: int) -> int:
        return min((known for known in self._graphs if size <= known < 2 * size), default=size)

    def run(self) -> None:
        """One step."""
        if self._capture and self.size not in self._graphs:
            self.capture()
        if self._capture:
            self._graphs[self.size].replay()
        else:
            self._call(self._rows[: self.size])

    def _call(self, rows: torch.Tensor) -> None:
        """The step, kernel by kernel."""
        if not self._compiled:
            self._step(rows)
            return
        from torch._dynamo import config

        with config.patch(recompile_limit=PROGRAMS):  # beyond the 8 of PyTorch a step in one piece would be refused
            self._step(rows)

    def capture(self) -> None:
        """Captures a graph for the size of the batch; if that fails, steps run kernel by kernel from now on."""
        rows = self._rows[: self.size]
        loaded, count = rows.clone(), self._counter.clone()
        try:
            rows.fill_(self._padding)  # warming up and capturing must not move a row
            self._graphs[self.size] = self.record(rows)
        except Exception as error:  # of any library that takes part
            logger.warning("no CUDA graphs, steps run one kernel at a time: a batch of %d: %s", self.size, error)
            self._capture = False
            self._graphs.clear()
        finally:
            rows.copy_(loaded)
            self._counter.copy_(count)

    def record(self, rows: torch.Tensor) -> torch.cuda.CUDAGraph:
        """Returns a graph of the step over these rows, after some runs to warm up."""
        self._aside = self._aside or torch.cuda.Stream(rows.device)
        with beside(self._aside):
            for _ in range(WARM_UP - 1):
                self._call(rows)
            with no_waiting():
                self._call(rows)
        graph = torch.cuda.CUDAGraph()
        # a capture that fails does not leave its stream; the outer context does
        with (
            torch.cuda.stream(torch.cuda.current_stream(rows.device)),
            torch.cuda.graph(graph, pool=self._memory, stream=self._aside, capture_error_mode="thread_local"),
        ):
            self._call(rows)
        self._memory = self._memory or graph.pool()
        return graph


@contextmanager
def beside(stream: torch.cuda.Stream) -> Iterator[None]:
    """What is queued while it is open comes after what was queued before and before what is queued later."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def no_waiting() -> Iterator[None]:
    """While it is open, an operation for which the host would wait raises.

    In a capture it would raise too, but leave PyTorch's random numbers on the device unusable.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
