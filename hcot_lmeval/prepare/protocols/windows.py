"""Long traces go to a teacher in windows that overlap; what comes back is made one again.

    windows = cut_windows(lengths, size=6000, overlap=800)        # (0, 130), (114, 251), ...
    blocks = merge(windows, blocks_of_each_window)

Within an overlap two windows have a say. The place where the one hands over to the other is chosen so that it lies
within as few blocks as possible; then as near to the middle as possible. Blocks that it does lie within are left out.
The same replies always give the same outline.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from hcot_lmeval.prepare.outline import Block

Window = tuple[int, int]
"""First sentence, and one past the last."""


def cut_windows(lengths: Sequence[int], size: int, overlap: int) -> list[Window]:
    """Cuts sentences into windows.

    Args:
        lengths: tokens of the sentences.
        size: tokens of a window; a longer sentence is a window by itself.
        overlap: tokens that two windows share, about; none where a sentence is too long for it.

    Returns:
        Windows that cover all sentences, each beginning and ending behind the one before.

    Raises:
        ValueError: `overlap` is not below half of `size`, so that three windows could meet.
    """
    if not 0 <= 2 * overlap < size:
        raise ValueError(f"an overlap of {overlap} tokens needs windows of more than {2 * overlap}; they have {size}")
    ends = [0, *accumulate(lengths)]
    windows: list[Window] = []
    start, count = 0, len(lengths)
    while start < count:
        stop = max(start + 1, _last(ends, start, size))
        windows.append((start, stop))
        if stop == count:
            break
        begin = max(_first(ends, stop, overlap), *(end for _, end in windows[-2:-1]), 0)  # three never meet
        start = begin if begin > start and _last(ends, begin, size) > stop else stop
    return windows


def _last(ends: Sequence[int], start: int, size: int) -> int:
    """One past the last sentence such that those from `start` on have at most `size` tokens."""
    stop = start
    while stop < len(ends) - 1 and ends[stop + 1] - ends[start] <= size:
        stop += 1
    return stop


def _first(ends: Sequence[int], stop: int, size: int) -> int:
    """The first sentence such that those up to `stop` have at most `size` tokens."""
    start = stop
    while start > 0 and ends[stop] - ends[start - 1] <= size:
        start -= 1
    return start


def merge(windows: Sequence[Window], found: Sequence[Sequence[Block]]) -> list[Block]:
    """Returns the blocks of all windows that are kept.

    Args:
        windows: as `cut_windows` made them.
        found: the blocks of each, properly nested and within it; numbers count from the first sentence of the trace.
    """
    places = [0]
    for (one, other), (before, after) in zip(pairwise(windows), pairwise(found), strict=True):
        places.append(_handover(other[0], one[1], before, after))
    places += [stop for _, stop in windows[-1:]]
    return [
        block
        for (low, high), blocks in zip(pairwise(places), found, strict=True)
        for block in blocks
        if low <= block.start and block.stop <= high
    ]


def _handover(low: int, high: int, before: Sequence[Block], after: Sequence[Block]) -> int:
    """The place, from `low` to `high`, up to which the first of two windows is believed."""

    def cost(place: int) -> tuple[int, float, int]:
        crossed = sum(block.start < place < block.stop for block in (*before, *after))
        return crossed, abs(place - (low + high) / 2), place

    return min(range(low, high + 1), key=cost)
