"""Attention over the slots of a `KVPool`, called by Hugging Face models through their attention registry.

All tokens of a step, whatever row they belong to, are packed into one sequence, chunk behind chunk (`Segments`). So
rows of different length and progress share one forward without padding and without a mask: `Packed` writes the new keys
and values to the pool and attends, row by row, over exactly what is live.

The model itself is called with ``attention_mask=None, use_cache=False``. Its layers find the running step in an object
that they carry while a decoder is attached: some model families do not hand keyword arguments down to their attention,
and `torch.compile` cannot trace a context variable.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.engine.slots import Chunk, KVPool, upload

IMPLEMENTATION = "hcot_slots"
"""The name under which the registry knows `attention`."""
RUNNING = "hcot_step"
"""The attribute of attention layers that holds a `Running`."""


class Scores(NamedTuple):
    """How a layer scores its keys.

    Attributes:
        scaling: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [query_heads], a learned score that takes part in the softmax and nothing else (gpt-oss).
        window: a query at position p sees the positions above p - window; None for all before it.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None


class LayerCall(NamedTuple):
    """What an attention layer is called with.

    Attributes:
        layer: its index.
        query: [rows, query_heads, tokens, key_dim], rotated.
        key: [rows, heads, tokens, key_dim], rotated.
        value: [rows, heads, tokens, value_dim].
        scores: how it scores.
        mask: what the model made in place of a mask.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Scores
    mask: Tensor | None


@dataclass
class Running:
    """What the layers carry.

    Attributes:
        step: the running step, which maps a call to [rows, tokens, query_heads, value_dim].
        windows: what each layer sees, by its index; empty for what the model hands down.
    """

    step: Callable[[LayerCall], Tensor] | None = None
    windows: Mapping[int, int | None] = field(default_factory=dict)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of the registry: hands the call to the running step; dropout is ignored.

    Returns:
        [rows, tokens, query_heads, value_dim], and None for the attention weights.
    """
    running: Running = getattr(module, RUNNING)
    assert running.step is not None, "a model is called within a step"
    layer: int = module.layer_idx  # type: ignore[assignment]
    window = running.windows[layer] if running.windows else sliding_window
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux, window)
    out = running.step(LayerCall(layer, query, key, value, scores, attention_mask))
    return out.to(query.dtype).contiguous(), None  # some models view it


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attention)


