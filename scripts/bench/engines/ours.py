"""The engine of this package, under any policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.engines.contract import Setting, UnavailableError
from bench.timing import StepClock, Timing
from bench.work import MARKERS
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.engine import OnLogits
from hcot_lmeval.engine.rows import Completion
from hcot_lmeval.trace import Policy


class Ours:
    """Each slot holds exactly as many tokens as the rule says that a row needs; with one less a row would end early.

    Where the device runs the steps by itself, watching each would bring the host back in. There the mean step is told.
    """

    forced = True

    def __init__(self, setting: Setting, policy: str, **options: Any) -> None:
        self.policy = policy
        self._work, self._on_logits = setting.work, setting.on_logits
        self._watched = setting.on_logits is not None or not _steps_alone({**options, **setting.options}, setting.model)
        fixed = {"markers": MARKERS, "eos_ids": (), "slots": setting.work.batch, "self_check": False}
        fixed["max_context"] = setting.work.peak_live(policy)
        self._engine = Engine(setting.model, policy=policy, **{**fixed, **options, **setting.options})
        params = SamplingParams(max_gen_toks=setting.work.tokens, **asdict(setting.sampling))
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

        seconds, done = self._generate(self._requests, on_logits if self._watched else None)
        peak = max(completion.statistics.peak_live_tokens for completion in done)
        tokens = tuple(completion.token_ids for completion in done)
        return Timing(seconds, tokens, peak, clock.steps(), None if self._watched else self._mean_step(seconds))

    def _mean_step(self, seconds: float) -> float:
        """What a step took, of a run that took so long: reading the prompts is timed once more, and taken off."""
        params = replace(self._requests[0].params, max_gen_toks=1)
        prompts = [replace(request, params=params, forced_ids=request.forced_ids[:1]) for request in self._requests]
        return (seconds - self._generate(prompts, None)[0]) / (self._work.tokens - 1)

    def _generate(self, requests: Sequence[Request], on_logits: OnLogits | None) -> tuple[float, list[Completion]]:
        """Returns the seconds it took, and the completions in the order of the requests."""
        start = time.perf_counter()
        done = {completion.request.id: completion for completion in self._engine.stream(requests, None, on_logits)}
        seconds = time.perf_counter() - start
        return seconds, [done[request.id] for request in requests]

    def close(self) -> None:
        del self._engine


def _steps_alone(options: Mapping[str, Any], model: Any) -> bool:
    """Whether the steps run on the device without the host, if nobody watches; see the option `loop`."""
    loop = options.get("loop", "auto")
    return loop == "device" or (loop == "auto" and model.device.type == "cuda")


def prepare(setting: Setting, policy: str, **options: Any) -> Ours:
    """Makes the engine; `options` are fields of `EngineOptions`.

    Raises:
        UnavailableError: logits are asked for that never leave the device.
    """
    if setting.on_logits is not None and setting.options.get("loop") == "device":
        raise UnavailableError("loop=device shows no logits; its tests compare them")
    return Ours(setting, policy, **options)
