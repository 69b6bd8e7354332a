"""From the deaths of a plan to the attention mask: ``visible(q, k)  <=>  k <= q < death[k]``.

`dense_mask` writes it out, `block_mask` says it to FlexAttention in memory linear in the tokens, and `attention_masks`
chooses and shapes what a transformers model takes as ``attention_mask``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

Mask = torch.Tensor | BlockMask

FULL, SLIDING = "full_attention", "sliding_attention"
"""The entries of `config.layer_types` whose attention the deaths define."""


def dense_mask(death: torch.Tensor, positions: torch.Tensor | None = None, window: int | None = None) -> torch.Tensor:
    """Returns the boolean attention mask of packed rows, True where a query sees a key.

    Args:
        death: int [B, T]; `death[b, k]` is the index of the first token of row b that no longer sees token k. Padding
            has its own index + 1, so that it sees itself (an empty row would turn the softmax into NaN) and nothing
            sees it.
        positions: position ids, int [B, T]; needed with a window, which is measured in them.
        window: a query at position p sees the positions above p - window alone; None for no limit.

    Returns:
        bool [B, 1, T, T], broadcast over heads; fit for `scaled_dot_product_attention` and for a transformers model
        with the sdpa attention, which takes a 4-d mask as it is. Memory is quadratic: 1 GiB at B=1, T=32k.

    Raises:
        ValueError: `death` is not 2-d, some token would see nothing, not even itself, or a window has no positions.
    """
    _check(death, positions, window)
    index = torch.arange(death.shape[1], device=death.device)
    mask = (index[:, None] < death[:, None, :]).tril_()  # key <= query
    if window is not None and positions is not None:
        mask &= positions[:, :, None] < positions[:, None, :] + window
    return mask[:, None]


def block_mask(
    death: torch.Tensor, positions: torch.Tensor | None = None, window: int | None = None, block: int = 128
) -> BlockMask:
    """Returns the same mask for FlexAttention, without ever writing it out.

    Which blocks are empty, partial or full follows from the extremes of `death` in each block of keys: the block of
    queries [first, last] does not see it at all if every death is at most `first`, and sees it whole if every death is
    above `last`. So memory and time are those of a [T / block, T / block] table. Without a window the result is what
    `torch.nn.attention.flex_attention.create_block_mask` finds by trying all pairs. With one, full blocks are exact and
    a few partial ones may be empty, which costs their time and changes nothing.

    Args:
        death: as for `dense_mask`.
        positions: as for `dense_mask`.
        window: as for `dense_mask`.
        block: tokens of a block of queries or keys. The kernels of FlexAttention want 128 on most devices.

    Raises:
        ValueError: as for `dense_mask`.
    """
    _check(death, positions, window)
    tokens = death.shape[1]
    start = torch.arange(0, tokens, block, device=death.device)
    last = start + block - 1
    low, high = _extremes(death, block)
    past = start[None, :] < start[:, None]  # [i, j]: block j of keys lies before block i of queries
    seen = past & (high[:, None, :] > start[:, None])
    full = past & (low[:, None, :] > last[:, None]) & (last[:, None] < tokens)  # an incomplete block is never full
    if window is not None and positions is not None:
        lowest, highest = _extremes(positions, block)
        seen &= lowest[:, :, None] - highest[:, None, :] < window
        full &= highest[:, :, None] - lowest[:, None, :] < window
    diagonal = start[None, :] == start[:, None]
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full | diagonal),
        *_ordered(full),
        BLOCK_SIZE=block,
        mask_mod=_mask_mod(death, positions, window),
        seq_lengths=(tokens, tokens),
    )


def attention_masks(
    config: Any,
    death: torch.Tensor,
    position_ids: torch.Tensor,
    implementation: str | None,
    dtype: torch.dtype | None = None,
) -> Mask | dict[str, Mask]:
    """Returns what a transformers model takes as ``attention_mask``.

    Args:
        config: the configuration of the text model; its `layer_types` and `sliding_window` count.
        death: int [B, T], on the device of the model.
        position_ids: int [B, T].
        implementation: the attention of the model, ``config._attn_implementation``.
        dtype: of the queries. With it ``sdpa`` gets an additive mask of that type. It computes the same under a bool
            one, but every layer then makes an additive one of its own and keeps it for the backward pass: 28 layers of
            8k tokens in bfloat16 hold 3.5 GiB of masks instead of 128 MiB.

    Returns:
        With ``sdpa`` a bool tensor [B, 1, T, T], or an additive one of 0 and -inf if there is a `dtype`; with ``eager``
        an additive one in any case, float32 without a `dtype`; with ``flex_attention`` a `BlockMask`. Where full and
        sliding layers alternate it is a dict from layer type to mask.

    Raises:
        ValueError: the implementation cannot take such a mask, or a layer is neither full nor sliding attention.
    """
    make = _maker(implementation, dtype)
    kinds = _layer_kinds(config)
    window = getattr(config, "sliding_window", None)
    if SLIDING in kinds and window is None:
        raise ValueError(f"model type {config.model_type!r} has {SLIDING} layers, but config.sliding_window is None")
    masks = {kind: make(death, position_ids, window if kind == SLIDING else None) for kind in kinds}
    return masks if len(masks) > 1 else masks[kinds[0]]


def _check(death: torch.Tensor, positions: torch.Tensor | None, window: int | None) -> None:
    if death.dim() != 2:
        raise ValueError(f"death has shape {tuple(death.shape)}; expected [batch, tokens]")
    if not bool((death > torch.arange(death.shape[1], device=death.device)).all()):
        raise ValueError("death[k] <= k for some token; every token sees itself, so death[k] is at least k + 1")
    if window is not None and (positions is None or positions.shape != death.shape):
        found = None if positions is None else tuple(positions.shape)
        raise ValueError(f"window={window} is measured in positions, which are {found}; give [batch, tokens] of them")


def _extremes(values: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest value of each block, [B, blocks]; the last block may be shorter."""
    missing = -values.shape[1] % block
    whole = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)  # repeating a value moves no extreme
    low, high = whole.unflatten(1, (-1, block)).aminmax(dim=2)
    return low, high


