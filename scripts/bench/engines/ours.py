"""The engine of this package, under any policy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.engines import Contender, Setting, UnavailableError
from bench.timing import StepClock, Timing
from bench.work import MARKERS
from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.engine.engine import OnLogits
from hcot_lmeval.trace import Policy


class Ours(Contender):
    """Each slot holds exactly as many tokens as the rule says that a row needs; with one less a row would end early.

    Where the device runs the steps by itself, watching each would bring the host back in. There the mean step is told.

    Args:
        setting: what to get ready for.
        policy: of the engine.
        options: fields of `EngineOptions`; those of the setting win.
    """

    def __init__(self, setting: Setting, policy: str, **options: Any) -> None:
        super().__init__(setting)
        self.policy, work, options = policy, setting.work, {**options, **setting.options}
        if setting.on_logits is not None and options.get("loop") == "device":
            raise UnavailableError("loop=device shows no logits; its tests compare them")
        loop = options.get("loop", "auto")
        alone = loop == "device" or (loop == "auto" and setting.model.device.type == "cuda")
        self._watched = setting.on_logits is not None or not alone
        fixed = {"markers": MARKERS, "eos_ids": (), "slots": work.batch, "self_check": False}
        fixed["max_context"] = work.peak_live(policy)
        self._engine = Engine(setting.model, policy=policy, **{**fixed, **options})
        params = SamplingParams(max_gen_toks=work.tokens, **asdict(setting.sampling))
        self.requests = [
            Request(str(row), prompt, params, forced_ids=trace)
            for row, (prompt, trace) in enumerate(zip(work.prompts, work.traces, strict=True))
        ]

    def run(self) -> Timing:
        clock = StepClock(self.setting.work, prunes=self.policy != Policy.OFF)

        def on_logits(request: Request, sample: int, generated: int, logits: torch.Tensor) -> None:
            clock.tick([int(request.id)], generated)
            self.setting.show(int(request.id), generated, logits)

        seconds, done = self._generate(self.requests, on_logits if self._watched else None)
        peak = max(completion.statistics.peak_live_tokens for completion in done)
        tokens = tuple(completion.token_ids for completion in done)
        return Timing(seconds, tokens, peak, clock.steps(), None if self._watched else self._mean_step(seconds))

    def _mean_step(self, seconds: float) -> float:
        """What a step took, of a run that took so long: reading the prompts is timed once more, and taken off."""
        params = replace(self.requests[0].params, max_gen_toks=1)
        prompts = [replace(request, params=params, forced_ids=request.forced_ids[:1]) for request in self.requests]
        return (seconds - self._generate(prompts, None)[0]) / (self.setting.work.tokens - 1)

    def _generate(self, requests: Sequence[Request], on_logits: OnLogits | None) -> tuple[float, list[Completion]]:
        """Returns the seconds it took, and the completions in the order of the requests."""
        start = time.perf_counter()
        done = {completion.request.id: completion for completion in self._engine.stream(requests, None, on_logits)}
        seconds = time.perf_counter() - start
        return seconds, [done[request.id] for request in requests]

    def close(self) -> None:
        del self._engine
