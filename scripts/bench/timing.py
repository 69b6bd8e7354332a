"""What work takes: its seconds on any device, and of a run of an engine the whole and each of its steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bench.work import Work

if TYPE_CHECKING:
    import torch

WARM_UP = 2
"""Runs before a capture: libraries choose their kernels and take their memory."""


def seconds(work: Callable[[], Any], device: torch.device, *, runs: int) -> float:
    """Returns the median time of some runs; on CUDA what lies between events, not what it takes to queue them."""
    return statistics.median(_on_cuda(work, device) if device.type == "cuda" else _on_host(work) for _ in range(runs))


def _on_host(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _on_cuda(work: Callable[[], Any], device: torch.device) -> float:
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    work()
    stop.record(torch.cuda.current_stream(device))
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000


def as_graph(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Returns what does the work as a CUDA graph, in which no kernel waits for the host; elsewhere `work`."""
    if device.type != "cuda":
        return work
    import torch

    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        work()
    return graph.replay


@dataclass(frozen=True)
class StepTime:
    """One step: from one set of logits to the next.

    Attributes:
        seconds: wall time.
        ordinary: every row decoded one token, and none read anything else.
        prunes: rows that had to restore their context in it, since their last token had ended a block.
    """

    seconds: float
    ordinary: bool
    prunes: int


@dataclass(frozen=True)
class Timing:
    """One run.

    Attributes:
        seconds: wall time, prefill included.
        tokens: what each row generated.
        peak_live: the largest number of tokens whose keys and values one row held or was about to hold.
        steps: in order; the first one, which reads the prompts, is left out. Empty where an engine does not tell.
        mean_step: seconds of the mean step, prune events included, where an engine tells no more.
    """

    seconds: float
    tokens: tuple[tuple[int, ...], ...]
    peak_live: int
    steps: tuple[StepTime, ...] = ()
    mean_step: float | None = None

    @property
    def step(self) -> float | None:
        """Seconds of the median ordinary step; of the mean step where nothing else is known."""
        ordinary = [step.seconds for step in self.steps if step.ordinary]
        return statistics.median(ordinary) if ordinary else self.mean_step

    @property
    def prune(self) -> float | None:
        """Seconds that one prune event adds: what the steps with events took beyond ordinary ones, per event."""
        pruning = [step for step in self.steps if step.prunes]
        if self.step is None or not pruning:
            return None
        extra = sum(step.seconds - self.step for step in pruning)
        return extra / sum(step.prunes for step in pruning)


class StepClock:
    """Notes when a row has the logits of its next token; the work tells which of these steps followed a prune.

    Args:
        work: what is generated.
        prunes: whether the engine does anything at the end of a block.
    """

    def __init__(self, work: Work, *, prunes: bool) -> None:
        self._batch = work.batch
        self._prunes = work.prunes if prunes else (frozenset[int](),) * work.batch
        self._ticks: list[tuple[float, int, int]] = []

    def tick(self, rows: Iterable[int], generated: int, at: float | None = None) -> None:
        """Logits are there for rows that have generated so many tokens: now, or at a time of `time.perf_counter`."""
        now = time.perf_counter() if at is None else at
        self._ticks += [(now, row, generated) for row in rows]

    def steps(self) -> tuple[StepTime, ...]:
        """Returns the steps so far; see `Timing.steps`."""
        groups = list(self._groups())
        return tuple(self._step(after[0] - before[0], after[1]) for before, after in pairwise(groups))

    def _groups(self) -> Iterator[tuple[float, dict[int, int]]]:
        """Yields the time of each step and, for the rows that took part, the tokens they had generated."""
        group: dict[int, int] = {}
        start = 0.0
        for at, row, generated in self._ticks:
            if row in group:
                yield start, group
                group = {}
            if not group:
                start = at
            group[row] = generated
        if group:
            yield start, group

    def _step(self, seconds: float, rows: dict[int, int]) -> StepTime:
        prunes = sum(generated - 1 in self._prunes[row] for row, generated in rows.items())
        whole = len(rows) == self._batch and 0 not in rows.values()
        return StepTime(seconds, whole and not prunes, prunes if whole else 0)
