"""A Triton kernel that chooses a token of each row: no sort, and no noise for tokens that cannot win.

A sample is the largest sum of score and Gumbel noise. How the search for it leaves out sorting and nearly all of the
noise is explained at the top of ``native/kernel/sample.cpp``, which does the same on CPUs. Two things differ here: the
logarithms of noise are computed for whole blocks in which a token can win, and PyTorch finds the k-th score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
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
        TRUNCATES=truncates, TOP_K=most > 0, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return tokens


choose_as_one = torch.library.custom_op("hcot_lmeval::choose", choose, mutates_args=())
"""`choose` as an operator, into which `torch.compile` does not look."""


@choose_as_one.register_fake
def _shape(scores: torch.Tensor, *_: object) -> torch.Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)
