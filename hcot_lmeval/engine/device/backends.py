"""Who attends on the device: one signature, several kernels, each proven on numbers before it is used.

All of them read keys and values in place from slots [slots, length, heads, dim], in any order of slots, and touch
nothing outside the given spans (it may be NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from hcot_lmeval.engine.attention import attend
from hcot_lmeval.engine.device.fields import upload


class UnavailableError(RuntimeError):
    """This machine, or the installed release, lacks a backend; the message says what is missing."""


class Need(NamedTuple):
    """What one attention layer asks of a backend. `stored` is the dtype of the slots, None for that of the queries."""

    query_heads: int
    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    stored: torch.dtype | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether keys and values have another dtype than queries."""
        return self.stored not in (None, self.dtype)


class Scores(NamedTuple):
    """How scores are made: `scaling` is their factor; see `device_attention` for the others."""

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


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

    slots: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    used: torch.Tensor
    starts: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, slots: torch.Tensor, first: torch.Tensor, lengths: torch.Tensor, places: int) -> Ragged:
        """Made once for all layers: `slots`, `first` and `lengths` are int64 [rows], slots have so many `places`."""
        offsets = torch.arange(len(slots) + 1, device=slots.device, dtype=torch.int32)
        starts = F.pad(slots * places + first, (0, 1))
        return cls(slots.int(), first.int(), lengths.int(), (lengths - first).int(), starts.int(), offsets)


@dataclass(frozen=True)
class Segments:
    """Pieces of packed tokens, each behind the tokens that its slot holds already.

    Attributes:
        parts: (slot, tokens before the piece, tokens of the piece) of each.
        slots: int64 [segments].
        offsets: where each piece begins among the packed tokens, and their number: int32 [segments + 1].
        lengths: tokens of each slot, the piece included: int32 [segments].
    """

    parts: Sequence[tuple[int, int, int]]
    slots: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[int, int, int]], device: torch.device) -> Segments:
        """The segments with these parts."""
        offsets = [0]
        for _, _, count in parts:
            offsets.append(offsets[-1] + count)
        return cls(
            parts,
            upload([slot for slot, _, _ in parts], torch.int64, device),
            upload(offsets, torch.int32, device),
            upload([start + count for _, start, count in parts], torch.int32, device),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return max(count for _, _, count in self.parts)


class Backend(Protocol):
    """A kernel for ragged rows."""

    name: str

    def refuses(self, need: Need) -> str:
        """Why it cannot serve such a layer; empty if it can."""

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: Ragged, scores: Scores
    ) -> torch.Tensor:
        """One query a row.

        Args:
            query: [rows, query_heads, key_dim].
            keys: [slots, length, heads, key_dim].
            values: [slots, length, heads, value_dim].
            at: what each row sees.
            scores: how scores are made.

        Returns:
            [rows, query_heads, value_dim].
        """

    def chunk(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: Segments,
        window: int | None,
        scores: Scores,
    ) -> torch.Tensor:
        """Packed queries [tokens, query_heads, key_dim], each of which sees its own place and those before it.

        `window` counts places. Returns [tokens, query_heads, value_dim].
        """


class Masked:
    """Plain PyTorch with a mask: reads every slot to its end, runs anywhere, and can do everything."""

    name = "sdpa"

    def refuses(self, need: Need) -> str:
        return ""

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: Ragged, scores: Scores
    ) -> torch.Tensor:
        """See `Backend.decode`. The query heads of a key head are folded into the query axis."""
        rows, query_heads, dim = query.shape
        heads, places = keys.shape[2], torch.arange(keys.shape[1], device=keys.device)
        seen = (places >= at.first[:, None]) & (places < at.lengths[:, None])
        # what is out of sight may be NaN, and 0 * NaN is NaN
        key = torch.where(seen[..., None, None], _taken(keys, at.slots, query.dtype), 0).transpose(1, 2)
        value = torch.where(seen[..., None, None], _taken(values, at.slots, query.dtype), 0).transpose(1, 2)
        folded, mask = query.view(rows, heads, query_heads // heads, dim), seen[:, None, None]
        if scores.softcap is None and scores.sinks is None:
            out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scores.scaling)
        else:
            out = _explicit(folded, key, value, mask, scores)
        return out.reshape(rows, query_heads, value.shape[-1])

    def chunk(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: Segments,
        window: int | None,
        scores: Scores,
    ) -> torch.Tensor:
        """See `Backend.chunk`: segment by segment, as in `hcot_lmeval.engine.attention`."""
        out, first = [], 0
        for slot, start, count in segments.parts:
            seen = 0 if window is None else max(0, start + 1 - window)
            key, value = (x[slot, seen : start + count].to(query.dtype) for x in (keys, values))
            piece = query[first : first + count].transpose(0, 1)
            mask = _causal(seen, start, count, window, query.device)
            settings = {"scaling": scores.scaling, "softcap": scores.softcap, "sinks": scores.sinks}
            out.append(attend(piece, key.transpose(0, 1), value.transpose(0, 1), mask, **settings))  # type: ignore[arg-type]
            first += count
        return torch.cat(out, dim=1).transpose(0, 1)


def _taken(slots: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Some of the slots in a dtype; types of one byte, which few operations know, are moved as bytes."""
    if slots.dtype.itemsize == 1:
        return slots.view(torch.uint8)[chosen].view(slots.dtype).to(dtype)
    return slots[chosen].to(dtype)


def _causal(seen: int, start: int, count: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    if count == 1:
        return None
    keys = torch.arange(seen, start + count, device=device)
    queries = torch.arange(start, start + count, device=device)[:, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def _explicit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Attention in the open. Query, key and value are [rows, heads, *, dim], the mask [rows, 1, 1, keys]."""
    raw = (query @ key.mT) * scores.scaling
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    raw = raw.masked_fill(~mask, float("-inf"))
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if scores.sinks is not None:
        sinks = scores.sinks.view(1, *query.shape[1:3], 1).expand(*raw.shape[:3], 1)
        raw = torch.cat([raw, sinks.to(raw.dtype)], dim=-1)
    weights = torch.softmax(raw, dim=-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
