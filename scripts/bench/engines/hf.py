"""What transformers offers: `model.generate`, the same with stopping and resubmitting, and continuous batching."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList

from bench.engines import Contender, Setting, UnavailableError
from bench.timing import StepClock, Timing
from bench.work import CLOSE, PAD
from hcot_lmeval.trace import LiveContext

CERTAIN = 1e9
"""A score beyond all others; infinity has no softmax."""
CACHE_BLOCK = 256
"""Tokens of a block of the cache of continuous batching, by default."""
STEP_TOKENS = 4096
"""Most tokens of its steps. By default it would take nine tenths of the memory for its cache and fill it with zeros."""


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
    how = asdict(setting.sampling) if setting.sampling.samples else {}
    out = setting.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=bool(how),
        **how,
        eos_token_id=stop,
        pad_token_id=PAD,
        logits_processor=LogitsProcessorList([forced]),
    )
    return out[:, ids.shape[1] :]


class Generate(Contender):
    """`model.generate`: all rows in step, each with its whole trace in the cache."""

    def run(self) -> Timing:
        work, device, rows = self.setting.work, self.setting.model.device, range(self.setting.work.batch)
        ids, tokens = (torch.tensor(part, device=device) for part in (work.prompts, work.traces))
        clock = StepClock(work, prunes=False)

        def tick(step: int, logits: torch.Tensor) -> None:
            clock.tick(rows, step)
            for row in rows:
                self.setting.show(row, step, logits[row])

        start = time.perf_counter()
        forced, mask = Forced(tokens, tick), torch.ones_like(ids)
        out = decode(self.setting, ids, mask, forced, steps=work.tokens, stop=None).tolist()
        seconds = time.perf_counter() - start
        return Timing(seconds, tuple(map(tuple, out)), work.prompt + work.tokens, clock.steps())


class Resubmit(Contender):
    """Pruning with what any library offers: stop at the end of a block, prune the ids, and ask again from the start.

    Rounds of `model.generate`, each of which reads the live context of every row anew. A row that has stopped waits for
    the others. Rows of different lengths are padded on the left.
    """

    policy = "recompute"

    def run(self) -> Timing:
        work = self.setting.work
        clock = StepClock(work, prunes=True)
        contexts = [work.context(row, self.policy) for row in range(work.batch)]
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
        device, work = self.setting.model.device, self.setting.work
        scripts = [_segment(work.traces[row][first:]) for row, first in zip(rows, done, strict=True)]
        steps = max(map(len, scripts))

        def tick(step: int, logits: torch.Tensor) -> None:
            for index, (row, first) in enumerate(zip(rows, done, strict=True)):
                if step < len(scripts[index]):
                    clock.tick([row], first + step)
                    self.setting.show(row, first + step, logits[index])

        tokens = torch.tensor([[*some, *[CLOSE] * (steps - len(some))] for some in scripts], device=device)
        ids, mask = _padded([contexts[row].live for row in rows], device)
        out = decode(self.setting, ids, mask, Forced(tokens, tick), steps=steps, stop=CLOSE).tolist()
        return [new[: len(some)] for new, some in zip(out, scripts, strict=True)]


def _segment(tokens: Sequence[int]) -> Sequence[int]:
    """The script up to the end of a block, or of the trace."""
    return tokens[: tokens.index(CLOSE) + 1] if CLOSE in tokens else tokens


def _padded(live: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows that end together: both [rows, longest]."""
    longest = max(map(len, live))
    ids = [[*[PAD] * (longest - len(row)), *row] for row in live]
    mask = [[*[0] * (longest - len(row)), *[1] * len(row)] for row in live]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Continuous(Contender):
    """Continuous batching, `model.generate_batch`; one manager a run, since it changes the attention while it lives.

    Time runs from the first forward to the last token: starting and stopping the manager, and its thread, are left out.
    It takes no logits processor, so the model's own output is changed, by the position of each token; rows that
    generate different traces cannot be told apart that way.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        work = setting.work
        if setting.sampling.samples:
            raise UnavailableError("its tokens can be forced only if it decodes greedily")
        if not work.aligned:
            raise UnavailableError("its tokens can be forced only if all rows generate the same trace")
        table = [PAD] * (work.prompt - 1) + list(work.traces[0]) + [PAD]
        self._next = torch.tensor(table, device=setting.model.device)
        limits = {"max_new_tokens": work.tokens, "eos_token_id": -1, "pad_token_id": PAD}
        self._generation = GenerationConfig(do_sample=False, **limits)
        blocks = work.batch * -(-(work.prompt + work.tokens) // CACHE_BLOCK)
        room = max(STEP_TOKENS, work.batch)
        self._config = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=room, allow_block_sharing=False)

    def run(self) -> Timing:
        work, model = self.setting.work, self.setting.model
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
        for at, row, generated in times:
            clock.tick([row], generated, at)
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
            following = self._next[positions.clamp(max=len(self._next) - 1)]
            logits.scatter_(1, following[:, None], float("inf"))

        model = self.setting.model
        hooks = [
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(force, with_kwargs=True),
        ]
        try:
            yield starts
        finally:
            for hook in hooks:
                hook.remove()
