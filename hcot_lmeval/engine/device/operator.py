"""Writing a token of each row and attending to it, as one operator of PyTorch that `torch.compile` does not look into.

A compiler that sees slots written through a view of them may not dare to write in place: torch 2.11 copies those of
every layer in every step (`can_inplace` in `torch._inductor.fx_passes.reinplace`). An operator tells it what changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch

from hcot_lmeval.engine.device.backends import Backend, Ragged, Scores
from hcot_lmeval.engine.slots import write_rows

_BACKENDS: WeakValueDictionary[str, Backend] = WeakValueDictionary()


def handle_of(backend: Backend) -> str:
    """Returns what `decode` knows a backend by, for as long as there is that backend: operators take no objects."""
    handle = f"{backend.name} {id(backend):x}"
    _BACKENDS[handle] = backend
    return handle


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    at: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    backend: str,
) -> torch.Tensor:
    """Stores a key and a value of each row and attends.

    Args:
        query: [rows, query_heads, key_dim].
        key: [rows, heads, key_dim].
        value: [rows, heads, value_dim].
        keys: the slots, [slots, length, heads, key_dim].
        values: [slots, length, heads, value_dim].
        rows: where key and value go, flattened over slots: int64 [rows].
        at: the fields of a `Ragged`.
        sinks: see `Scores`, as for the next two.
        scaling: .
        softcap: .
        backend: its handle.

    Returns:
        [rows, query_heads, value_dim].
    """
    write_rows(keys, rows, key)
    write_rows(values, rows, value)
    return _BACKENDS[backend].decode(query, keys, values, Ragged(*at), Scores(scaling, softcap, sinks))


decode_as_one = torch.library.custom_op("hcot_lmeval::decode", decode, mutates_args=("keys", "values"))
"""`decode` as an operator. Called without a compiler it costs more than it does itself."""


@decode_as_one.register_fake
def _shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[-1])
