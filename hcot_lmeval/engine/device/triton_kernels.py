"""Triton kernels: attention of one query a row over slots of any length, and the choice of a token of each row.

Attention is split along the keys, then combined. Each program takes one row, one key head with all query heads that
share it, and one part of the keys in sight, so that a batch of one still fills the device (the split of Flash-Decoding,
Dao et al. 2023). The number of parts is fixed when the kernel is launched, as a CUDA graph needs; a row with fewer keys
has smaller parts, or empty ones.

A sample is the largest sum of score and Gumbel noise. How the search for it leaves out sorting and nearly all of the
noise is explained at the top of ``native/kernel/sample.cpp``, which does the same on CPUs. Two things differ here: the
logarithms of noise are computed for whole blocks in which a token can win, and PyTorch finds the k-th score.
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


# --- the choice of tokens ---------------------------------------------------------------------------------------------

SPAN = 4096
"""Tokens that a program looks at together."""
WARPS = 16
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
FIRST_FACTOR = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND_FACTOR = tl.constexpr(0x94D049BB133111EB)
STEPS = tl.constexpr(2**53)
"""How many values the hash has, as a number."""
STEP = tl.constexpr(2.0**-53)
MARGIN = tl.constexpr(1.0001)
"""Beyond the rounding of what is compared in float32."""
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _hashed(start, ids):  # type: ignore[no-untyped-def]
    """SplitMix64 with 53 bits, as `hcot_lmeval.engine.sampling.hashed_noise` has it."""
    bits = start + (ids + 1).to(tl.uint64) * tl.full([1], GOLDEN, tl.uint64)
    bits = (bits ^ (bits >> 30)) * tl.full([1], FIRST_FACTOR, tl.uint64)
    bits = (bits ^ (bits >> 27)) * tl.full([1], SECOND_FACTOR, tl.uint64)
    return (bits ^ (bits >> 31)) >> 11


@triton.jit
def _with_noise(scores, bits):  # type: ignore[no-untyped-def]
    return scores.to(tl.float64) - tl.log(-tl.log((bits.to(tl.float64) + 0.5) * STEP))


@triton.jit
def _in_front(scores, ids, score, place):  # type: ignore[no-untyped-def]
    """Whether tokens rank before a place in the order of the scores; of equal scores the lower id is in front."""
    return (scores > score) | ((scores == score) & (ids < place))


@triton.jit
def _highest(row, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -INFINITY, row.dtype.element_ty)
    places = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + lanes
        scores = tl.load(row + ids, mask=ids < size, other=-INFINITY)
        higher = scores > best
        places = tl.where(higher, ids, places)
        best = tl.where(higher, scores, best)
    return tl.min(tl.where(best == tl.max(best, 0), places, size), 0)


@triton.jit
def _strongest(row, size, hash_start, limit, limit_id, first_id, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest sum of score and noise among the tokens in front of a place; the first of them all is one."""
    lanes = tl.arange(0, BLOCK)
    winner = first_id
    first = tl.full([1], 0, tl.int32) + first_id
    most = tl.max(_with_noise(tl.load(row + first), _hashed(hash_start, first)), 0)
    for start in range(0, size, BLOCK):
        ids = start + lanes
        scores = tl.load(row + ids, mask=ids < size, other=-INFINITY)
        bits = _hashed(hash_start, ids)
        reach = tl.exp((scores.to(tl.float64) - most).to(tl.float32))
        rest = (tl.full([1], STEPS - 1, tl.uint64) - bits).to(tl.float32) * STEP
        hopeful = (rest <= reach * MARGIN) & (ids < size) & _in_front(scores, ids, limit, limit_id)
        if tl.max(hopeful.to(tl.int32), 0) > 0:
            noisy = tl.where(hopeful, _with_noise(scores, bits), -INFINITY)
            top = tl.max(noisy, 0)
            at = tl.min(tl.where(noisy == top, ids, size), 0)
            if (top > most) | ((top == most) & (at < winner)):
                most = top
                winner = at
    return winner


