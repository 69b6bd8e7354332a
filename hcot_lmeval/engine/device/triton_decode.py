"""A Triton kernel for one query a row over slots of any length: split along the keys, then combined.

Each program takes one row, one key head with all query heads that share it, and one part of the keys in sight, so that
a batch of one still fills the device (the split of Flash-Decoding, Dao et al. 2023). The number of parts is fixed when
the kernel is launched, as a CUDA graph needs; a row with fewer keys has smaller parts, or empty ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcot_lmeval.engine.attention import Scores
from hcot_lmeval.engine.device.attention import Ragged, Sdpa
from hcot_lmeval.engine.slots import LayerSpec

BLOCK = 64
"""Keys that a program reads at once; half as many of 4 bytes, which would not fit into the shared memory of all."""
MOST_SPLITS = 64
PROGRAMS_EACH = 2
"""Programs for each multiprocessor, where there are keys enough."""
PROCESSORS = 8
"""Assumed where nobody says how many there are (the interpreter)."""
LEAST_SIZE = 16
"""The least size that `tl.dot` takes."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_part(  # type: ignore[no-untyped-def]
    query, keys, values, sums, peaks, totals, slots, first, lengths, places, scaling, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr, KEY_DIM: tl.constexpr, KEY_SIZE: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_SIZE: tl.constexpr, CAPPED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted values of one part of the keys, in slots of so many places.

    A name with `SIZE` is a number of dimensions or query heads rounded up to a power of two.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    begin, end = tl.load(first + row), tl.load(lengths + row)
    each = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
    start = begin + split * each
    stop = tl.minimum(start + each, end)

    members = tl.arange(0, GROUP_SIZE)
    key_dims, value_dims = tl.arange(0, KEY_SIZE), tl.arange(0, VALUE_SIZE)
    heads = head * GROUP + members
    query_at = query + (row * HEADS * GROUP + heads[:, None]) * KEY_DIM + key_dims[None, :]
    q = tl.load(query_at, mask=(members[:, None] < GROUP) & (key_dims[None, :] < KEY_DIM), other=0.0)
    keys_at = keys + (slot * places * HEADS + head) * KEY_DIM
    values_at = values + (slot * places * HEADS + head) * VALUE_DIM

    peak = tl.full([GROUP_SIZE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_SIZE], tl.float32)
    summed = tl.zeros([GROUP_SIZE, VALUE_SIZE], tl.float32)
    for at in range(start, stop, BLOCK):
        here = at + tl.arange(0, BLOCK)
        inside = here < stop
        far = here.to(tl.int64) * HEADS
        k = tl.load(
            keys_at + far[None, :] * KEY_DIM + key_dims[:, None],
            mask=inside[None, :] & (key_dims[:, None] < KEY_DIM),
            other=0.0,
        ).to(q.dtype)
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if CAPPED:
            scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)  # cap * tanh(scores / cap)
        scores = tl.where(inside[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        v = tl.load(
            values_at + far[:, None] * VALUE_DIM + value_dims[None, :],
            mask=inside[:, None] & (value_dims[None, :] < VALUE_DIM),
            other=0.0,
        ).to(q.dtype)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher

    of = ((row * HEADS * GROUP + heads) * SPLITS + split).to(tl.int64)
    ours = members < GROUP
    tl.store(peaks + of, peak, mask=ours)
    tl.store(totals + of, total, mask=ours)
    there = sums + of[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(there, summed, mask=ours[:, None] & (value_dims[None, :] < VALUE_DIM))


@triton.jit
def combine_parts(  # type: ignore[no-untyped-def]
    sums, peaks, totals, sinks, out,
    VALUE_DIM: tl.constexpr, VALUE_SIZE: tl.constexpr, SINKS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
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


class TritonDecode(Sdpa):
    """The kernel for single queries; prompts and solutions as `Sdpa` does them."""

    name = "triton"

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        current = torch.cuda.get_device_properties(torch.cuda.current_device()) if cuda else None
        self._processors = PROCESSORS if current is None else current.multi_processor_count

    def refuses(self, layer: LayerSpec) -> str:
        if layer.dtype not in DTYPES:
            return f"it does not compute in {str(layer.dtype).removeprefix('torch.')}"
        if layer.device.type != "cuda" and not triton.knobs.runtime.interpret:
            return f"it needs CUDA, not {layer.device.type} (or TRITON_INTERPRET=1)"
        return ""

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, at: Ragged, scores: Scores) -> Tensor:
        query, sinks = query.contiguous(), scores.sinks
        (rows, query_heads, key_dim), (places, heads, value_dim) = query.shape, values.shape[1:]
        group, splits = query_heads // heads, self._splits(rows * heads, places)
        sums = query.new_empty(rows, query_heads, splits, value_dim, dtype=torch.float32)
        peaks, totals = (query.new_empty(rows, query_heads, splits, dtype=torch.float32) for _ in range(2))
        out = query.new_empty(rows, query_heads, value_dim)
        value_size = max(LEAST_SIZE, triton.next_power_of_2(value_dim))
        attend_part[(rows, heads, splits)](
            query, keys, values, sums, peaks, totals, at.slots, at.first, at.lengths,
            places, scores.scaling, scores.softcap or 1.0,
            HEADS=heads, GROUP=group, GROUP_SIZE=max(LEAST_SIZE, triton.next_power_of_2(group)),
            KEY_DIM=key_dim, KEY_SIZE=max(LEAST_SIZE, triton.next_power_of_2(key_dim)),
            VALUE_DIM=value_dim, VALUE_SIZE=value_size,
            CAPPED=scores.softcap is not None, SPLITS=splits, BLOCK=BLOCK if query.dtype.itemsize <= 2 else BLOCK // 2,
        )  # fmt: skip
        combine_parts[(rows, query_heads)](
            sums, peaks, totals, totals if sinks is None else sinks, out,
            VALUE_DIM=value_dim, VALUE_SIZE=value_size, SINKS=sinks is not None, SPLITS=splits,
        )  # fmt: skip
        return out

    def _splits(self, pairs: int, length: int) -> int:
        """Parts of the keys of each row and key head: a power of two, the same whatever the lengths are."""
        useful = min(-(-PROGRAMS_EACH * self._processors // pairs), -(-length // BLOCK), MOST_SPLITS)
        return 1 << (useful - 1).bit_length()
