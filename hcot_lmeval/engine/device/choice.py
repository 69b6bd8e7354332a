"""Which backend attends: the first that serves every layer and gets the numbers right."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from hcot_lmeval.engine.computing import ATTENTION
from hcot_lmeval.engine.device.backends import Backend, Masked, Need, Ragged, Scores, Segments, UnavailableError
from hcot_lmeval.engine.device.flash import AtenFlash, FlashAttn, VarlenAttention

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest error allowed, relative to the largest entry; coarser types get 2e-2."""
PROBE_LENGTH = 300
PROBE_ROWS = ((3, 0, 1), (0, 0, 300), (4, 0, 77), (1, 0, 130))
"""Slot, first place in sight and length of the probe's rows."""
PROBE_PARTS = ((2, 0, 40), (4, 37, 40), (1, 129, 1))
"""Slot, tokens before and tokens of the probe's segments."""


def _triton() -> Backend:
    try:
        from hcot_lmeval.engine.device.triton_decode import TritonDecode
    except ImportError as error:
        raise UnavailableError(f"triton cannot be imported ({error})") from error
    return TritonDecode()


MAKERS: dict[str, Callable[[], Backend]] = {
    FlashAttn.name: FlashAttn,
    VarlenAttention.name: VarlenAttention,
    AtenFlash.name: AtenFlash,
    "triton": _triton,
    Masked.name: Masked,
}
"""Backends in the order of preference; the last one serves everybody."""


def choose(needs: Sequence[Need], wanted: str = "auto") -> Backend:
    """Returns the first backend that serves all layers and passes the probe, and logs why others were passed over.

    Args:
        needs: of the layers.
        wanted: ``auto`` or the name of the only one to consider.

    Raises:
        ValueError: there is no backend of that name, or it cannot serve this model on this machine.
    """
    if wanted not in ATTENTION:
        raise ValueError(f"attention={wanted!r} is unknown; choose one of {', '.join(ATTENTION)}")
    passed_over: list[str] = []
    for name in MAKERS if wanted == "auto" else (wanted,):
        backend, reason = _tried(name, needs)
        if backend is not None:
            others = "".join(f"; not {text}" for text in passed_over)
            logger.info("attention on %s by %s%s", needs[0].device, name, others)
            return backend
        passed_over.append(f"{name}: {reason}")
    raise ValueError(
        f"attention={wanted!r} cannot be used: {'; '.join(passed_over)}. attention='auto' takes the best that can be"
    )


def _tried(name: str, needs: Sequence[Need]) -> tuple[Backend | None, str]:
    """The backend, or why it cannot be used."""
    try:
        backend = MAKERS[name]()
        for need in dict.fromkeys(needs):
            reason = backend.refuses(need) or wrong(backend, need)
            if reason:
                return None, reason
    except Exception as error:  # a kernel that does not compile or run here raises anything
        return None, str(error) or type(error).__name__
    return backend, ""


@torch.inference_mode()
def wrong(backend: Backend, need: Need) -> str:
    """What is wrong with the numbers of a backend on such a layer; empty if nothing is."""
    tolerance = TOLERANCE.get(need.dtype, 2e-2)
    for kind, error in errors(backend, need):
        if not error <= tolerance:
            return f"its {kind} is off by {error:.1e} of the largest entry (allowed: {tolerance:.0e})"
    return ""


def errors(backend: Backend, need: Need) -> Iterator[tuple[str, float]]:
    """Compares a backend with the textbook in double precision, NaN around everything in sight.

    Yields:
        What was computed and its largest error, relative to the largest entry.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(need.device, need.dtype)

    slots = 5, PROBE_LENGTH, need.heads
    keys, values = (noise(*slots, dim).to(need.stored or need.dtype) for dim in (need.key_dim, need.value_dim))
    scores = Scores(need.key_dim**-0.5, need.softcap, noise(need.query_heads) if need.sinks else None)
    query = noise(len(PROBE_ROWS), need.query_heads, need.key_dim)
    spans = [(slot, max(first, length - (need.window or length)), length) for slot, first, length in PROBE_ROWS]
    hidden = _hidden(keys, spans), _hidden(values, spans)
    found = backend.decode(query, *hidden, _ragged(spans, need.device), scores)
    expected = [
        textbook(q[None], keys[slot, :length], values[slot, :length], need.window, scores)
        for q, (slot, _, length) in zip(query, spans, strict=True)
    ]
    yield "decode", _error(found, torch.cat(expected))
    whole = [(slot, 0, start + count) for slot, start, count in PROBE_PARTS]
    hidden = _hidden(keys, whole), _hidden(values, whole)
    pieces = [noise(count, need.query_heads, need.key_dim) for _, _, count in PROBE_PARTS]
    segments = Segments.of(PROBE_PARTS, need.device)
    found = backend.chunk(torch.cat(pieces), *hidden, segments, need.window, scores)
    expected = [
        textbook(piece, keys[slot, :length], values[slot, :length], need.window, scores)
        for piece, (slot, _, length) in zip(pieces, whole, strict=True)
    ]
    yield "chunk", _error(found, torch.cat(expected))


def _ragged(spans: Sequence[tuple[int, int, int]], device: torch.device) -> Ragged:
    slots, first, lengths = (torch.tensor(column, device=device) for column in zip(*spans, strict=True))
    return Ragged.of(slots, first, lengths, PROBE_LENGTH)


def _hidden(tensor: torch.Tensor, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """A copy that is NaN outside the spans."""
    copy = torch.full_like(tensor, float("nan"))
    for slot, first, length in spans:
        copy[slot, first:length] = tensor[slot, first:length]
    return copy


def textbook(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None, scores: Scores
) -> torch.Tensor:
    """Attention of the last queries of one row in double precision.

    Args:
        query: [queries, query_heads, key_dim]; the last one sees the last key, the one before one key less.
        keys: [keys, heads, key_dim].
        values: [keys, heads, value_dim].
        window: keys that a query sees.
        scores: how scores are made.

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
    seen = (places <= at) & (places > at - (window or len(k)))
    raw = raw.masked_fill(~seen, float("-inf"))
    if scores.sinks is not None:
        raw = torch.cat([raw, scores.sinks.double()[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", raw.softmax(-1)[..., : len(k)], v)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())
