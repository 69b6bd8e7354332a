"""What if something else were thrown away? Variants of the rule that tell the pruning from the learned style.

A model that was trained to write blocks differs from its baseline in two ways: how it writes, and what it still sees.
Each ablation keeps the writing and changes the second, under the same policy and the same budgets:

``keep_last:N``   the thoughts of the last N closed blocks stay; a further block that closes throws the oldest away.
``oracle``        nothing is thrown away while the model thinks; when the thinking ends, every thought goes at once and
                  the answer is written from what a pruned run would have kept. It asks whether the solutions suffice.
``random``        a return throws away as many tokens as the rule would, but a stretch that stands somewhere else,
                  drawn anew each time among the generated tokens in the context.
``oldest``        a return throws away as many tokens as the rule would, the oldest generated ones: a sliding window
                  that moves when the model returns.

Structure stays what the model wrote: depth and faults are those of the trace. (One exception: a solution's lead token
that ``random`` or ``oldest`` threw away counts as missing.) This module imports the standard library alone.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import Kind, LiveContext, Policy, Spans, Step

Variant = Literal["keep_last", "oracle", "random", "oldest"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class Ablation:
    """A variant of the rule.

    Attributes:
        variant: see the module.
        blocks: N of ``keep_last:N``.
    """

    variant: Variant
    blocks: int | None = None

    @classmethod
    def parse(cls, text: str) -> Ablation:
        """Reads ``keep_last:4``, ``oracle``, ``random`` or ``oldest``.

        Raises:
            ValueError: anything else.
        """
        name, _, number = text.partition(":")
        if name == "keep_last" and number.isdecimal():
            return cls("keep_last", int(number))
        if name in VARIANTS and name != "keep_last" and not number:
            return cls(name)
        raise ValueError(f"ablation={text!r} is not one of keep_last:N (N blocks, from 0 up), oracle, random, oldest")

    def __str__(self) -> str:
        return self.variant if self.blocks is None else f"{self.variant}:{self.blocks}"

    def context(
        self, markers: MarkerIds | None, policy: Policy, *, prompt_len: int, think_end: int | None, seed: int
    ) -> LiveContext:
        """Returns the live context of one trace under this variant.

        Args:
            markers: the marker ids.
            policy: ``recompute`` or ``evict``.
            prompt_len: tokens of the prompt, which are never thrown away.
            think_end: the token that ends the thinking section; ``oracle`` prunes there.
            seed: of ``random``.

        Raises:
            ValueError: `policy` is off, or ``oracle`` does not know where the thinking ends.
        """
        if policy is Policy.OFF:
            raise ValueError(f"ablation={self} changes what is pruned, and under policy off nothing is; leave it out")
        if self.variant == "oracle" and think_end is None:
            raise ValueError("ablation=oracle prunes where the thinking ends, and this model has no end of thinking")
        if self.variant in ("random", "oldest"):
            return MovedContext(markers, policy, prompt_len, seed if self.variant == "random" else None)
        return DeferredContext(markers, policy, self.blocks, think_end if self.variant == "oracle" else None)


class _VariantContext(LiveContext):
    """A live context in which a prune may lie anywhere: what is remembered by its place moves with it."""

    def push(self, token: int) -> Step:
        spans = self._spans_to_prune(token)
        step = self._act(token, spans)
        before, after = self._thought(0, 0)  # what moves are the ends of the thought; a marker there may have gone
        for block in self._blocks:
            block.open = moved(block.open + before, spans) - before
            block.split = None if block.split is None else moved(block.split + after, spans) - after
        return step

    def _act(self, token: int, spans: Spans) -> Step:
        return super().push(token)


class DeferredContext(_VariantContext):
    """Thoughts of closed blocks wait in a queue before they are thrown away.

    Args:
        markers: the marker ids.
        policy: ``recompute`` or ``evict``.
        most: how many thoughts may wait; None: any number.
        sweep: a token at which all of them go.
    """

    def __init__(self, markers: MarkerIds | None, policy: Policy, most: int | None, sweep: int | None) -> None:
        super().__init__(markers, policy)
        self._most, self._sweep = most, sweep
        self._waiting: list[Spans] = []  # in the order of closing: an inner block before the one around it

    def _act(self, token: int, spans: Spans) -> Step:
        stays = self._queue(token)[self._leaving(token) :]
        step = self._prune_all(token, spans) if spans and token == self._sweep else super()._act(token, spans)
        self._waiting = [tuple((moved(a, spans), moved(b, spans)) for a, b in thought) for thought in stays]
        return step

    def _prune_all(self, token: int, spans: Spans) -> Step:
        prune = self._recompute if self.policy is Policy.RECOMPUTE else self._evict
        return prune(token, spans)._replace(kind=Kind.TEXT)

    def _spans_to_prune(self, token: int) -> Spans:
        leaving = self._queue(token)[: self._leaving(token)]
        return joined([span for thought in leaving for span in thought if span[1] <= len(self.live)])

    def _queue(self, token: int) -> list[Spans]:
        """The thoughts that wait, and last the one that `token` closes; with it its marker, if that is to vanish."""
        closing = super()._spans_to_prune(token)
        place = len(self.live)
        marker = () if "close" in self._marks.keep else ((place, place + 1),)
        return [*self._waiting, (*closing, *marker)] if closing else self._waiting

    def _leaving(self, token: int) -> int:
        """How many of the queue go with `token`."""
        if token == self._sweep:
            return len(self._waiting)
        return 0 if self._most is None else max(0, len(self._queue(token)) - self._most)

    def _survives(self, token: int) -> bool:
        own_block_stays = self._most != 0  # the block that closes now is the last to go
        return own_block_stays or super()._survives(token)


class MovedContext(_VariantContext):
    """A return throws away as many tokens as the rule does with the same trace, from another place.

    The rule is followed beside it, so that at every moment as many tokens are alive as under the rule.

    Args:
        markers: the marker ids.
        policy: ``recompute`` or ``evict``.
        prompt_len: tokens of the prompt, which are never thrown away.
        seed: of the place; None: always the oldest generated tokens.
    """

    def __init__(self, markers: MarkerIds | None, policy: Policy, prompt_len: int, seed: int | None) -> None:
        super().__init__(markers, policy)
        self._prompt_len, self._seed = prompt_len, seed
        self._rule = LiveContext(markers, policy)

    def push_inert(self, token: int) -> Step:
        self._rule.push_inert(token)
        return super().push_inert(token)

    def push(self, token: int) -> Step:
        step = super().push(token)
        self._rule.push(token)
        return step

    def _spans_to_prune(self, token: int) -> Spans:
        first = bisect_left(self.source, self._prompt_len)
        size = min(sum(stop - start for start, stop in self._rule._spans_to_prune(token)), len(self.live) - first)
        if size <= 0:
            return ()
        start = first
        if self._seed is not None:  # a function of the place in the trace, so that asking twice gives one answer
            start = random.Random(f"{self._seed} {self.length}").randint(first, len(self.live) - size)
        return ((start, start + size),)


def moved(index: int, gone: Spans) -> int:
    """Returns where a live index is when the spans `gone` have vanished; within one of them, where it was."""
    return index - sum(min(stop, index) - start for start, stop in gone if start < index)


def joined(spans: Sequence[tuple[int, int]]) -> Spans:
    """Returns the union of spans, ascending and apart from each other; empty ones vanish."""
    union: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], stop))
        else:
            union.append((start, stop))
    return tuple(union)
