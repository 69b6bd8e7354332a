"""Continuous batching of transformers (`model.generate_batch`), which prunes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.engines.contract import Setting, UnavailableError
from bench.timing import StepClock, Timing
from bench.work import PAD

BLOCK = 256
"""Tokens of a block of its cache, by default."""

STEP_TOKENS = 4096
"""Most tokens of a step. By default it would take nine tenths of the memory for its cache, and fill it with zeros."""


class Continuous:
    """One manager for each run, since it changes the model's attention while it lives.

    Time runs from the first forward to the last token: starting and stopping the manager, and its thread, are left out.
    It takes no logits processor, so the model's own output is changed, by the position of each token; rows that
    generate different traces cannot be told apart that way.
    """

    policy = "off"
    forced = True

    def __init__(self, setting: Setting) -> None:
        if setting.sampling.warm:
            raise UnavailableError("its tokens can be forced only if it decodes greedily")
        if not setting.work.aligned:
            raise UnavailableError("its tokens can be forced only if all rows generate the same trace")
        self._setting = setting
        work = setting.work
        table = [PAD] * (work.prompt - 1) + list(work.traces[0]) + [PAD]
        self._next = torch.tensor(table, device=setting.model.device)
        self._generation = GenerationConfig(
            max_new_tokens=work.tokens, do_sample=False, eos_token_id=-1, pad_token_id=PAD
        )
        blocks = work.batch * -(-(work.prompt + work.tokens) // BLOCK)
        room = max(STEP_TOKENS, work.batch)
        self._config = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=room, allow_block_sharing=False)

    def run(self) -> Timing:
        work, model = self._setting.work, self._setting.model
        attention = model.config._attn_implementation
        with self._forcing() as starts:
            try:
                done = model.generate_batch(
                    [list(prompt) for prompt in work.prompts],
                    generation_config=self._generation,
                    continuous_batching_config=self._config,
                    record_timestamps=True,
                    warmup=False,
                )
            finally:
                model.set_attn_implementation(attention)
        outputs = list(done.values())
        times = sorted((at, row, n) for row, out in enumerate(outputs) for n, at in enumerate(out.timestamps))
        clock = StepClock(work, prunes=False)
        for tick in times:
            clock.add(*tick)
        tokens = tuple(tuple(out.generated_tokens) for out in outputs)
        return Timing(times[-1][0] - starts[0], tokens, work.prompt + work.tokens, clock.steps())

    @contextmanager
    def _forcing(self) -> Iterator[list[float]]:
        """While it is open the model prefers the tokens of the script; yields the times at which forwards began."""
        starts: list[float] = []

        def begin(module: Any, args: Any, kwargs: Any) -> None:
            starts.append(time.perf_counter())

        def force(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            logits, positions = output.logits[0], kwargs["position_ids"][0]
            if "logits_to_keep" in kwargs:
                positions = positions[kwargs["logits_to_keep"]]
            wanted = self._next[positions.clamp(max=len(self._next) - 1)]
            logits.scatter_(1, wanted[:, None], float("inf"))

        model = self._setting.model
        hooks = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(force, with_kwargs=True),
        ]
        try:
            yield starts
        finally:
            for hook in hooks:
                hook.remove()

    def close(self) -> None:
        """Nothing is held between runs."""


def prepare(setting: Setting) -> Continuous:
    """Makes it."""
    return Continuous(setting)
