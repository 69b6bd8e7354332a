"""Attention of a step in which each of many rows decodes one token, from lengths that the host never reads.

`Sdpa` is the backend in plain PyTorch, and says what the others (`choice`, `triton_kernels`) have to do. All read keys
and values in place, from slots in any order, and touch nothing outside the given spans (it may be NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from hcot_lmeval.engine.attention import LayerCall, Scores, Segments, attend, attend_segments
from hcot_lmeval.engine.device.state import Feed
from hcot_lmeval.engine.slots import KVPool, LayerSpec, write_rows


class UnavailableError(RuntimeError):
    """This machine, or the installed release, lacks a backend; the message says what is missing."""


class Ragged(NamedTuple):
    """Which span of which slot the only query of each row sees, in the forms in which kernels ask for it; all int32.

    Attributes:
        slots: [rows].
        first: the first place in sight, [rows].
        lengths: places in the slot, [rows]; those in [first, lengths) are in sight.
        used: places in sight, [rows].
        starts: the first place in sight, flattened over slots; one more follows, which nobody reads: [rows + 1].
        offsets: 0, 1, ... [rows + 1].
    """

    slots: Tensor
    first: Tensor
    lengths: Tensor
    used: Tensor
    starts: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, slots: Tensor, first: Tensor, lengths: Tensor, places: int) -> Ragged:
        """Made once for all layers: `slots`, `first` and `lengths` are int64 [rows], slots have so many `places`."""
        offsets = torch.arange(len(slots) + 1, device=slots.device, dtype=torch.int32)
        starts = F.pad(slots * places + first, (0, 1))
        return cls(slots.int(), first.int(), lengths.int(), (lengths - first).int(), starts.int(), offsets)


class Sdpa:
    """Plain PyTorch with a mask: reads every slot to its end, runs anywhere, and serves every layer."""

    name = "sdpa"

    def refuses(self, layer: LayerSpec) -> str:
        """Why it cannot serve such a layer; empty if it can."""
        return ""

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, at: Ragged, scores: Scores) -> Tensor:
        """One query a row.

        Args:
            query: [rows, query_heads, key_dim].
            keys: [slots, length, heads, key_dim].
            values: [slots, length, heads, value_dim].
            at: what each row sees, its window included.
            scores: how scores are made.

        Returns:
            [rows, query_heads, value_dim].
        """
        places = torch.arange(keys.shape[1], device=keys.device)
        seen = (places >= at.first[:, None]) & (places < at.lengths[:, None])
        # what is out of sight may be NaN, and 0 * NaN is NaN
        key, value = (
            torch.where(seen[..., None, None], _taken(slots, at.slots, query.dtype), 0).transpose(1, 2)
            for slots in (keys, values)
        )
        return attend(query[:, :, None], key, value, seen[:, None, None], scores)[:, :, 0]

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, segments: Segments, scores: Scores) -> Tensor:
        """Packed queries; see `hcot_lmeval.engine.attention.attend_segments`. Positions are places."""
        return attend_segments(query, keys, values, segments, scores)


def _taken(slots: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Some of the slots in a dtype; types of one byte, which few operations know, are moved as bytes."""
    if slots.dtype.itemsize == 1:
        return slots.view(torch.uint8)[chosen].view(slots.dtype).to(dtype)
    return slots[chosen].to(dtype)


@dataclass
class Decode:
    """A step of one token a row.

    Attributes:
        feed: where its keys and values go.
        pool: the slots.
        backend: who attends; its `handle_of`.
        positions: position ids of all places of all rows, int64 [rows, places], where windows are measured in them;
            None where the position of a token is its place.
    """

    feed: Feed
    pool: KVPool
    backend: str
    positions: Tensor | None = None
    _ragged: dict[int | None, Ragged] = field(default_factory=dict)

    def __call__(self, call: LayerCall) -> Tensor:
        """Query, key and value are [rows, heads, 1, dim]; returns [rows, 1, query_heads, value_dim]."""
        query, key, value = (part[:, :, 0] for part in (call.query, call.key, call.value))
        keys, values = self.pool.keys[call.layer], self.pool.values[call.layer]
        rows, at = self.feed.slots * self.pool.length + self.feed.places, self.ragged(call.scores.window)
        scaling, softcap, sinks, _ = call.scores
        write_and_attend = decode_as_one if torch.compiler.is_compiling() else decode
        out = write_and_attend(query, key, value, keys, values, rows, at, sinks, scaling, softcap, self.backend)
        return out[:, None]

    def ragged(self, window: int | None) -> Ragged:
        """What each row sees through a sliding window."""
        if window not in self._ragged:
            first = self.feed.first if window is None else torch.maximum(self.feed.first, self._first(window))
            self._ragged[window] = Ragged.of(self.feed.slots, first, self.feed.places + 1, self.pool.length)
        return self._ragged[window]

    def _first(self, window: int) -> Tensor:
        hidden = self.feed.positions - window  # the youngest position that is out of sight
        if self.positions is None:
            return hidden + 1
        table = self.positions[self.feed.rows]
        held = torch.arange(table.shape[1], device=table.device) < self.feed.places[:, None]
        return ((table <= hidden[:, None]) & held).sum(1)


_BACKENDS: WeakValueDictionary[str, Sdpa] = WeakValueDictionary()


def handle_of(backend: Sdpa) -> str:
    """What `decode` knows a backend by, for as long as there is that backend: operators take no objects."""
    handle = f"{backend.name} {id(backend):x}"
    _BACKENDS[handle] = backend
    return handle


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    at: Sequence[Tensor],
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    backend: str,
) -> Tensor:
    """Stores a key and a value of each row, [rows, heads, dim], at `rows` of the flattened slots, and attends.

    Tensors and numbers alone, since it is an operator too: `at` has the fields of a `Ragged`, the others those of
    `Scores`. The rest, and what it returns, is as in `Sdpa.decode`.
    """
    write_rows(keys, rows, key)
    write_rows(values, rows, value)
    return _BACKENDS[backend].decode(query, keys, values, Ragged(*at), Scores(scaling, softcap, sinks))


decode_as_one = torch.library.custom_op("hcot_lmeval::decode", decode, mutates_args=("keys", "values"))
"""`decode` as an operator, into which `torch.compile` does not look; without a compiler it costs more than `decode`.

A compiler that sees slots written through a view of them may not dare to write in place: torch 2.11 copies those of
every layer in every step (`can_inplace` in `torch._inductor.fx_passes.reinplace`). An operator tells it what changes.
"""


@decode_as_one.register_fake
def _shape(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])
