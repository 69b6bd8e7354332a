"""The engine of this package, under any policy."""

from __future__ import annotations

import time
from typing import Any

import torch

from hcot_lmeval.bench.engines.contract import Setting
from hcot_lmeval.bench.timing import StepClock, Timing
from hcot_lmeval.bench.work import MARKERS
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.trace import Policy


class Ours:
    """Each slot holds exactly as many tokens as the rule says that a row needs: one more, and a row would end early."""

    forced = True

    def __init__(self, setting: Setting, policy: str, **options: Any) -> None:
        self.policy = policy
        self._work, self._on_logits = setting.work, setting.on_logits
        fixed = {"markers": MARKERS, "eos_ids": (), "slots": setting.work.batch, "self_check": False}
        fixed["max_context"] = setting.work.peak_live(policy)
        self._engine = Engine(setting.model, policy=policy, **{**fixed, **options, **setting.options})
        params = SamplingParams(max_gen_toks=setting.work.tokens)
        self._requests = [
            Request(str(row), prompt, params, forced_ids=trace)
            for row, (prompt, trace) in enumerate(zip(setting.work.prompts, setting.work.traces, strict=True))
        ]

    def run(self) -> Timing:
        clock = StepClock(self._work, prunes=self.policy != Policy.OFF)

        def on_logits(request: Request, sample: int, generated: int, logits: torch.Tensor) -> None:
            clock.tick(int(request.id), generated)
            if self._on_logits is not None:
                self._on_logits(int(request.id), generated, logits)

        start = time.perf_counter()
        done = {
            completion.request.id: completion for completion in self._engine.stream(self._requests, None, on_logits)
        }
        seconds = time.perf_counter() - start
        completions = [done[request.id] for request in self._requests]
        peak = max(completion.statistics.peak_live_tokens for completion in completions)
        return Timing(seconds, tuple(completion.token_ids for completion in completions), peak, clock.steps())

    def close(self) -> None:
        del self._engine


def prepare(setting: Setting, policy: str, **options: Any) -> Ours:
    """Makes the engine; `options` are fields of `EngineOptions`."""
    return Ours(setting, policy, **options)
