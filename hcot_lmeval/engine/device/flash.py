"""The flash-attention kernels: PyTorch's own, and those of the package flash-attn. Both read the pool in place."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from hcot_lmeval.engine.attention import Scores, Segments
from hcot_lmeval.engine.device.attention import Ragged, Sdpa, UnavailableError
from hcot_lmeval.engine.slots import LayerSpec

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_DIM = 256


def refusal(layer: LayerSpec, *, caps: bool) -> str:
    """Why flash kernels cannot serve a layer, those that can cap scores (`caps`) or others; empty if they can."""
    if layer.device.type != "cuda":
        return f"it needs CUDA, not {layer.device.type}"
    if layer.dtype not in DTYPES:
        return f"it computes in float16 and bfloat16, not in {str(layer.dtype).removeprefix('torch.')}"
    if layer.kv_dtype != layer.dtype:
        return f"it reads keys and values in the dtype of the queries, not in {layer.kv_dtype}".replace("torch.", "")
    if layer.key_dim != layer.value_dim or layer.key_dim > LARGEST_DIM or layer.key_dim % 8:
        return f"it needs equal head sizes, multiples of 8 up to {LARGEST_DIM}, not {layer.key_dim}/{layer.value_dim}"
    if layer.sinks:
        return "it knows no sinks"
    return "it knows no soft cap" if layer.softcap is not None and not caps else ""


class TorchFlash(Sdpa):
    """The operator beneath PyTorch's own attention, from 2.11 on; the public `varlen_attn` has `seqused_k` from 2.12.

    A slot is a sequence that starts anywhere among all keys, of which so many are used; so a sliding window of a single
    query is a later start.
    """

    name = "flash"

    def __init__(self, kernel: Any = torch.ops.aten._flash_attention_forward) -> None:
        self._kernel = kernel

    def refuses(self, layer: LayerSpec) -> str:
        return refusal(layer, caps=False)

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, at: Ragged, scores: Scores) -> Tensor:
        flat, sizes = (query, keys.flatten(0, 1), values.flatten(0, 1)), (1, keys.shape[1])
        how = {"scale": scores.scaling, "seqused_k": at.used}
        out: Tensor = self._kernel(*flat, at.offsets, at.starts, *sizes, 0.0, False, False, **how)[0]
        return out

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, segments: Segments, scores: Scores) -> Tensor:
        device, chunks, window = keys.device, segments.chunks, scores.window
        starts = [*(chunk.slot * segments.length for chunk in chunks), 0]  # one more, which nobody reads
        offsets = [0, *itertools.accumulate(len(chunk.ids) for chunk in chunks)]
        how: dict[str, Any] = {"scale": scores.scaling, "seqused_k": _lengths(segments, device)}
        if window is not None:
            how |= {"window_size_left": window - 1, "window_size_right": 0}
        out: Tensor = self._kernel(
            query.contiguous(),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            segments.tensor("offsets", offsets, torch.int32, device),
            segments.tensor("starts", starts, torch.int32, device),
            max(len(chunk.ids) for chunk in chunks),
            segments.length,
            0.0,  # dropout
            True,  # causal
            False,  # debugging
            **how,
        )[0]
        return out


def _lengths(segments: Segments, device: torch.device) -> Tensor:
    """Live tokens of the slot of each chunk, the chunk included: int32 [chunks]."""
    return segments.tensor("lengths", (chunk.stop for chunk in segments.chunks), torch.int32, device)


class FlashAttn(Sdpa):
    """`flash_attn_with_kvcache` of the package flash-attn, which takes whole slots by their number."""

    name = "flash-attn"

    def __init__(self, kernel: Any = None) -> None:
        self._kernel = kernel or _with_kvcache()

    def refuses(self, layer: LayerSpec) -> str:
        return refusal(layer, caps=True) or ("" if layer.window is None else "it knows no window of a single query")

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, at: Ragged, scores: Scores) -> Tensor:
        """Without windows only rows that do not run start behind 0: no matter what they read."""
        slots = {"cache_seqlens": at.used, "cache_batch_idx": at.slots}
        return self._kernel(query[:, None], keys, values, **slots, causal=False, **_names(scores))[:, 0]

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, segments: Segments, scores: Scores) -> Tensor:
        """Chunk by chunk."""
        out, lengths = [], _lengths(segments, keys.device)
        indices = segments.tensor("slots", (chunk.slot for chunk in segments.chunks), torch.int32, keys.device)
        for index, piece in enumerate(query.split([len(chunk.ids) for chunk in segments.chunks])):
            one = slice(index, index + 1)
            slots = {"cache_seqlens": lengths[one], "cache_batch_idx": indices[one]}
            out.append(self._kernel(piece[None], keys, values, **slots, causal=True, **_names(scores))[0])
        return torch.cat(out)


def _names(scores: Scores) -> dict[str, float]:
    return {"softmax_scale": scores.scaling, "softcap": scores.softcap or 0.0}


def _with_kvcache() -> Any:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise UnavailableError("the package flash-attn is not installed (pip install 'hcot_lmeval[flash]')") from error
    return flash_attn_with_kvcache
