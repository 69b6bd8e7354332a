"""Sampling against transformers' own processors, and noise that depends on seed and count alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hcot_lmeval.engine.device.sampling import sampler_for
from hcot_lmeval.engine.sampling import (
    LEAST,
    Draw,
    SamplingParams,
    derive_seed,
    gumbel,
    penalised,
    sample,
    truncated,
)

CPU = torch.device("cpu")


def scores(rows: int = 6, size: int = 50) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_what_may_be_sampled_is_what_transformers_allows(params):
    expected = scores()
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in params:
            expected = warper(params[name])(None, expected)
    found = truncated(scores(), [SamplingParams(temperature=1, **params)] * 6)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(found[found.isfinite()], expected[expected.isfinite()])


def test_rows_with_different_settings_do_not_mix():
    settings = [SamplingParams(temperature=1, top_k=k, top_p=p) for k, p in ((1, 1.0), (0, 1.0), (3, 0.5))]
    together = truncated(scores(3), settings)
    for row, params in enumerate(settings):
        assert torch.equal(together[row], truncated(scores(3)[row : row + 1], [params])[0])


def test_repetition_penalty_is_that_of_transformers():
    seen = [3, 7, 7, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen] * 2), scores(2)).argmax(-1).tolist()
    draws = [Draw(SamplingParams(repetition_penalty=1.7), 0, 0, seen=seen)] * 2
    assert [c.token for c in sample(scores(2), draws)] == expected


def test_samples_follow_the_distribution():
    """Chi-square over 40,000 counts of one seed: the 99.99 % quantile at 7 degrees of freedom is 29.9."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.2])
    n = 40_000
    tokens = (logits + gumbel([1234] * n, range(n), 8, CPU)).argmax(-1)
    expected = torch.softmax(logits.double(), 0) * n
    chi = ((torch.bincount(tokens, minlength=8) - expected) ** 2 / expected).sum()
    assert chi < 29.9


def test_neighbouring_seeds_and_counts_are_independent():
    noise = gumbel([0] * 50 + list(range(1, 51)), [*range(50), *[0] * 50], 400, CPU)
    correlation = torch.corrcoef(noise)
    off_diagonal = correlation[~torch.eye(100, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 0.3  # 6 standard deviations of 400 independent pairs
    assert abs(noise.mean() - 0.5772) < 0.05
    assert abs(noise.var() - math.pi**2 / 6) < 0.1


def test_noise_depends_on_seed_and_count_alone():
    alone = gumbel([9], [4], 64, CPU)
    among_others = gumbel([1, 9, 3], [7, 4, 0], 64, CPU)
    assert torch.equal(alone[0], among_others[1])
    assert torch.equal(gumbel([9], [4], 32, CPU)[0], alone[0, :32])
    assert not torch.equal(alone, gumbel([9], [5], 64, CPU))
    assert torch.equal(gumbel([-1], [0], 8, CPU), gumbel([2**64 - 1], [0], 8, CPU))


def test_derived_seeds_are_distinct():
    seeds = {derive_seed(s, i) for s in range(100) for i in range(1, 100)}
    assert len(seeds) == 100 * 99
    assert derive_seed(42, 0) == 42


def test_temperature_zero_takes_the_largest():
    assert [c.token for c in sample(scores(), [Draw(SamplingParams(), 0, 0)] * 6)] == scores().argmax(-1).tolist()


def test_banned_tokens_are_not_chosen_and_logits_stay_as_they_were():
    logits = scores(1)
    best = int(logits.argmax())
    assert sample(logits, [Draw(SamplingParams(), 0, 0, banned=(best,))])[0].token != best
    assert torch.equal(logits, scores(1))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.3])
def test_logprobs_are_of_the_scaled_distribution(temperature):
    params = SamplingParams(temperature=temperature, top_k=3, logprobs=True)
    choice = sample(scores(1), [Draw(params, 5, 2)])[0]
    scaled = TemperatureLogitsWarper(temperature)(None, scores(1)) if temperature else scores(1)
    assert choice.logprob == pytest.approx(scaled.log_softmax(-1)[0, choice.token].item(), abs=1e-12)


def test_forced_tokens_get_the_models_logprob():
    draw = Draw(SamplingParams(temperature=1.0, logprobs=True), 5, 2, forced=17)
    choice = sample(scores(1), [draw])[0]
    assert choice.token == 17
    assert choice.logprob == choice.legal_logprob == pytest.approx(scores(1).log_softmax(-1)[0, 17].item(), abs=1e-12)


@pytest.mark.parametrize("chooser", [None, sampler_for(torch.float32)])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": LEAST},
        {"temperature": 1.0, "top_p": LEAST},
        {"temperature": LEAST, "top_p": LEAST, "repetition_penalty": 1e-6},
        {"temperature": LEAST, "top_k": 2**63 - 1, "repetition_penalty": 1e6},
    ],
)
def test_the_least_that_is_allowed_takes_the_largest(chooser, params):
    logits = scores().float() * 1000
    draws = [Draw(SamplingParams(**params, logprobs=True), 5, 2, seen=[1])] * 6
    expected = penalised(logits, draws).argmax(-1).tolist()
    choices = sample(logits, draws, chooser)
    assert [choice.token for choice in choices] == expected
    assert params.get("temperature") == 1 or [choice.logprob for choice in choices] == [0.0] * 6


@pytest.mark.parametrize(
    "bad",
    [
        {"max_gen_toks": 0},
        {"min_gen_toks": 300},
        {"temperature": -0.1},
        {"temperature": 1e-39},
        {"temperature": 1e39},
        {"top_p": 1e-46},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e39},
        {"top_k": 2**63},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.5},
        {"repetition_penalty": 0.0},
        {"stop_strings": ("",)},
        {"n": 0},
    ],
)
def test_values_out_of_range_are_refused_by_name(bad):
    ((name, _),) = bad.items()
    with pytest.raises(ValueError, match=name):
        SamplingParams(**bad)
