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
"""Length of the n-grams by which an earlier copy is found; no longer than what has to be repeated."""
_SLOTS = 2**13
_TRIED = 64
"""Earlier places of an n-gram that are looked at; more of them have only long laps of very few different tokens."""
_SETTLED = 4
"""A distance that has held for so many n-grams is a lap's, or breaks before the lap is over: no other is sought."""


class LoopDetector:
    """Follows one trace, one generated token at a time.

    Args:
        tokens: repeated tokens from which on a repetition counts, at least 1.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._ids: list[int] = []
        self._gram = min(_GRAM, max(tokens, REPEATS - 1))
        self._starts: list[int] = []  # of the open blocks
        self._siblings: list[tuple[list[int], int]] = [([], 0)]  # at each depth the last block and how often it came
        self.forget()

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
        self._first = len(self._ids)
        self._recent: deque[int] = deque(maxlen=self._gram)
        self._seen = [-1] * _SLOTS  # hash of an n-gram -> where it ended last
        self._before: list[int] = []  # of each token since: where its n-gram ended before, or -1
        self._runs: dict[int, int] = {}  # distance to an earlier copy -> tokens that are equal at this distance
        self._siblings = [([], 0) for _ in self._siblings]

    def _is_periodic(self, token: int) -> bool:
        """Follows every distance to an earlier copy for as long as it holds, and looks for others."""
        ids, last = self._ids, len(self._ids) - 1
        if self._runs:
            self._runs = {period: run + 1 for period, run in self._runs.items() if ids[last - period] == token}
        self._recent.append(token)
        slot = hash(tuple(self._recent)) % _SLOTS
        at = self._seen[slot]
        self._seen[slot] = last
        self._before.append(at)
        settled = any(run >= _SETTLED * self._gram for run in self._runs.values())
        for _ in range(0 if settled else _TRIED):
            if at < 0:
                break
            self._follow(last - at)
            at = self._before[at - self._first]
        return any(run >= max(self._tokens, (REPEATS - 1) * period) for period, run in self._runs.items())

    def _follow(self, period: int) -> None:
        """Begins to follow a distance, unless a part of it is followed that holds and breaks with it."""
        if any(period % known == 0 and period <= run + known for known, run in self._runs.items()):
            return
        ids, place = self._ids, len(self._ids) - 1
        while place - period >= self._first and ids[place] == ids[place - period]:
            place -= 1
        run = len(ids) - 1 - place
        if run >= self._gram:
            self._runs[period] = run

    def _close(self) -> bool:
        """Takes note of the block that ends with the last token."""
        block = self._ids[self._starts.pop() :]
        self._siblings.pop()
        same, count = self._siblings[-1]
        count = count + 1 if block == same else 1
        self._siblings[-1] = (block, count)
        return count >= REPEATS and (count - 1) * len(block) >= self._tokens