def _ordered(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A bool table [B, I, J] in the form of `BlockMask`: how many j each i has, [B, 1, I], and which, those first."""
    counts = table.sum(-1, dtype=torch.int32)
    indices = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[:, None], indices.to(torch.int32)[:, None]


def _mask_mod(
    death: torch.Tensor, positions: torch.Tensor | None, window: int | None
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The rule for one pair. It holds the tensors, which `BlockMask.to` would leave where they are."""
    death = death.to(torch.int32)

    def alive(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < death[b, k])

    if window is None or positions is None:
        return alive
    place = positions.to(torch.int32)

    def near(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < death[b, k]) & (place[b, q] - place[b, k] < window)

    return near


_Maker = Callable[[torch.Tensor, torch.Tensor, int | None], Mask]
_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")


def _maker(implementation: str | None, dtype: torch.dtype | None) -> _Maker:
    if implementation not in _IMPLEMENTATIONS:
        why = "FlashAttention would drop it" if "flash" in str(implementation) else "it is not known to take one"
        raise ValueError(
            f"attn_implementation={implementation!r} cannot run packed rows: they need a mask of their own, and {why}. "
            f"Load the model with one of {', '.join(map(repr, _IMPLEMENTATIONS))}."
        )
    if implementation == "flex_attention":
        return block_mask
    if implementation == "sdpa" and dtype is None:
        return dense_mask
    # Eager attention adds whatever it is given: a bool mask would favour what is visible by 1 and hide nothing.
    return partial(_additive_mask, dtype=dtype or torch.float32)


def _additive_mask(
    death: torch.Tensor, positions: torch.Tensor, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    visible = dense_mask(death, positions, window)
    return torch.zeros((), dtype=dtype, device=death.device).where(visible, -torch.inf)


def _layer_kinds(config: Any) -> list[str]:
    """The kinds of attention in the model, each once; models without `layer_types` have the same in every layer."""
    named = getattr(config, "layer_types", None)
    if not named:
        return [FULL if getattr(config, "sliding_window", None) is None else SLIDING]
    kinds = sorted(set(named))
    others = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if others:
        raise ValueError(
            f"model type {config.model_type!r} has layers of type {', '.join(map(repr, others))}; a mask says what "
            f"{FULL!r} and {SLIDING!r} layers see, but not what others remember. Choose a model without them."
        )
    return kinds
