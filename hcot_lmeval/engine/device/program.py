"""One step of all rows, from the token that each forwards to the token that each emits, without the host."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.attention import Context, Decode, Packed
from hcot_lmeval.engine.device.backends import Backend
from hcot_lmeval.engine.device.fields import NOTHING, upload
from hcot_lmeval.engine.device.sampling import Sampler
from hcot_lmeval.engine.device.state import State
from hcot_lmeval.engine.slots import Chunk, KVPool, LayerShape


class ScratchPool(KVPool):
    """A pool whose slots have one place more than a row may use: rows that do not run write there."""

    def __init__(self, layers: Mapping[int, LayerShape], slots: int, length: int, **options: bool) -> None:
        super().__init__(layers, slots, length + 1, **options)


class Log:
    """What every slot emitted in the last steps.

    Args:
        lines: steps that it holds.
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

    def write(self, rows: torch.Tensor, emitted: torch.Tensor) -> None:
        """Adds a line: `rows` and what they emitted, int64 [n]."""
        line = self.tick % self.lines
        self.emitted.index_fill_(0, line, NOTHING)
        self.emitted[line.expand_as(rows), rows] = emitted
        self.tick.add_(1)


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
    backend: Backend
    log: Log

    def __post_init__(self) -> None:
        self.context = Context(self.pool, self.backend, self.decoder.windows)
        self._selects = "logits_to_keep" in inspect.signature(self.decoder.model.forward).parameters

    @torch.no_grad()
    def step(self, rows: torch.Tensor) -> None:
        """Forwards one token of each of `rows`, int64 [n], and samples what follows. To be called within `attached`."""
        self.offer(rows, self.logits(rows))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Forwards one token of each of `rows` and returns what predicts the next: [n, vocabulary]."""
        feed = self.state.feed(rows)
        self.context.step = Decode(feed, self.pool.length, self.state.positions)
        return self._call(feed.tokens[:, None], feed.positions[:, None])[:, 0]

    def offer(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Samples for `rows` from the logits of what was forwarded last, [n, vocabulary], and writes the log."""
        tokens = self.sampler.choose(self.state, rows, logits)
        self.log.write(rows, self.state.advance(rows, tokens))

    @torch.no_grad()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Forwards prompts and solutions whose tokens the host knows. To be called within `attached`.

        Returns:
            The logits after the last token of each chunk: [chunks, vocabulary].
        """
        device = self.state.device
        self.context.step = packed = Packed.of(chunks, self.pool.length, device)
        ids = upload([token for chunk in chunks for token in chunk.ids], torch.int64, device)
        positions = upload([p for chunk in chunks for p in chunk.positions[chunk.start :]], torch.int64, device)
        last = packed.segments.offsets[1:].long() - 1
        if self._selects:
            return self._call(ids[None], positions[None], logits_to_keep=last)[0]
        return self._call(ids[None], positions[None])[0, last]

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, **select: torch.Tensor) -> torch.Tensor:
        output = self.decoder.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=None,
            use_cache=False,
            **select,
        )
        logits: torch.Tensor = output.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
