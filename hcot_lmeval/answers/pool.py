"""Worker processes that compare answers, kept between checks, killed at a time limit.

A worker is a fresh interpreter (no fork, and not multiprocessing's spawn, which runs the caller's main module again),
so it is safe beside threads, CUDA, pytest and torchrun. Workers start when first needed and end with this process.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

SECONDS = 5.0  # for one check; a symbolic comparison of real answers takes 0.01 to 1 s
START_SECONDS = 120.0  # importing sympy takes about 1 s, on a loaded machine far longer
SPARE_SECONDS = 0.5  # a check that takes longer may end at its limit: the next worker is started beside it
MEMORY_BYTES = 2 << 30  # address space of one worker; it starts with 0.1 GiB
CACHE_ENTRIES = 20_000
_ROOT = str(Path(__file__).resolve().parents[2])


class Worker:
    """One process. Not thread-safe: the pool hands it to one check at a time."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hcot_lmeval.answers.worker", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        self._buffer = b""
        self._ready = False

    def wait(self) -> None:
        """Waits until the process has imported its libraries.

        Raises:
            RuntimeError: it could not.
        """
        if self._ready:
            return
        reply = self._receive(START_SECONDS)
        if reply is None or reply["status"] != "ready":
            self.kill()
            detail = (reply or {}).get("detail", "it ended or hung while it imported its libraries")
            raise RuntimeError(
                f"the answer checker's worker process could not start: {detail}. "
                "Answers are compared with math-verify: pip install 'math-verify[antlr4_11_0]'."
            )
        self._ready = True

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def check(
        self, gold: str, answer: str, seconds: float, late: Callable[[], None] = lambda: None
    ) -> dict[str, object]:
        """Returns the worker's reply; status "timeout" or "worker_died" when there is none, after which it is dead.

        `late` is called when there is no reply after `SPARE_SECONDS`.
        """
        self.wait()
        request = json.dumps({"gold": gold, "answer": answer, "seconds": seconds}) + "\n"
        started = time.monotonic()
        try:
            self._process.stdin.write(request.encode())  # type: ignore[union-attr]
        except OSError:
            self.kill()
            return {"status": "worker_died"}
        reply = self._receive(min(SPARE_SECONDS, seconds))
        if reply is None and self.alive:
            late()
            reply = self._receive(started + seconds - time.monotonic())
        if reply is None:
            self.kill()
            return {"status": "timeout" if time.monotonic() - started >= seconds else "worker_died"}
        if reply["status"] == "memory":
            self.kill()
        return reply

    def _receive(self, seconds: float) -> dict[str, object] | None:
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds  # type: ignore[union-attr]
        poller = select.poll()  # not select(), which fails on descriptors above 1023
        poller.register(pipe, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and reaps it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Pool:
    """Up to `size` workers and a memory of what was compared. Thread-safe; a forked child starts with an empty one."""

    def __init__(self, size: int | None = None) -> None:
        self._size = size or min(4, os.cpu_count() or 1)
        self._idle: list[Worker] = []
        self._slots = threading.BoundedSemaphore(self._size)
        self._lock = threading.Lock()
        self._seen: OrderedDict[tuple[str, str, float], dict[str, object]] = OrderedDict()

    def check(self, gold: str, answer: str, seconds: float = SECONDS) -> dict[str, object]:
        """Compares two normalized answers within `seconds`.

        Raises:
            RuntimeError: no worker could be started, for example because math-verify is not installed.
        """
        key = (gold, answer, seconds)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return self._seen[key]
        with self._slots:
            reply = self._run(gold, answer, seconds)
        if reply["status"] != "worker_died":  # somebody else's doing: the next attempt may succeed
            with self._lock:
                self._seen[key] = reply
                if len(self._seen) > CACHE_ENTRIES:
                    self._seen.popitem(last=False)
        return reply

    def _run(self, gold: str, answer: str, seconds: float) -> dict[str, object]:
        worker = self._take() or Worker()
        reply = worker.check(gold, answer, seconds, self._spare)
        if reply["status"] == "worker_died":  # perhaps killed while idle: once more, with a fresh one
            worker = Worker()
            reply = worker.check(gold, answer, seconds, self._spare)
        if worker.alive:
            with self._lock:
                self._idle.append(worker)
        return reply

    def _spare(self) -> None:
        """Starts a worker ahead of need, without waiting for it, so that a check behind a killed one does not wait."""
        with self._lock:
            if not self._idle:
                self._idle.append(Worker())

    def _take(self) -> Worker | None:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                worker.kill()
        return None

    def pids(self) -> list[int]:
        """Process ids of the idle workers."""
        with self._lock:
            return [worker.pid for worker in self._idle]

    def close(self) -> None:
        """Ends the idle workers; the pool stays usable."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()


_pool = Pool()


def shared_pool() -> Pool:
    """Returns the pool of this process."""
    return _pool


def _forget() -> None:
    """A forked child must not talk through its parent's pipes, nor wait for its parent's locks."""
    global _pool
    _abandoned.append(_pool)  # kept, so that no destructor touches the parent's workers
    _pool = Pool()


_abandoned: list[Pool] = []
os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _pool.close())
