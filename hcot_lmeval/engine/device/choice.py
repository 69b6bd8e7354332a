"""Who may attend beside `Sdpa`, and who does: the first that serves every layer and gets the numbers right."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hcot_lmeval.engine.attention import Scores, Segments
from hcot_lmeval.engine.device.attention import Ragged, Sdpa, UnavailableError
from hcot_lmeval.engine.options import ATTENTION
from hcot_lmeval.engine.slots import Chunk, LayerSpec

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest error allowed, relative to the largest entry."""
COARSE_TOLERANCE = 2e-2
"""Largest error allowed in coarser types."""
PROBE_LENGTH = 300
PROBE_ROWS = ((3, 0, 1), (0, 0, 300), (4, 0, 77), (1, 0, 130))
"""Slot, first place in sight and length of the probe's rows."""
PROBE_CHUNKS = (
    Chunk(2, 0, range(40), range(40)),
    Chunk(4, 37, range(40), range(77)),
    Chunk(1, 129, range(1), range(130)),
)


FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_DIM = 256


def _flash_refusal(layer: LayerSpec, *, caps: bool) -> str:
    """Why flash kernels cannot serve a layer, those that can cap scores (`caps`) or others; empty if they can."""
    if layer.device.type != "cuda":
        return f"it needs CUDA, not {layer.device.type}"
    if layer.dtype not in FLASH_DTYPES:
        return f"it computes in float16 and bfloat16, not in {str(layer.dtype).removeprefix('torch.')}"
    if layer.kv_dtype != layer.dtype:
        return f"it reads keys and values in the dtype of the queries, not in {layer.kv_dtype}".replace("torch.", "")
    if layer.key_dim != layer.value_dim or layer.key_dim > FLASH_DIM or layer.key_dim % 8:
        return f"it needs equal head sizes, multiples of 8 up to {FLASH_DIM}, not {layer.key_dim}/{layer.value_dim}"
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
        return _flash_refusal(layer, caps=False)

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
        window = "" if layer.window is None else "it knows no window of a single query"
        return _flash_refusal(layer, caps=True) or window

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, at: Ragged, scores: Scores) -> Tensor:
        """Without windows only rows that do not run start behind 0: no matter what they read."""
        slots = {"cache_seqlens": at.used, "cache_batch_idx": at.slots}
        out: Tensor = self._kernel(query[:, None], keys, values, **slots, causal=False, **_named(scores))
        return out[:, 0]

    def chunk(self, query: Tensor, keys: Tensor, values: Tensor, segments: Segments, scores: Scores) -> Tensor:
        """Chunk by chunk."""
        out, lengths = [], _lengths(segments, keys.device)
        indices = segments.tensor("slots", (chunk.slot for chunk in segments.chunks), torch.int32, keys.device)
        for index, piece in enumerate(query.split([len(chunk.ids) for chunk in segments.chunks])):
            one = slice(index, index + 1)
            slots = {"cache_seqlens": lengths[one], "cache_batch_idx": indices[one]}
            out.append(self._kernel(piece[None], keys, values, **slots, causal=True, **_named(scores))[0])
        return torch.cat(out)


def _named(scores: Scores) -> dict[str, float]:
    return {"softmax_scale": scores.scaling, "softcap": scores.softcap or 0.0}


def _with_kvcache() -> Any:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise UnavailableError("the package flash-attn is not installed (pip install 'hcot_lmeval[flash]')") from error
    return flash_attn_with_kvcache


def _triton() -> Sdpa:
    try:
        from hcot_lmeval.engine.device.triton_kernels import TritonDecode
    except ImportError as error:
        raise UnavailableError(f"triton cannot be imported ({error})") from error
    return TritonDecode()


MAKERS: dict[str, Callable[[], Sdpa]] = {
    FlashAttn.name: FlashAttn,
    TorchFlash.name: TorchFlash,
    "triton": _triton,
    Sdpa.name: Sdpa,
}
"""Backends in the order of preference; the last one serves everybody."""


def choose(layers: Sequence[LayerSpec], only: str = "auto") -> Sdpa:
    """Returns the first backend that serves all layers and passes the probe, and logs why others were passed over.

    Args:
        layers: of the model.
        only: ``auto`` or the name of the only one to consider.

    Raises:
        ValueError: there is no backend of that name, or it cannot serve this model on this machine.
    """
    if only not in ATTENTION:
        raise ValueError(f"attention={only!r} is unknown; choose one of {', '.join(ATTENTION)}")
    passed_over: list[str] = []
    for name in MAKERS if only == "auto" else (only,):
        backend, reason = _tried(name, layers)
        if backend is not None:
            others = "".join(f"; not {text}" for text in passed_over)
            logger.info("attention on %s by %s%s", layers[0].device, name, others)
            return backend
        passed_over.append(f"{name}: {reason}")
    raise ValueError(
        f"attention={only!r} cannot be used: {'; '.join(passed_over)}. attention='auto' takes the best that can be"
    )


