"""From the deaths of a plan to the attention mask: ``visible(q, k)  <=>  k <= q < death[k]``."""

from __future__ import annotations

import torch


def dense_mask(death: torch.Tensor) -> torch.Tensor:
    """Returns the boolean attention mask of packed rows, True where a query sees a key.

    Args:
        death: int [B, T]; `death[b, k]` is the index of the first token of row b that no longer sees token k. Padding
            has its own index + 1, so that it sees itself (an empty row would turn the softmax into NaN) and nothing
            sees it.

    Returns:
        bool [B, 1, T, T], broadcast over heads; fit for `scaled_dot_product_attention` and for a transformers model
        with the sdpa attention, which takes a 4-d mask as it is. Memory is quadratic: 1 GiB at B=1, T=32k.

    Raises:
        ValueError: `death` is not 2-d, or some token would see nothing, not even itself.
    """
    if death.dim() != 2:
        raise ValueError(f"death has shape {tuple(death.shape)}; expected [batch, tokens]")
    index = torch.arange(death.shape[1], device=death.device)
    if not bool((death > index).all()):
        raise ValueError("death[k] <= k for some token; every token sees itself, so death[k] is at least k + 1")
    query, key = index[:, None], index[None, :]
    return ((key <= query) & (query < death[:, None, :]))[:, None]
