"""What each attention layer stores and sees, asked of the model: all tokens before a query, or a sliding window.

Some models hand their window to the attention function, others have it in the mask alone, and not all do what their
configuration says. The mask is what counts. Models make it from a function of two places, by a registry of
transformers; that function is looked at, far beyond what a forward could reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.engine.slots import LayerShape

PROBE = "hcot_probe"
"""The name under which the registries know the attention and the mask that ask."""
REACH = 2**18
"""Distances that are looked at; a window beyond counts as none."""
NEITHER = -1


class Probed(NamedTuple):
    """One layer.

    Attributes:
        shape: what it stores per token.
        window: a query at position p sees the positions above p - window; 0 for all before it, `NEITHER` for something
            else, such as chunks.
    """

    shape: LayerShape
    window: int


_FOUND: ContextVar[dict[int, Probed]] = ContextVar("hcot_probe")


@contextmanager
def probing() -> Iterator[dict[int, Probed]]:
    """Yields a dict, layer index to layer, which a forward under `PROBE` fills. The forward computes nothing else."""
    found: dict[int, Probed] = {}
    token = _FOUND.set(found)
    try:
        yield found
    finally:
        _FOUND.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Notes a layer; where the model makes no mask, the window is what it hands to its attention."""
    shape = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
    window = sliding_window or 0 if attention_mask is None else int(attention_mask.flatten()[0])
    _FOUND.get()[module.layer_idx] = Probed(shape, window)  # type: ignore[index]
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _mask(*, mask_function: Callable[..., torch.Tensor] | None = None, **_: Any) -> torch.Tensor:
    """In place of a mask, the window that its function describes, as a number: [1, 1, 1, 1]."""
    return torch.full((1, 1, 1, 1), 0 if mask_function is None else _window_of(mask_function))


def _window_of(visible: Callable[..., torch.Tensor]) -> int:
    """How many places a query sees; see `Probed`."""
    zero, distances = torch.tensor(0), torch.arange(-1, REACH)
    counts = set()
    for place in (REACH, REACH + 1, REACH + 7, REACH + REACH // 3):  # where chunks would begin and end
        mask = visible(zero, zero, torch.tensor(place), place - distances).expand_as(distances)
        count = int(mask.sum())
        counts.add(count if not mask[0] and bool(mask[1 : 1 + count].all()) else NEITHER)
    window = counts.pop()
    return NEITHER if counts else 0 if window == REACH else window


ALL_ATTENTION_FUNCTIONS.register(PROBE, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _mask)