class Segments:
    """Chunks as they lie in a packed sequence, one behind the other, in slots of `length` places.

    Tensors are made when they are asked for, once for each device: the layers of a model may lie on several.
    """

    def __init__(self, chunks: Sequence[Chunk], length: int) -> None:
        self.chunks, self.length = chunks, length
        self._made: dict[tuple[object, ...], Tensor] = {}

    def rows(self, device: torch.device) -> Tensor:
        """For each packed token its row in the pool, flattened over slots: int64 [tokens]."""
        flat = (c.slot * self.length + place for c in self.chunks for place in range(c.start, c.stop))
        return self.tensor("rows", flat, torch.int64, device)

    def last(self, device: torch.device) -> Tensor:
        """Where the last token of each chunk lies among the packed ones: int64 [chunks]."""
        counts = itertools.accumulate(len(chunk.ids) for chunk in self.chunks)
        return self.tensor("last", (count - 1 for count in counts), torch.int64, device)

    def mask(self, index: int, window: int | None, device: torch.device) -> Tensor | None:
        """Which places from `first_in_sight` on the queries of a chunk see: bool [count, places]; None for all."""
        chunk, key = self.chunks[index], ("mask", index, window, device)
        if len(chunk.ids) == 1:
            return None
        if key not in self._made:
            first = first_in_sight(chunk, window)
            places = torch.arange(first, chunk.stop, device=device)
            mask = places <= torch.arange(chunk.start, chunk.stop, device=device)[:, None]
            if window is not None:
                positions = torch.tensor(list(chunk.positions[first:]), device=device)
                mask &= positions > positions[-len(chunk.ids) :, None] - window
            self._made[key] = mask
        return self._made[key]

    def tensor(self, name: str, values: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values, or what the name stood for before."""
        if (name, device) not in self._made:
            self._made[name, device] = upload(list(values), dtype, device)
        return self._made[name, device]


def first_in_sight(chunk: Chunk, window: int | None) -> int:
    """The first place that the oldest query of a chunk sees through a sliding window.

    The window counts positions, not places: under policy evict the two differ.
    """
    return 0 if window is None else bisect.bisect_right(chunk.positions, chunk.positions[chunk.start] - window)


def attend_segments(query: Tensor, keys: Tensor, values: Tensor, segments: Segments, scores: Scores) -> Tensor:
    """Attention of packed queries, chunk by chunk; each sees its own place and those before it.

    Args:
        query: [tokens, query_heads, key_dim].
        keys: the slots, [slots, length, heads, key_dim].
        values: [slots, length, heads, value_dim].
        segments: whose the queries are.
        scores: how they score.

    Returns:
        [tokens, query_heads, value_dim].
    """
    out, window, chunks = [], scores.window, segments.chunks
    pieces = query.transpose(0, 1)[None].split_with_sizes([len(chunk.ids) for chunk in chunks], 2)
    for index, (chunk, piece) in enumerate(zip(chunks, pieces, strict=True)):
        seen = slice(first_in_sight(chunk, window), chunk.stop)
        key = keys[None, chunk.slot, seen].transpose(1, 2).to(query.dtype)
        value = values[None, chunk.slot, seen].transpose(1, 2).to(query.dtype)
        mask = segments.mask(index, window, query.device)
        out.append(attend(piece, key, value, mask, scores))
    return torch.cat(out, dim=2)[0].transpose(0, 1)


@dataclass
class Packed:
    """A step over packed chunks.

    Attributes:
        pool: the keys and values.
        segments: the chunks.
        attend: who attends.
    """

    pool: KVPool
    segments: Segments
    attend: Callable[[Tensor, Tensor, Tensor, Segments, Scores], Tensor] = field(default=attend_segments)

    def __call__(self, call: LayerCall) -> Tensor:
        """Query, key and value are [1, heads, tokens, dim]; returns [1, tokens, query_heads, value_dim]."""
        layer, query, key, value, scores, _ = call
        rows, keys, values = self.segments.rows(key.device), self.pool.keys[layer], self.pool.values[layer]
        self.pool.write(layer, rows, key[0].transpose(0, 1), value[0].transpose(0, 1))
        return self.attend(query[0].transpose(0, 1), keys, values, self.segments, scores)[None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Grouped-query attention; the mask says what is visible, not the window of the scores.

    The query heads that share a key head are folded into the query axis, so keys and values are never repeated.

    Args:
        query: [rows, query_heads, queries, key_dim].
        key: [rows, heads, keys, key_dim].
        value: [rows, heads, keys, value_dim].
        mask: bool [queries, keys], or, for single queries, [rows, 1, 1, keys]; None when every query sees every key.
        scores: how they are made.

    Returns:
        [rows, query_heads, queries, value_dim].
    """
    rows, query_heads, queries, dim = query.shape
    heads = key.shape[1]
    group = query_heads // heads
    folded = query.reshape(rows, heads, group * queries, dim)
    if mask is not None and queries > 1:
        mask = mask.repeat(group, 1)
    if scores.softcap is None and scores.sinks is None:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scores.scaling)
    else:
        out = _explicit(folded, key, value, mask, scores, queries)
    return out.reshape(rows, query_heads, queries, value.shape[-1])


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores, queries: int) -> Tensor:
    """Attention in the open, for what the fused kernel lacks: shapes as in `attend`, folded."""
    raw = (query @ key.mT) * scores.scaling
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    if mask is not None:
        raw = raw.masked_fill(~mask, float("-inf"))
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if scores.sinks is None:
        return torch.softmax(raw, dim=-1).to(value.dtype) @ value
    sinks = scores.sinks.view(key.shape[1], -1).repeat_interleave(queries, dim=1)[None, :, :, None]
    weights = torch.softmax(torch.cat([raw, sinks.to(raw.dtype).expand(len(raw), -1, -1, -1)], dim=-1), dim=-1)
    return weights[..., :-1].to(value.dtype) @ value