@triton.jit
def _mass_in_front(row, size, score, place, top, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of exp(score - top) of the tokens in front of a place."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        ids = start + lanes
        scores = tl.load(row + ids, mask=ids < size, other=-INFINITY)
        counts = _in_front(scores, ids, score, place) & (ids < size)
        total += tl.where(counts, tl.exp((scores - top).to(tl.float32)), 0.0)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def _behind(row, size, score, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The id behind the first `count` tokens, the last of which has `score`; equal scores are counted by id."""
    lanes = tl.arange(0, BLOCK)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        ids = start + lanes
        above += (tl.load(row + ids, mask=ids < size, other=-INFINITY) > score).to(tl.int32)
    left = count.to(tl.int32) - tl.sum(above, 0)
    seen = left * 0
    last = left * 0
    for start in range(0, size, BLOCK):
        ids = start + lanes
        ties = (tl.load(row + ids, mask=ids < size, other=-INFINITY) == score) & (ids < size)
        order = seen + tl.cumsum(ties.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(ties & (order == left), ids, 0), 0))
        seen += tl.sum(ties.to(tl.int32), 0)
    return last + 1


@triton.jit
def choose_rows(  # type: ignore[no-untyped-def]
    scores, temperatures, top_ps, min_ps, top_ks, kths, starts, tokens, size,
    TRUNCATES: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chooses the token of one row."""
    at = tl.program_id(0)
    row = scores + at.to(tl.int64) * size
    first = _highest(row, size, BLOCK)
    winner = first
    if tl.load(temperatures + at) > 0:
        hash_start = tl.load(starts + at).to(tl.uint64, bitcast=True)
        top = tl.load(row + first)
        edge = top * 0 - INFINITY  # top-k ends here, and at this id
        edge_id = first * 0 + size
        if TOP_K:
            count = tl.load(top_ks + at)
            if (count > 0) & (count < size):
                edge = tl.load(kths + at)
                edge_id = _behind(row, size, edge, count, BLOCK)
        winner = _strongest(row, size, hash_start, edge, edge_id, first, BLOCK)
        if TRUNCATES:
            share = tl.load(top_ps + at).to(tl.float64)
            least = tl.load(min_ps + at).to(tl.float64)
            enough = _mass_in_front(row, size, edge, edge_id, top, BLOCK) * share
            kept = winner == first
            while not kept:
                score = tl.load(row + winner)
                kept = tl.exp((score - top).to(tl.float64)) >= least
                if kept & (share < 1):
                    kept = _mass_in_front(row, size, score, winner, top, BLOCK) < enough
                if not kept:
                    winner = _strongest(row, size, hash_start, score, winner, first, BLOCK)
                    kept = winner == first
    tl.store(tokens + at, winner.to(tl.int64))


def choose(
    scores: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    top_k: torch.Tensor,
    starts: torch.Tensor,
    most: int,
    truncates: bool,
) -> torch.Tensor:
    """Chooses a token of each row. No read by the host, and static shapes.

    Args:
        scores: logits over the temperature, float32 or float64 [rows, vocabulary].
        temperature: [rows], in the type of the scores; at 0 the most likely token is taken.
        top_p: [rows], likewise; 1 is off.
        min_p: [rows], likewise; 0 is off.
        top_k: int64 [rows]; 0 is off.
        starts: where the hash of each row starts, int64 [rows].
        most: the largest top-k of all rows, 0 if none has one.
        truncates: whether any row has top-p or min-p.

    Returns:
        int64 [rows].
    """
    scores = scores.contiguous()
    settings = (column.contiguous() for column in (temperature, top_p, min_p, top_k))  # columns of a table, often
    rows, size = scores.shape
    kths, tokens = scores, torch.empty(rows, dtype=torch.int64, device=scores.device)
    if most:
        highest = scores.topk(min(most, size)).values
        kths = highest.gather(1, (top_k - 1).clamp(0, highest.shape[1] - 1)[:, None])
    choose_rows[(rows,)](
        scores, *settings, kths, starts.contiguous(), tokens, size,
        TRUNCATES=truncates, TOP_K=most > 0, BLOCK=SPAN, num_warps=WARPS,
    )  # fmt: skip
    return tokens
