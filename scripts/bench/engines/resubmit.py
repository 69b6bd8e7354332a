"""Pruning with what any library offers: stop at the end of a block, prune the ids, and ask again from the start."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bench.engines.contract import Setting
from bench.engines.generate import Forced, decode
from bench.timing import StepClock, Timing
from bench.work import CLOSE, PAD
from hcot_lmeval.trace import LiveContext, Policy


class Resubmit:
    """Rounds of `model.generate`, each of which reads the live context of every row anew.

    A row that has stopped waits for the others. Rows of different lengths are padded on the left.
    """

    policy = "recompute"
    forced = True

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def run(self) -> Timing:
        work = self._setting.work
        clock = StepClock(work, prunes=True)
        contexts = [work.context(row, Policy.RECOMPUTE) for row in range(work.batch)]
        written: list[list[int]] = [[] for _ in range(work.batch)]
        start = time.perf_counter()
        while rows := [row for row in range(work.batch) if len(written[row]) < work.tokens]:
            new = self._round(rows, contexts, [len(written[row]) for row in rows], clock)
            for row, tokens in zip(rows, new, strict=True):
                written[row] += tokens
                for token in tokens:
                    contexts[row].push(token)
        seconds = time.perf_counter() - start
        return Timing(seconds, tuple(map(tuple, written)), max(c.peak for c in contexts), clock.steps())

    def _round(
        self, rows: Sequence[int], contexts: Sequence[LiveContext], done: Sequence[int], clock: StepClock
    ) -> list[list[int]]:
        """Decodes until every row has ended a block or its trace; returns what each wrote."""
        model, work = self._setting.model, self._setting.work
        wanted = [_segment(work.traces[row][first:]) for row, first in zip(rows, done, strict=True)]
        steps = max(map(len, wanted))

        def tick(step: int, logits: torch.Tensor) -> None:
            for index, (row, first) in enumerate(zip(rows, done, strict=True)):
                if step < len(wanted[index]):
                    clock.tick(row, first + step)
                    if self._setting.on_logits is not None:
                        self._setting.on_logits(row, first + step, logits[index])

        tokens = torch.tensor([[*some, *[CLOSE] * (steps - len(some))] for some in wanted], device=model.device)
        ids, mask = _padded([contexts[row].live for row in rows], model.device)
        out = decode(self._setting, ids, mask, Forced(tokens, tick), steps=steps, stop=CLOSE).tolist()
        return [written[: len(some)] for written, some in zip(out, wanted, strict=True)]

    def close(self) -> None:
        """Nothing is held."""


def _segment(tokens: Sequence[int]) -> Sequence[int]:
    """What the script wants up to the end of a block, or of the trace."""
    return tokens[: tokens.index(CLOSE) + 1] if CLOSE in tokens else tokens


def _padded(live: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows that end together: both [rows, longest]."""
    longest = max(map(len, live))
    ids = [[*[PAD] * (longest - len(row)), *row] for row in live]
    mask = [[*[0] * (longest - len(row)), *[1] * len(row)] for row in live]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def prepare(setting: Setting) -> Resubmit:
    """Makes it."""
    return Resubmit(setting)
