"""Attention over the slots of a `KVPool`, called by Hugging Face models through their attention registry.

All tokens of an engine step, whatever row they belong to, are packed into one sequence; a `Segment` says which of them
belong to which slot. So rows of different length and progress share one forward without padding and without a mask.

`slot_attention` writes the new keys and values to the pool and attends, row by row, over exactly what is live. The
model itself is called with ``attention_mask=None, use_cache=False``; the running step reaches this function through
`running`, since some model families do not hand keyword arguments down to their attention.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.engine.slots import KVPool

IMPLEMENTATION = "hcot_slots"
"""The name under which the registry knows `slot_attention`."""


@dataclass(frozen=True)
class Segment:
    """The packed tokens [first, first + count) extend a slot that holds `start` tokens.

    Attributes:
        positions: position ids of all tokens of the slot after this step, ascending, `start + count` of them.
    """

    slot: int
    start: int
    first: int
    count: int
    positions: Sequence[int]

    @property
    def length(self) -> int:
        """Live tokens of the slot after this step."""
        return self.start + self.count

    def window_start(self, window: int | None) -> int:
        """The first token that the segment's oldest query can see through a sliding window.

        The window counts positions, not live tokens: under policy evict the two differ.
        """
        if window is None:
            return 0
        return bisect.bisect_right(self.positions, self.positions[self.start] - window)


@dataclass
class StepContext:
    """What the attention layers have to know about the running step: memory, rows, and windows by layer index."""

    pool: KVPool
    segments: Sequence[Segment]
    windows: Mapping[int, int | None]
    _rows: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None, torch.device], torch.Tensor | None] = field(default_factory=dict)

    def rows(self, device: torch.device) -> torch.Tensor:
        """Returns for each packed token its row in the pool, flattened over slots: int64 [tokens]."""
        if device not in self._rows:
            flat = [s.slot * self.pool.length + row for s in self.segments for row in range(s.start, s.length)]
            self._rows[device] = torch.tensor(flat, device=device)
        return self._rows[device]

    def mask(self, index: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        """Returns which keys the queries of segment `index` see: bool [count, keys], None where all see all."""
        key = (index, window, device)
        if key not in self._masks:
            self._masks[key] = _mask(self.segments[index], window, device)
        return self._masks[key]


def _mask(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor | None:
    if segment.count == 1:
        return None
    first = segment.window_start(window)
    keys = torch.arange(first, segment.length, device=device)
    queries = torch.arange(segment.start, segment.length, device=device)[:, None]
    mask = keys <= queries
    if window is not None:
        positions = torch.tensor(list(segment.positions[first:]), device=device)
        mask &= positions > positions[-segment.count :, None] - window
    return mask


_STEP: ContextVar[StepContext] = ContextVar("hcot_step")


@contextmanager
def running(step: StepContext) -> Iterator[None]:
    """While it is open, the attention layers work on `step`."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of the registry.

    Args:
        module: the attention layer; its `layer_idx` selects the layer of the pool.
        query: [1, query_heads, tokens, key_dim], rotated.
        key: [1, heads, tokens, key_dim], rotated.
        value: [1, heads, tokens, value_dim].
        attention_mask: None; what is visible follows from the segments.
        scaling: factor of the scores, by default 1 / sqrt(key_dim).
        dropout: ignored, decoding has none.
        sliding_window: ignored; the window of the layer is that of its mask (`hcot_lmeval.engine.probe`).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        s_aux: [query_heads], a learned score that takes part in the softmax and nothing else (gpt-oss sinks).

    Returns:
        [1, tokens, query_heads, value_dim], and None for the attention weights.
    """
    step = _STEP.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values, window = step.pool.keys[layer], step.pool.values[layer], step.windows[layer]
    step.pool.write(layer, step.rows(key.device), key[0].transpose(0, 1), value[0].transpose(0, 1))
    outputs = []
    for index, segment in enumerate(step.segments):
        first = segment.window_start(window)
        outputs.append(
            attend(
                query[0, :, segment.first : segment.first + segment.count],
                keys[segment.slot, first : segment.length].transpose(0, 1).to(query.dtype),
                values[segment.slot, first : segment.length].transpose(0, 1).to(query.dtype),
                step.mask(index, window, key.device),
                scaling=scaling,
                softcap=softcap,
                sinks=s_aux,
            )
        )
    return torch.cat(outputs, dim=1).transpose(0, 1).contiguous()[None], None  # some models view it


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped-query attention of one row.

    The query heads that share a key head are folded into the query axis, so keys and values are never repeated.

    Args:
        query: [query_heads, queries, key_dim].
        key: [heads, keys, key_dim].
        value: [heads, keys, value_dim].
        mask: bool [queries, keys], None when every query sees every key.
        scaling: factor of the scores.
        softcap: see `slot_attention`.
        sinks: see `slot_attention`.

    Returns:
        [query_heads, queries, value_dim].
    """
    heads, (query_heads, queries, dim) = key.shape[0], query.shape
    group = query_heads // heads
    folded = query.reshape(heads, group * queries, dim)
    if mask is not None:
        mask = mask.repeat(group, 1)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(folded[None], key[None], value[None], attn_mask=mask, scale=scaling)[0]
    else:
        sinks = None if sinks is None else sinks.view(heads, group).repeat_interleave(queries, dim=1)
        out = _explicit(folded, key, value, mask, dim**-0.5 if scaling is None else scaling, softcap, sinks)
    return out.reshape(query_heads, queries, value.shape[-1])


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention in the open, for what the fused kernel lacks: shapes as in `attend`, folded; sinks [heads, queries]."""
    scores = (query @ key.transpose(1, 2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is None:
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    weights = torch.softmax(torch.cat([scores, sinks[..., None].to(scores.dtype)], dim=-1), dim=-1)
    return weights[..., :-1].to(value.dtype) @ value


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, slot_attention)
