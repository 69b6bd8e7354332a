"""`model.generate` of transformers, which prunes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from bench.engines.contract import OnLogits, Setting
from bench.timing import StepClock, Timing
from bench.work import PAD

CERTAIN = 1e9
"""A score beyond all others; infinity has no softmax."""


class Forced(LogitsProcessor):
    """Makes a decoder take given tokens, by one number written to each row of the scores.

    Args:
        tokens: for each row the tokens to take, all of one length: [rows, steps].
        tick: called with the number of the step, and the logits, when they are there.
    """

    def __init__(self, tokens: torch.Tensor, tick: Callable[[int, torch.Tensor], None]) -> None:
        self._tokens, self._tick = tokens, tick
        self._step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._tick(self._step, scores)
        scores.scatter_(1, self._tokens[:, self._step, None], CERTAIN)
        self._step += 1
        return scores


def decode(
    setting: Setting, ids: torch.Tensor, mask: torch.Tensor, forced: Forced, *, steps: int, stop: int | None
) -> Any:
    """Calls `model.generate` and returns what it wrote: [rows, at most `steps`], padded once a row has stopped."""
    warm = asdict(setting.sampling) if setting.sampling.warm else {}
    out = setting.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=bool(warm),
        **warm,
        eos_token_id=stop,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([forced]),
    )
    return out[:, ids.shape[1] :]


def show(on_logits: OnLogits | None, rows: Sequence[int], generated: int, logits: torch.Tensor) -> None:
    """Hands the logits of some rows to `on_logits`, if there is one."""
    if on_logits is not None:
        for row in rows:
            on_logits(row, generated, logits[row])


class Generate:
    """All rows in step, each with its whole trace in the cache."""

    policy = "off"
    forced = True

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        device = setting.model.device
        self._ids = torch.tensor(setting.work.prompts, device=device)
        self._tokens = torch.tensor(setting.work.traces, device=device)

    def run(self) -> Timing:
        work, rows = self._setting.work, range(self._setting.work.batch)
        clock = StepClock(work, prunes=False)

        def tick(step: int, logits: torch.Tensor) -> None:
            clock.tick_all(rows, step)
            show(self._setting.on_logits, rows, step, logits)

        start = time.perf_counter()
        forced, mask = Forced(self._tokens, tick), torch.ones_like(self._ids)
        out = decode(self._setting, self._ids, mask, forced, steps=work.tokens, stop=None).tolist()
        seconds = time.perf_counter() - start
        return Timing(seconds, tuple(map(tuple, out)), work.prompt + work.tokens, clock.steps())

    def close(self) -> None:
        """Nothing is held."""


def prepare(setting: Setting) -> Generate:
    """Makes it."""
    return Generate(setting)
