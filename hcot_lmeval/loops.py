"""Notices that a trace has begun to repeat itself, at a cost of a few operations a token.

Two kinds of repetition count, each after `REPEATS` times and `tokens` repeated tokens, whichever comes later:

* the end of the trace is periodic: the same n-gram again and again;
* a block is written again and again, token for token, with nothing but other text between its copies.

This module imports the standard library alone.
"""

from __future__ import annotations

from collections import deque

REPEATS = 4
"""Copies, the first one included, from which on something counts as a loop."""
_GRAM = 8
"""Length of the n-grams by which an earlier copy is found; shorter repetitions are found as multiples of themselves."""
_SLOTS = 2**13


class LoopDetector:
    """Follows one trace, one generated token at a time.

    Args:
        tokens: repeated tokens from which on a repetition counts, at least 1.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._recent: deque[int] = deque(maxlen=_GRAM)
        self._seen = [-1] * _SLOTS  # hash of an n-gram -> where it ended last
        self._period = self._run = 0
        self._starts: list[int] = []  # of the open blocks
        self._siblings: list[tuple[list[int], int]] = [([], 0)]  # at each depth the last block and how often it came

    def push(self, token: int, depth: int) -> bool:
        """Appends a token after which `depth` blocks are open, and returns whether the trace repeats itself."""
        self._ids.append(token)
        again = self._is_periodic(token)
        while depth > len(self._starts):
            self._starts.append(len(self._ids) - 1)
            self._siblings.append(([], 0))
        while depth < len(self._starts):
            again |= self._close()
        return again

    def forget(self) -> None:
        """Starts to count anew."""
        self._period = self._run = 0
        self._seen = [-1] * _SLOTS
        self._siblings = [([], 0) for _ in self._siblings]

    def _is_periodic(self, token: int) -> bool:
        """Follows the distance to an earlier copy for as long as it holds, then looks for another one."""
        ids, last = self._ids, len(self._ids) - 1
        self._recent.append(token)
        slot = hash(tuple(self._recent)) % _SLOTS
        if self._period and ids[last - self._period] == token:
            self._run += 1
        else:
            before, self._run = self._seen[slot], 0
            self._period = last - before if before >= 0 else 0
        self._seen[slot] = last
        return self._run >= max(self._tokens, (REPEATS - 1) * self._period) and self._period > 0

    def _close(self) -> bool:
        """Takes note of the block that ends with the last token."""
        block = self._ids[self._starts.pop() :]
        self._siblings.pop()
        same, count = self._siblings[-1]
        count = count + 1 if block == same else 1
        self._siblings[-1] = (block, count)
        return count >= REPEATS and (count - 1) * len(block) >= self._tokens
