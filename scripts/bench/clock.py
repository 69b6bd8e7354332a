"""Seconds of work that is done many times, on any device, without the time in which the host asks for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], Any]

WARM_UP = 2
"""Runs before a capture: libraries choose their kernels and take their memory."""


def seconds(work: Work, device: torch.device, *, runs: int) -> float:
    """Returns the median time of some runs; on CUDA what lies between events, not what it takes to queue them."""
    return statistics.median(_on_cuda(work, device) if device.type == "cuda" else _on_host(work) for _ in range(runs))


def _on_host(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _on_cuda(work: Work, device: torch.device) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(torch.cuda.current_stream(device))
    work()
    stop.record(torch.cuda.current_stream(device))
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1000


def as_graph(work: Work, device: torch.device) -> Work:
    """Returns what does the work as a CUDA graph, in which no kernel waits for the host; elsewhere `work`."""
    if device.type != "cuda":
        return work
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
