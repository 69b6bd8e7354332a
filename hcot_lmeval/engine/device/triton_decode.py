"""A Triton kernel for one query a row over slots of any length: split along the keys, then combined.

Each program takes one row, one key head with all query heads that share it, and one part of the keys in sight, so that
a batch of one still fills the device (the split of Flash-Decoding, Dao et al. 2023). The number of parts is fixed when
the kernel is launched, as a CUDA graph needs; a row with fewer keys has smaller parts, or empty ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hcot_lmeval.engine.device.backends import Masked, Need, Ragged, Scores

BLOCK = 64
"""Keys that a program reads at once; half as many of 4 bytes, which would not fit into the shared memory of all."""
MOST_SPLITS = 64
PROGRAMS_EACH = 2
"""Programs for each multiprocessor, where there are keys enough."""
PROCESSORS = 8
"""Assumed where nobody says how many there are (the interpreter)."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_part(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    sums,
    peaks,
    totals,
    slots,
    first,
    lengths,
    scaling,
    cap,
    query_row,
    query_head,
    key_slot,
    key_place,
    key_head,
    value_slot,
    value_place,
    value_head,
    GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax-weighted values of one part of the keys; sizes are dimensions rounded up to powers of two."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    begin, end = tl.load(first + row), tl.load(lengths + row)
    each = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
    start = begin + split * each
    stop = tl.minimum(start + each, end)

    members = tl.arange(0, GROUP_SIZE)
    key_dims, value_dims = tl.arange(0, KEY_SIZE), tl.arange(0, VALUE_SIZE)
    place_range = tl.arange(0, BLOCK)
    heads = head * GROUP + members
    query_at = query + row * query_row + heads[:, None] * query_head + key_dims[None, :]
    q = tl.load(query_at, mask=(members[:, None] < GROUP) & (key_dims[None, :] < KEY_DIM), other=0.0)
    keys_at = keys + slot * key_slot + head * key_head
    values_at = values + slot * value_slot + head * value_head

    peak = tl.full([GROUP_SIZE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_SIZE], tl.float32)
    summed = tl.zeros([GROUP_SIZE, VALUE_SIZE], tl.float32)
    for at in range(start, stop, BLOCK):
        places = at + place_range
        inside = places < stop
        far = places.to(tl.int64)
        k = tl.load(
            keys_at + far[None, :] * key_place + key_dims[:, None],
            mask=inside[None, :] & (key_dims[:, None] < KEY_DIM),
            other=0.0,
        ).to(q.dtype)
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)  # cap * tanh(scores / cap)
        scores = tl.where(inside[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        v = tl.load(
            values_at + far[:, None] * value_place + value_dims[None, :],
            mask=inside[:, None] & (value_dims[None, :] < VALUE_DIM),
            other=0.0,
        ).to(q.dtype)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher

    of = ((row * tl.num_programs(1) * GROUP + heads) * SPLITS + split).to(tl.int64)
    ours = members < GROUP
    tl.store(peaks + of, peak, mask=ours)
    tl.store(totals + of, total, mask=ours)
    there = sums + of[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(there, summed, mask=ours[:, None] & (value_dims[None, :] < VALUE_DIM))


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    sums,
    peaks,
    totals,
    sinks,
    out,
    VALUE_DIM: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Joins the parts of one row and query head; `SPLITS` is a power of two."""
    head = tl.program_id(1)
    of = (tl.program_id(0) * tl.num_programs(1) + head).to(tl.int64)
    parts, dims = tl.arange(0, SPLITS), tl.arange(0, VALUE_SIZE)
    peak = tl.load(peaks + of * SPLITS + parts)
    highest = tl.max(peak, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        highest = tl.maximum(highest, sink)
    weights = tl.exp2(peak - highest)
    total = tl.sum(weights * tl.load(totals + of * SPLITS + parts), 0)
    if SINKS:
        total += tl.exp2(sink - highest)
    here = (of * SPLITS + parts)[:, None] * VALUE_DIM + dims[None, :]
    part = tl.load(sums + here, mask=dims[None, :] < VALUE_DIM, other=0.0)
    summed = tl.sum(part * weights[:, None], 0) / total
    tl.store(out + of * VALUE_DIM + dims, summed.to(out.dtype.element_ty), mask=dims < VALUE_DIM)


class TritonDecode(Masked):
    """The kernel for single queries; prompts and solutions as `Masked` does them."""

    name = "triton"

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        current = torch.cuda.get_device_properties(torch.cuda.current_device()) if cuda else None
        self._processors = PROCESSORS if current is None else current.multi_processor_count

    def refuses(self, need: Need) -> str:
        """See `Backend.refuses`."""
        if need.dtype not in DTYPES:
            return f"it does not compute in {str(need.dtype).removeprefix('torch.')}"
        if need.device.type != "cuda" and not triton.knobs.runtime.interpret:
            return f"it needs CUDA, not {need.device.type} (or TRITON_INTERPRET=1)"
        return ""

    def decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: Ragged, scores: Scores
    ) -> torch.Tensor:
        """See `Backend.decode`."""
        query = query.contiguous()
        (rows, query_heads, key_dim), (heads, value_dim) = query.shape, values.shape[2:]
        group, splits = query_heads // heads, self._splits(rows * heads, keys.shape[1])
        sums = query.new_empty(rows, query_heads, splits, value_dim, dtype=torch.float32)
        peaks, totals = (query.new_empty(rows, query_heads, splits, dtype=torch.float32) for _ in range(2))
        out = query.new_empty(rows, query_heads, value_dim)
        _attend_part[(rows, heads, splits)](
            query,
            keys,
            values,
            sums,
            peaks,
            totals,
            at.slots,
            at.first,
            at.lengths,
            scores.scaling,
            scores.softcap or 1.0,
            *query.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            GROUP=group,
            GROUP_SIZE=max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
            KEY_DIM=key_dim,
            KEY_SIZE=max(16, triton.next_power_of_2(key_dim)),
            VALUE_DIM=value_dim,
            VALUE_SIZE=max(16, triton.next_power_of_2(value_dim)),
            CAPPED=scores.softcap is not None,
            SPLITS=splits,
            BLOCK=BLOCK if query.dtype.itemsize <= 2 else BLOCK // 2,
            PRECISION="ieee",
        )
        sinks = scores.sinks
        _combine[(rows, query_heads)](
            sums,
            peaks,
            totals,
            totals if sinks is None else sinks,
            out,
            VALUE_DIM=value_dim,
            VALUE_SIZE=triton.next_power_of_2(value_dim),
            SINKS=sinks is not None,
            SPLITS=splits,
        )
        return out

    def _splits(self, pairs: int, length: int) -> int:
        """Parts of the keys of each row and key head: a power of two, the same whatever the lengths are."""
        wanted = min(-(-PROGRAMS_EACH * self._processors // pairs), -(-length // BLOCK), MOST_SPLITS)
        return 1 << (wanted - 1).bit_length()
