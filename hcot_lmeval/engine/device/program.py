"""One step of all rows, from the token that each forwards to the token that each emits, without the host.

What the rows emit is written to a log in the device's memory, which the host copies while the device goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.attention import Decode, Sdpa, handle_of
from hcot_lmeval.engine.device.sampling import Sampler
from hcot_lmeval.engine.device.state import NOTHING, State, on
from hcot_lmeval.engine.slots import KVPool, LayerSpec


class ScratchPool(KVPool):
    """A pool whose slots have one place more than a row may use: rows that do not run write there."""

    def __init__(self, layers: Mapping[int, LayerSpec], slots: int, length: int, **options: bool) -> None:
        super().__init__(layers, slots, length + 1, **options)


class _Copy(NamedTuple):
    """The log as it was when steps [first, first + steps) had written it; `done` is None if it is there already."""

    lines: torch.Tensor
    first: int
    steps: int
    done: torch.cuda.Event | None


class Log:
    """What every slot emitted in the last steps; the host copies it on a stream of its own.

    Args:
        lines: steps that it holds; step n writes line n modulo lines.
        slots: slots, and one for padding.
        device: where it lies.

    Attributes:
        emitted: int64 [lines, slots]: a token, `NOTHING` or `ENDED`; what a slot that took no part holds is `NOTHING`.
        tick: steps so far, int64 [1].
    """

    def __init__(self, lines: int, slots: int, device: torch.device) -> None:
        self.lines = lines
        self.emitted = torch.full((lines, slots), NOTHING, dtype=torch.int64, device=device)
        self.tick = torch.zeros(1, dtype=torch.int64, device=device)
        self._copies: deque[_Copy] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, rows: torch.Tensor, emitted: torch.Tensor) -> None:
        """Adds a line: `rows` and what they emitted, int64 [n]."""
        line = self.tick % self.lines
        self.emitted.index_fill_(0, line, NOTHING)
        self.emitted[line.expand_as(rows), rows] = emitted
        self.tick.add_(1)

    def copy(self, first: int, count: int) -> None:
        """Asks for the lines of the steps [first, first + count), whose kernels are queued."""
        if self._stream is None:
            self._copies.append(_Copy(self.emitted.clone(), first, count, None))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.emitted.device))
        lines = torch.empty(self.emitted.shape, dtype=self.emitted.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            lines.copy_(self.emitted, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self.emitted.record_stream(self._stream)
        self._copies.append(_Copy(lines, first, count, done))

    def read(self, behind: int) -> list[list[int]]:
        """Waits for all lines asked for but those of the last `behind` copies, and returns them, each once."""
        found: list[list[int]] = []
        while len(self._copies) > behind:
            copy = self._copies.popleft()
            if copy.done is not None:
                copy.done.synchronize()
            table = copy.lines.tolist()
            found += [table[step % self.lines] for step in range(copy.first, copy.first + copy.steps)]
        return found


@dataclass
class Program:
    """A model, its keys and values, and the state of their rows; all in memory that never moves.

    Attributes:
        decoder: the model.
        pool: its keys and values.
        state: of the rows.
        sampler: chooses tokens.
        backend: attends.
        log: what was emitted.
    """

    decoder: Decoder
    pool: KVPool
    state: State
    sampler: Sampler
    backend: Sdpa
    log: Log

    def __post_init__(self) -> None:
        self._handle = handle_of(self.backend)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has to be open while the program runs."""
        with on(self.state.device), self.decoder.attached():
            yield

    @torch.no_grad()
    def step(self, rows: torch.Tensor) -> None:
        """Forwards one token of each of `rows`, int64 [n], and samples what follows. To be called within `attached`."""
        self.offer(rows, self.logits(rows))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Forwards one token of each of `rows` and returns what predicts the next: [n, vocabulary]."""
        feed, decoder = self.state.feed(rows), self.decoder
        decoder.running.step = Decode(feed, self.pool, self._handle, self.state.positions)
        return decoder.call(feed.tokens[:, None], feed.positions[:, None])[:, 0]

    def offer(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Samples for `rows` from the logits of what was forwarded last, [n, vocabulary], and writes the log."""
        tokens = self.sampler.choose(self.state, rows, logits)
        self.log.write(rows, self.state.advance(rows, tokens))
