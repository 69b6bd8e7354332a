"""The flash-attention kernels: of the package flash-attn, and of PyTorch by its public and its internal name.

All read the pool in place. In PyTorch's varlen kernels a slot is a sequence that starts anywhere among the keys, of
which so many are used; a sliding window of a single query is a later start.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from hcot_lmeval.engine.device.backends import Need, Ragged, Scores, Segments, UnavailableError

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_DIM = 256


class _Flash:
    """What they have in common."""

    name = ""

    def refuses(self, need: Need) -> str:
        """See `Backend.refuses`."""
        if need.device.type != "cuda":
            return f"it needs CUDA, not {need.device.type}"
        if need.dtype not in DTYPES:
            return f"it computes in float16 and bfloat16, not in {str(need.dtype).removeprefix('torch.')}"
        if need.is_mixed:
            return f"it reads keys and values in the dtype of the queries, not in {need.stored}".replace("torch.", "")
        if need.key_dim != need.value_dim or need.key_dim > LARGEST_DIM or need.key_dim % 8:
            return f"it needs equal head sizes, multiples of 8 up to {LARGEST_DIM}, not {need.key_dim}/{need.value_dim}"
        if need.sinks or (need.softcap is not None and not self._caps):
            return "it knows no sinks" if need.sinks else "it knows no soft cap"
        return "it knows no window of a single query" if need.window is not None and not self._starts else ""

    _caps = False
    """Whether scores can be capped."""
    _starts = True
    """Whether a query's span may start within a slot."""


class _Varlen(_Flash):
    """Kernels over sequences that lie anywhere among all keys."""

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: Ragged, scores: Scores
    ) -> torch.Tensor:
        """See `Backend.decode`."""
        flat, sizes = (query, keys.flatten(0, 1), values.flatten(0, 1)), (1, keys.shape[1])
        return self._call(flat, at.offsets, at.starts, sizes, at.used, scores, causal=False, window=None)

    def chunk(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: Segments,
        window: int | None,
        scores: Scores,
    ) -> torch.Tensor:
        """See `Backend.chunk`."""
        length = keys.shape[1]
        starts = torch.nn.functional.pad((segments.slots * length).int(), (0, 1))
        sizes = (segments.longest, length)
        flat = (query.contiguous(), keys.flatten(0, 1), values.flatten(0, 1))
        return self._call(flat, segments.offsets, starts, sizes, segments.lengths, scores, causal=True, window=window)

    def _call(
        self,
        flat: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        offsets: torch.Tensor,
        starts: torch.Tensor,
        sizes: tuple[int, int],
        used: torch.Tensor,
        scores: Scores,
        *,
        causal: bool,
        window: int | None,
    ) -> torch.Tensor:
        """The kernel; queries [tokens, query_heads, dim], keys and values [slots * length, heads, dim].

        Args:
            flat: queries, keys and values.
            offsets: where the queries of each row begin, int32 [rows + 1].
            starts: where the keys of each row begin, int32 [rows + 1]; the last entry is not used.
            sizes: most queries and keys of a row.
            used: keys of each row, int32 [rows].
            scores: how scores are made.
            causal: the last query sees the last key, the one before it one key less, and so on.
            window: keys that a query sees.
        """
        raise NotImplementedError


class VarlenAttention(_Varlen):
    """`torch.nn.attention.varlen.varlen_attn`, in releases where sequences may be used in part (from 2.12 on)."""

    name = "varlen"

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        if "seqused_k" not in inspect.signature(varlen_attn).parameters:
            raise UnavailableError(f"torch {torch.__version__} has it without seqused_k")
        self._kernel: Any = varlen_attn

    def _call(
        self,
        flat: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        offsets: torch.Tensor,
        starts: torch.Tensor,
        sizes: tuple[int, int],
        used: torch.Tensor,
        scores: Scores,
        *,
        causal: bool,
        window: int | None,
    ) -> torch.Tensor:
        left, right = -1 if window is None else window - 1, 0 if causal else -1
        out: torch.Tensor = self._kernel(
            *flat,
            offsets,
            starts,
            *sizes,
            scale=scores.scaling,
            window_size=(left, right),
            enable_gqa=True,
            seqused_k=used,
        )
        return out


class AtenFlash(_Varlen):
    """The operator beneath PyTorch's own attention; it has had `seqused_k` since 2.5."""

    name = "aten"

    def __init__(self) -> None:
        operator = torch.ops.aten._flash_attention_forward
        if "seqused_k" not in str(operator.default._schema):
            raise UnavailableError(f"torch {torch.__version__} has it without seqused_k")
        self._kernel: Any = operator

    def _call(
        self,
        flat: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        offsets: torch.Tensor,
        starts: torch.Tensor,
        sizes: tuple[int, int],
        used: torch.Tensor,
        scores: Scores,
        *,
        causal: bool,
        window: int | None,
    ) -> torch.Tensor:
        spans = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out: torch.Tensor = self._kernel(
            *flat, offsets, starts, *sizes, 0.0, causal, False, scale=scores.scaling, seqused_k=used, **spans
        )[0]
        return out


class FlashAttn(_Flash):
    """`flash_attn_with_kvcache` of the package flash-attn, which takes whole slots by their number."""

    name = "flash-attn"
    _caps, _starts = True, False

    def __init__(self) -> None:
        try:
            from flash_attn import flash_attn_with_kvcache
        except ImportError as error:
            raise UnavailableError(
                "the package flash-attn is not installed (pip install 'hcot_lmeval[flash]')"
            ) from error
        self._kernel: Any = flash_attn_with_kvcache

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: Ragged, scores: Scores
    ) -> torch.Tensor:
        """See `Backend.decode`. Without windows only rows that do not run start behind 0: no matter what they read."""
        return self._call(query[:, None], keys, values, at.slots, at.used, scores, causal=False)[:, 0]

    def chunk(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: Segments,
        window: int | None,
        scores: Scores,
    ) -> torch.Tensor:
        """See `Backend.chunk`: segment by segment."""
        out, first = [], 0
        for index, (_, _, count) in enumerate(segments.parts):
            piece, one = query[None, first : first + count], slice(index, index + 1)
            lengths = segments.lengths[one]
            out.append(self._call(piece, keys, values, segments.slots[one], lengths, scores, causal=True)[0])
            first += count
        return torch.cat(out)

    def _call(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        lengths: torch.Tensor,
        scores: Scores,
        *,
        causal: bool,
    ) -> torch.Tensor:
        out: torch.Tensor = self._kernel(
            query,
            keys,
            values,
            cache_seqlens=lengths,
            cache_batch_idx=slots.int(),
            softmax_scale=scores.scaling,
            causal=causal,
            softcap=scores.softcap or 0.0,
        )
        return out
