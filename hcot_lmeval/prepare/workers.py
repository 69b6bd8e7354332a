"""Work on many items in order, in this process or in several, with few items in memory at a time.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
CHUNK = 8
"""Items that a process is given at once."""
AHEAD = 3
"""Chunks for each process that are in work or waiting."""


def in_order(
    items: Iterable[Item], make: Callable[[], Callable[[Item], Result]], workers: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Yields every item with its result, in the order of the items.

    Args:
        items: read no further ahead than the processes need.
        make: makes the function that works on an item; called once in each process, so that what it holds is loaded
            there. With several processes it is pickled, and so are items and results.
        workers: processes; 1 is this one.
    """
    if workers <= 1:
        work = make()
        yield from ((item, work(item)) for item in items)
        return
    yield from _in_processes(iter(items), make, workers)


def _in_processes(
    items: Iterator[Item], make: Callable[[], Callable[[Item], Result]], workers: int
) -> Iterator[tuple[Item, Result]]:
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    waiting: deque[tuple[list[Item], Future[list[Result]]]] = deque()
    context = multiprocessing.get_context("spawn")  # safe beside threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(make,))
    try:
        while True:
            while len(waiting) < AHEAD * workers and (chunk := list(islice(items, CHUNK))):
                waiting.append((chunk, pool.submit(_work_on, chunk)))
            if not waiting:
                return
            done, future = waiting.popleft()
            yield from zip(done, future.result(), strict=True)
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process has died, perhaps for want of memory; start the same command again, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_make: Callable[[], Callable[[Any], Any]] | None = None
_work: Callable[[Any], Any] | None = None


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    global _make
    _make = make  # called with the first chunk: an error there reaches the parent, one here would not


def _work_on(chunk: list[Any]) -> list[Any]:
    global _work
    assert _make is not None, "a process works before it has started"
    _work = _work or _make()
    return [_work(item) for item in chunk]
