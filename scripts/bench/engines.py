"""The engines that are timed: what each has to do, and their names on the command line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM

from bench.work import MARKERS, PAD, SHAPES, Work
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.slots import move_to_huge_pages

POSITIONS = 65536
"""`max_position_embeddings`: beyond every trace that is timed. It costs no memory."""
CERTAIN = 1e9
"""A score beyond all others; infinity has no softmax."""


def make_model(shape: str, dtype: str = "float32", device: str = "cpu", threads: int | None = None) -> Any:
    """Returns a `Qwen2ForCausalLM` with random weights, in evaluation mode; the same ones at each call.

    On the CPU they lie on huge pages, where there are any, for every engine that shares the model.

    Args:
        shape: a key of `SHAPES`.
        dtype: one of `DTYPES`.
        device: as torch names it.
        threads: CPU threads from now on; as many as before by default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(**SHAPES[shape], max_position_embeddings=POSITIONS, tie_word_embeddings=True)
        model = Qwen2ForCausalLM(config)
    model = model.to(device, getattr(torch, dtype)).eval()
    move_to_huge_pages(model)
    return model


class UnavailableError(RuntimeError):
    """The engine cannot do this work on this machine; the message says why."""


class Timing(NamedTuple):
    """One run.

    Attributes:
        seconds: wall time, prefill included.
        tokens: what each row generated.
        peak_live: the largest number of tokens whose keys and values one row held or was about to hold.
    """

    seconds: float
    tokens: tuple[tuple[int, ...], ...]
    peak_live: int


@dataclass(frozen=True)
class Setting:
    """What an engine gets ready for.

    Attributes:
        model: a `Qwen2ForCausalLM`, which several engines share.
        work: the prompts, and the tokens to generate.
        threads: CPU threads.
        options: fields of `EngineOptions` for our own engines.
        params: temperature, top-p and top-k: how a token is chosen before that of the script takes its place.
    """

    model: Any
    work: Work
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    params: SamplingParams = field(default_factory=SamplingParams)


class Contender:
    """An engine that gets ready once and then does the same work any number of times.

    Attributes:
        policy: what it does at the end of a block.

    Raises:
        UnavailableError: it cannot do this work here.
    """

    policy = "off"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def run(self) -> Timing:
        """Does the work once, and returns when the last token is there."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives memory and files back."""


class Forced(LogitsProcessor):
    """Makes `model.generate` take given tokens, [rows, steps], by one number written to each row of the scores."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._steps = iter(tokens.T[:, :, None])

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.scatter_(1, next(self._steps), CERTAIN)


class Generate(Contender):
    """`model.generate`: all rows in step, each with its whole trace in the cache."""

    def run(self) -> Timing:
        work, model, params = self.setting.work, self.setting.model, self.setting.params
        sampled = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        start = time.perf_counter()
        ids, tokens = (torch.tensor(part, device=model.device) for part in (work.prompts, work.traces))
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.tokens,
            eos_token_id=None,
            pad_token_id=PAD,
            logits_processor=LogitsProcessorList([Forced(tokens)]),
            **({"do_sample": True, **sampled} if params.temperature else {"do_sample": False}),
        )
        written = out[:, work.prompt :].tolist()
        return Timing(time.perf_counter() - start, tuple(map(tuple, written)), work.prompt + work.tokens)


class Ours(Contender):
    """Each slot holds exactly as many tokens as the rule says that a row needs; with one less a row would end early."""

    def __init__(self, setting: Setting, policy: str) -> None:
        super().__init__(setting)
        self.policy, work = policy, setting.work
        fixed: dict[str, Any] = {"markers": MARKERS, "eos_ids": (), "slots": work.batch, "self_check": False}
        fixed["max_context"] = work.peak_live(policy)
        self._engine = Engine(setting.model, policy=policy, **{**fixed, **setting.options})
        params = replace(setting.params, max_gen_toks=work.tokens)
        self.requests = [
            Request(str(row), prompt, params, forced_ids=trace)
            for row, (prompt, trace) in enumerate(zip(work.prompts, work.traces, strict=True))
        ]

    def run(self) -> Timing:
        start = time.perf_counter()
        done = self._engine.generate(self.requests)
        seconds = time.perf_counter() - start
        peak = max(completion.statistics.peak_live_tokens for completion in done)
        return Timing(seconds, tuple(completion.token_ids for completion in done), peak)

    def close(self) -> None:
        del self._engine


def prepare(name: str, setting: Setting) -> Contender:
    """Makes an engine of `work.ENGINES` ready for its work.

    Raises:
        UnavailableError: it cannot do this work here; the message says why.
    """
    if name == "generate":
        return Generate(setting)
    if name.startswith("llama.cpp"):
        llama: Contender = import_module("bench.llama").Llama(setting, flash=name.endswith("+flash"))
        return llama
    return Ours(setting, name)