def _tried(name: str, layers: Sequence[LayerSpec]) -> tuple[Sdpa | None, str]:
    """The backend, or why it cannot be used."""
    try:
        backend = MAKERS[name]()
        for layer in dict.fromkeys(layers):
            reason = backend.refuses(layer) or wrong(backend, layer)
            if reason:
                return None, reason
    except Exception as error:  # a kernel that does not compile or run here raises anything
        return None, str(error) or type(error).__name__
    return backend, ""


@torch.inference_mode()
def wrong(backend: Sdpa, layer: LayerSpec) -> str:
    """What is wrong with the numbers of a backend on such a layer; empty if nothing is."""
    tolerance = TOLERANCE.get(layer.dtype, COARSE_TOLERANCE)
    for kind, error in errors(backend, layer):
        if not error <= tolerance:
            return f"its {kind} is off by {error:.1e} of the largest entry (allowed: {tolerance:.0e})"
    return ""


def errors(backend: Sdpa, layer: LayerSpec) -> Iterator[tuple[str, float]]:
    """Compares a backend with the textbook in double precision, NaN around everything in sight.

    Yields:
        What was computed and its largest error, relative to the largest entry.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(layer.device, layer.dtype)

    size = 5, PROBE_LENGTH, layer.heads
    keys, values = (noise(*size, dim).to(layer.kv_dtype) for dim in (layer.key_dim, layer.value_dim))
    sinks = noise(layer.query_heads) if layer.sinks else None
    scores = Scores(layer.key_dim**-0.5, layer.softcap, sinks, layer.window)

    def error(found: torch.Tensor, queries: Iterable[torch.Tensor], spans: Sequence[_Span]) -> float:
        rows = zip(queries, spans, strict=True)
        expected = torch.cat([textbook(q, keys[s, :stop], values[s, :stop], scores) for q, (s, _, stop) in rows])
        return float((found.double() - expected).abs().max() / expected.abs().max())

    query = noise(len(PROBE_ROWS), layer.query_heads, layer.key_dim)
    spans = [(slot, max(first, length - (layer.window or length)), length) for slot, first, length in PROBE_ROWS]
    slots, first, lengths = torch.tensor(spans, device=layer.device).unbind(1)
    at = Ragged.of(slots, first, lengths, PROBE_LENGTH)
    found = backend.decode(query, _hidden(keys, spans), _hidden(values, spans), at, scores)
    yield "decode", error(found, query.split(1), spans)
    spans = [(chunk.slot, 0, chunk.stop) for chunk in PROBE_CHUNKS]
    pieces = [noise(len(chunk.ids), layer.query_heads, layer.key_dim) for chunk in PROBE_CHUNKS]
    segments = Segments(PROBE_CHUNKS, PROBE_LENGTH)
    found = backend.chunk(torch.cat(pieces), _hidden(keys, spans), _hidden(values, spans), segments, scores)
    yield "chunk", error(found, pieces, spans)


_Span = tuple[int, int, int]
"""Slot, first place and the place behind the last."""


def _hidden(tensor: torch.Tensor, spans: Sequence[_Span]) -> torch.Tensor:
    """A copy that is NaN outside the spans."""
    copy = torch.full_like(tensor, float("nan"))
    for slot, first, length in spans:
        copy[slot, first:length] = tensor[slot, first:length]
    return copy


def textbook(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attention of the last queries of one row in double precision.

    Args:
        query: [queries, query_heads, key_dim]; the last one sees the last key, the one before one key less.
        keys: [keys, heads, key_dim].
        values: [keys, heads, value_dim].
        scores: how scores are made; the window counts keys.

    Returns:
        [queries, query_heads, value_dim].
    """
    group = query.shape[1] // keys.shape[1]
    q, (k, v) = query.double(), (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    raw = torch.einsum("qhd,khd->hqk", q, k) * scores.scaling
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    places = torch.arange(len(k), device=k.device)
    at = places[-len(q) :, None]
    seen = (places <= at) & (places > at - (scores.window or len(k)))
    raw = raw.masked_fill(~seen, float("-inf"))
    if scores.sinks is not None:
        raw = torch.cat([raw, scores.sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", raw.softmax(-1)[..., : len(k)], v)
