"""What each attention layer stores and sees, asked of the model: all tokens before a query, or a sliding window.

Some models hand their window to the attention function, others have it in the mask alone, and not all do what their
configuration says. The mask is what counts. Models make it from a function of two places, by a registry of
transformers; that function is looked at, far beyond what a forward could reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcot_lmeval.engine.attention import LayerCall, attention
from hcot_lmeval.engine.slots import LayerSpec

PROBE = "hcot_probe"
"""The name under which the registries know the attention and the mask that ask."""
REACH = 2**18
"""Distances that are looked at; a window beyond counts as none."""
NEITHER = -1
"""The window of a layer that sees something else, such as chunks."""


class Probe:
    """A step that computes nothing and takes note of each layer; `layers` has them by index."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerSpec] = {}

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Where the model makes no mask, the window is what it hands to its attention."""
        query, key, value, scores = call.query, call.key, call.value, call.scores
        window = scores.window if call.mask is None else int(call.mask.flatten()[0])
        sizes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        self.layers[call.layer] = LayerSpec(
            *sizes, key.dtype, key.device, window or None, scores.softcap, scores.sinks is not None
        )
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _mask(*, mask_function: Callable[..., torch.Tensor] | None = None, **_: Any) -> torch.Tensor:
    """In place of a mask, the window that its function describes, as a number: [1, 1, 1, 1]; 0 for none."""
    return torch.full((1, 1, 1, 1), 0 if mask_function is None else _window_of(mask_function))


def _window_of(visible: Callable[..., torch.Tensor]) -> int:
    """How many places a query sees: 0 for all before it."""
    zero, distances = torch.tensor(0), torch.arange(-1, REACH)
    counts = set()
    for place in (REACH, REACH + 1, REACH + 7, REACH + REACH // 3):  # where chunks would begin and end
        mask = visible(zero, zero, torch.tensor(place), place - distances).expand_as(distances)
        count = int(mask.sum())
        counts.add(count if not mask[0] and bool(mask[1 : 1 + count].all()) else NEITHER)
    window = counts.pop()
    return NEITHER if counts else 0 if window == REACH else window


ALL_ATTENTION_FUNCTIONS.register(PROBE, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _mask)
