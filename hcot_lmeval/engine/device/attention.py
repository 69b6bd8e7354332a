"""What attention layers have to know of a step, and the function that they call through transformers' registry.

Two kinds of steps: `Decode`, one token for each of many rows, whose slots, places and lengths are tensors that the host
never reads; and `Packed`, prompts and solutions in one sequence, whose layout the host made and knows.

The layers find the running step in an attribute that they carry while `attached` is open: a context variable cannot
be traced by `torch.compile`, and keyword arguments do not reach the attention of every model family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.backends import Backend, Need, Ragged, Scores, Segments
from hcot_lmeval.engine.device.fields import Feed, upload
from hcot_lmeval.engine.device.operator import decode, decode_as_one, handle_of
from hcot_lmeval.engine.slots import Chunk, KVPool, write_rows

IMPLEMENTATION = "hcot_device"
"""The name under which the registry knows `device_attention`."""
_STEP = "hcot_step"
"""The attribute of attention layers."""
Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value of a layer."""


@dataclass
class Decode:
    """One token a row.

    Attributes:
        feed: where its keys and values go, int64 [rows].
        places: of a slot.
        positions: position ids of all places of all rows, int64 [rows, places], where windows are measured in them;
            None where the position of a token is its place.
        rows: where keys and values go, flattened over slots: int64 [rows].
    """

    feed: Feed
    places: int
    positions: torch.Tensor | None = None
    _ragged: dict[int | None, Ragged] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = self.feed.slots * self.places + self.feed.places

    def ragged(self, window: int | None) -> Ragged:
        """What each row sees through a sliding window."""
        if window not in self._ragged:
            first = self.feed.first if window is None else torch.maximum(self.feed.first, self._first(window))
            self._ragged[window] = Ragged.of(self.feed.slots, first, self.feed.places + 1, self.places)
        return self._ragged[window]

    def _first(self, window: int) -> torch.Tensor:
        hidden = self.feed.positions - window  # the youngest position that is out of sight
        if self.positions is None:
            return hidden + 1
        table = self.positions[self.feed.rows]
        held = torch.arange(table.shape[1], device=table.device) < self.feed.places[:, None]
        return ((table <= hidden[:, None]) & held).sum(1)

    def attend(
        self, context: Context, layer: int, projections: Projections, window: int | None, scores: Scores
    ) -> torch.Tensor:
        """Query, key and value are [rows, heads, 1, dim]; returns [rows, 1, query_heads, value_dim]."""
        query, key, value = (part[:, :, 0] for part in projections)
        slots, at, (scaling, softcap, sinks) = context.slots(layer), self.ragged(window), scores
        attend = decode_as_one if torch.compiler.is_compiling() else decode
        seen = attend(query, key, value, *slots, self.rows, at, sinks, scaling, softcap, context.handle)
        return seen[:, None]


@dataclass
class Packed:
    """Tokens of several rows in one sequence; the position of a token is its place.

    Attributes:
        segments: whose they are.
        rows: for each token its row in the pool, flattened over slots: int64 [tokens].
    """

    segments: Segments
    rows: torch.Tensor

    @classmethod
    def of(cls, chunks: Sequence[Chunk], length: int, device: torch.device) -> Packed:
        """The layout of `chunks` in slots of `length` places."""
        segments = Segments.of([(c.slot, c.start, len(c.ids)) for c in chunks], device)
        flat = [c.slot * length + place for c in chunks for place in range(c.start, c.start + len(c.ids))]
        return cls(segments, upload(flat, torch.int64, device))

    def attend(
        self, context: Context, layer: int, projections: Projections, window: int | None, scores: Scores
    ) -> torch.Tensor:
        """Query, key and value are [1, heads, tokens, dim]; returns [1, tokens, query_heads, value_dim]."""
        query, key, value = (part[0].transpose(0, 1) for part in projections)
        keys, values = context.slots(layer)
        write_rows(keys, self.rows, key)
        write_rows(values, self.rows, value)
        return context.attends.chunk(query, keys, values, self.segments, window, scores)[None]


@dataclass
class Context:
    """What the layers carry.

    Attributes:
        pool: the keys and values.
        backend: who attends.
        windows: what each layer sees, by its index.
        step: the running step; a list instead is filled with what each layer needs.
        handle: of the backend.
    """

    pool: KVPool | None = None
    backend: Backend | None = None
    windows: Mapping[int, int | None] = field(default_factory=dict)
    step: Decode | Packed | list[Need] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handle = "" if self.backend is None else handle_of(self.backend)

    @property
    def attends(self) -> Backend:
        """The backend of a step."""
        assert self.backend is not None, "a step has a backend"
        return self.backend

    def slots(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        assert self.pool is not None, "a step has a pool"
        return self.pool.keys[layer], self.pool.values[layer]


@contextmanager
def attached(decoder: Decoder, context: Context) -> Iterator[None]:
    """While it is open the layers of the model attend by `context`."""
    layers = [module for module in decoder.model.modules() if hasattr(module, "layer_idx")]
    with decoder.attached(IMPLEMENTATION):
        for layer in layers:
            setattr(layer, _STEP, context)
        try:
            yield
        finally:
            for layer in layers:
                delattr(layer, _STEP)


@torch.no_grad()
def survey(decoder: Decoder) -> list[Need]:
    """Forwards one token and returns what the attention of each layer asks of a backend."""
    context = Context(windows=decoder.windows)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=decoder.device)
    with attached(decoder, context):
        decoder.model(input_ids=zero, position_ids=zero, attention_mask=None, use_cache=False)
    assert isinstance(context.step, list)
    stored = [decoder.layers[layer].dtype for layer in sorted(decoder.layers)]
    return [need._replace(stored=dtype) for need, dtype in zip(context.step, stored, strict=True)]


def device_attention(
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
    """The attention function of the registry; arguments as in `hcot_lmeval.engine.attention.slot_attention`.

    Args:
        module: the attention layer.
        query: [rows, query_heads, 1, key_dim], or with 1 for rows and tokens for 1 in a packed step; rotated.
        key: likewise.
        value: likewise.
        attention_mask: None.
        scaling: factor of the scores.
        dropout: ignored.
        sliding_window: ignored, as there.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [query_heads], sinks.

    Returns:
        [rows, 1, query_heads, value_dim], or [1, tokens, query_heads, value_dim]; and None for the weights.
    """
    context: Context = getattr(module, _STEP)
    layer: int = module.layer_idx  # type: ignore[assignment]
    window = context.windows[layer]
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if isinstance(context.step, list):
        shape = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        context.step.append(Need(*shape, key.dtype, key.device, window, softcap, s_aux is not None))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    out = context.step.attend(context, layer, (query, key, value), window, scores)
    return out.to(query.dtype).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, device_attention)
