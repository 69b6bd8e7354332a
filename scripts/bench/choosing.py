"""What choosing a token costs: the ways to do it on equal logits, by turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bench.output import Report
from bench.timing import seconds
from bench.work import Sampling
from hcot_lmeval.engine.device.sampling import choose_by, kernel_for
from hcot_lmeval.engine.native.sampler import sampler_for
from hcot_lmeval.engine.sampling import Draw, SamplingParams, choose

SPREAD = 3.0
"""Standard deviation of the logits, which are normally distributed."""
SETTINGS = (Sampling(0.6), Sampling(0.6, 0.95), Sampling(0.6, 0.95, 20))
"""As tasks ask for them; the last is the advice for Qwen3."""
RUNS = 5
"""Timed together; their median counts."""

Chooser = Callable[[], list[int]]


@dataclass
class ChoiceTime:
    """One way to choose tokens.

    Attributes:
        way: `transformers`, its warpers and `torch.multinomial`; `torch`, the noise of this package and PyTorch's sort;
            `native` or `triton`, its kernels.
        sampling: temperature, top-p, top-k.
        batch: rows.
        seconds: of a choice for all rows, once for each repeat.
        reason: why it did not run; empty if it did.
    """

    way: str
    sampling: Sampling
    batch: int
    seconds: list[float] = field(default_factory=list)
    reason: str = ""

    @property
    def ms(self) -> float:
        return 1000 * statistics.median(self.seconds)


def time_choices(
    batches: Sequence[int], vocabulary: int, device: torch.device, repeats: int, report: Report
) -> list[ChoiceTime]:
    """Times every way for every batch and setting; the ways take turns.

    Args:
        batches: rows side by side.
        vocabulary: tokens.
        device: where the logits are.
        repeats: times each way has a turn, after one to warm up.
        report: called with what is being done.

    Raises:
        ValueError: there is nothing to choose from, or no row.
        AssertionError: a kernel chooses other tokens than PyTorch.
    """
    if vocabulary < 2 or min(batches) < 1:
        raise ValueError(f"vocabulary={vocabulary}, batch={min(batches)}: at least 2 tokens and 1 row are needed")
    found = []
    for batch in batches:
        logits = SPREAD * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(batch))
        for sampling in SETTINGS:
            report(f"batch {batch}, {sampling}")
            found += _by_turns(_ways(logits.to(device), sampling), sampling, batch, repeats, device)
    return found


def _by_turns(
    ways: dict[str, Chooser | str], sampling: Sampling, batch: int, repeats: int, device: torch.device
) -> list[ChoiceTime]:
    reasons = {way: chooser if isinstance(chooser, str) else "" for way, chooser in ways.items()}
    times = {way: ChoiceTime(way, sampling, batch, reason=reason) for way, reason in reasons.items()}
    ready = {way: chooser for way, chooser in ways.items() if not isinstance(chooser, str)}
    expected = ready["torch"]()
    for way, chooser in ready.items():
        if chooser() != expected and way != "transformers":
            raise AssertionError(f"{way} chose other tokens than PyTorch: batch {batch}, {sampling}")
    for _ in range(repeats):
        for way, chooser in ready.items():
            times[way].seconds.append(seconds(chooser, device, runs=RUNS))
    return list(times.values())


def _ways(logits: torch.Tensor, sampling: Sampling) -> dict[str, Chooser | str]:
    """The ways, or why there is none here."""
    params = SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    draws, warpers = [Draw(params, row, 0) for row in range(len(logits))], _warpers(sampling)
    found: dict[str, Chooser | str] = {
        "transformers": lambda: torch.multinomial(warpers(None, logits).softmax(-1), 1)[:, 0].tolist(),
        "torch": lambda: choose(logits, draws)[0],
        "native": "on the CPU only",
        "triton": "on CUDA only",
    }
    if logits.device.type == "cpu":
        native = sampler_for(logits.dtype)
        found["native"] = (lambda: native(logits, draws)) if native else "no C++ compiler, or it failed; see the log"
    if logits.device.type == "cuda":
        kernel = kernel_for(logits.device)
        found["triton"] = (lambda: choose_by(kernel, logits, draws)) if kernel else "it does not run here; see the log"
    return found


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """What `model.generate` makes of the settings."""
    made = [TemperatureLogitsWarper(sampling.temperature)]
    made += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    made += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(made)
