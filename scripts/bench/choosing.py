"""What choosing a token costs: the ways to do it on equal logits, by turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bench.clock import seconds
from bench.measure import Report
from bench.work import Sampling
from hcot_lmeval.engine.device.sampling import Sampler, kernel_for
from hcot_lmeval.engine.device.state import SamplingRows
from hcot_lmeval.engine.native import sampler_for
from hcot_lmeval.engine.sampling import Draw, SamplingParams, hash_places, noise_start

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
    times = {way: ChoiceTime(way, sampling, batch) for way in ways}
    ready: dict[str, Chooser] = {}
    for way, chooser in ways.items():
        if isinstance(chooser, str):
            times[way].reason = chooser
        else:
            ready[way] = chooser
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
    batch, device = len(logits), logits.device
    starts = torch.tensor([noise_start(row, 0) for row in range(batch)], device=device)
    truncates = sampling.top_p < 1 or sampling.top_k > 0
    plain = Sampler(hash_places(logits.shape[1], device), truncates, most=sampling.top_k)
    numbers = (sampling.temperature, sampling.top_p, 0.0)
    settings = SamplingRows(*(torch.full((batch,), number, device=device) for number in numbers))
    rest = torch.full((batch,), sampling.top_k, device=device), starts
    warpers = _warpers(sampling)

    def by_transformers() -> list[int]:
        return torch.multinomial(warpers(None, logits).softmax(-1), 1)[:, 0].tolist()

    def by_torch() -> list[int]:
        return plain.sampled(logits / sampling.temperature, settings, *rest).tolist()

    return {
        "transformers": by_transformers,
        "torch": by_torch,
        "native": _natively(logits, sampling),
        "triton": _by_triton(logits, sampling, settings, rest),
    }


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """What `model.generate` makes of the settings."""
    made = [TemperatureLogitsWarper(sampling.temperature)]
    made += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    made += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(made)


def _natively(logits: torch.Tensor, sampling: Sampling) -> Chooser | str:
    if logits.device.type != "cpu":
        return "on the CPU only"
    chooser = sampler_for(logits.dtype)
    if chooser is None:
        return "no C++ compiler, or it failed; the log says why"
    params = SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    draws = [Draw(params, row, 0) for row in range(len(logits))]
    return lambda: chooser(logits, draws)


def _by_triton(
    logits: torch.Tensor, sampling: Sampling, settings: SamplingRows, rest: tuple[torch.Tensor, torch.Tensor]
) -> Chooser | str:
    kernel = kernel_for(logits.device) if logits.device.type == "cuda" else None
    if kernel is None:
        return "on CUDA only" if logits.device.type != "cuda" else "it does not run here; the log says why"
    truncates = sampling.top_p < 1
    return lambda: kernel(logits / sampling.temperature, *settings, *rest, sampling.top_k, truncates).tolist()
