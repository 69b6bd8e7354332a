"""Compiled choice of tokens against the one that sorts and makes noise for the whole vocabulary."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.device import sampling
from hcot_lmeval.engine.device.sampling import NativeSampler, sampler_for
from hcot_lmeval.engine.native import build
from hcot_lmeval.engine.native.build import KernelUnavailableError
from hcot_lmeval.engine.sampling import Draw, choose, sample
from tests.reference import EOS, MARKERS
from tests.tiny import tiny_model

DTYPES = {"float32": torch.float32, "float64": torch.float64}
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.6, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 10**6]),
    top_p=st.sampled_from([1.0, 0.9991, 0.9503, 0.5007, 1e-9]),  # no share of equal tokens, where rounding would decide
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
DRAWS = st.tuples(PARAMS, st.integers(0, 2**64 - 1), st.integers(0, 10**6)).map(lambda given: Draw(*given))
SIZES = st.sampled_from([1, 2, 15, 16, 17, 255, 256, 257, 700])
"""Around the width of a vector, and the number of tokens that the kernel looks at together."""


@st.composite
def logits(draw, rows: int) -> torch.Tensor:
    """Peaked, flat, with many ties, and with tokens that cannot come."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size, dtype = draw(SIZES), draw(st.sampled_from(list(DTYPES.values())))
    made = torch.randn(rows, size, generator=generator, dtype=dtype) * draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    if draw(st.booleans()):
        made = made.round()
    if draw(st.booleans()):
        made[:, torch.randperm(size, generator=generator)[: size // 2]] = -math.inf
    return made


@settings(max_examples=300)
@given(st.data())
def test_it_chooses_what_sorting_and_noise_for_all_choose(data):
    draws = data.draw(st.lists(DRAWS, min_size=1, max_size=4))
    scores = data.draw(logits(len(draws)))
    assert sampler_for(scores.dtype)(scores, draws) == choose(scores, draws)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_vocabulary(dtype):
    """That of Qwen; the edge of top-p is met by no token within the rounding of float32 sums."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(6, 151_936, generator=generator, dtype=DTYPES[dtype]) * 4
    warm = ({}, {"top_p": 0.95}, {"top_k": 20}, {"top_k": 50, "top_p": 0.8}, {"min_p": 0.1}, {"top_p": 0.3})
    draws = [Draw(SamplingParams(temperature=0.6 + row, **more), row, 7) for row, more in enumerate(warm)]
    assert sampler_for(scores.dtype)(scores, draws) == choose(scores, draws)[0]


def test_noise_decides():
    """Were the winner always the first, most comparisons above would pass all the same."""
    scores = torch.zeros(1, 500)
    params = SamplingParams(temperature=1.0, top_p=0.5)
    found = {sampler_for(torch.float32)(scores, [Draw(params, seed, 0)])[0] for seed in range(200)}
    assert len(found) > 100 and max(found) < 250, "ties rank by id, and half of the mass is kept"


def test_neither_other_rows_nor_threads_matter():
    scores = torch.randn(5, 3000, generator=torch.Generator().manual_seed(2))
    draws = [Draw(SamplingParams(temperature=0.8, top_p=0.9), seed, seed) for seed in range(5)]
    chooser, threads = sampler_for(torch.float32), torch.get_num_threads()
    alone = [chooser(scores[row : row + 1], draws[row : row + 1])[0] for row in range(5)]
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            assert chooser(scores, draws) == alone
    finally:
        torch.set_num_threads(threads)


def test_illegal_tokens_are_left_to_the_other_one():
    scores = torch.randn(8, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first = [int(row.argmax()) for row in scores]
    params = [SamplingParams(temperature=row % 2 * 0.7, top_k=3, logprobs=True) for row in range(8)]
    draws = [Draw(p, row, 1, illegal=(first[row], 5)) for row, p in enumerate(params)]
    draws[3] = draws[3]._replace(banned=(first[3],))
    draws[4] = draws[4]._replace(forced=9)
    slow, fast = sample(scores.clone(), draws), sample(scores, draws, sampler_for(torch.float64))
    assert fast == slow
    assert any(choice.token != choice.preferred for choice in fast)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_engines_write_the_same_with_either(kind, monkeypatch):
    """In double precision the model's own modules compute, so only the choice of tokens differs."""
    model = tiny_model(kind, torch.float64, initializer_range=0.1)
    warm = [{"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.2, "top_k": 30, "min_p": 0.01}, {}]
    requests = [
        Request(str(i), (9 + i, 10), SamplingParams(max_gen_toks=30, seed=i, n=2, **some), forced_ids=(3, 40, 4, 42, 5))
        for i, some in enumerate(warm)
    ]
    calls = []
    run = NativeSampler.__call__
    monkeypatch.setattr(NativeSampler, "__call__", lambda self, *given: calls.append(1) or run(self, *given))
    found = []
    for compute in ("torch", "auto"):
        assert not calls, "compute=torch does without"
        done = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), compute=compute).generate(requests)
        assert all(completion.statistics.prune_events for completion in done)
        found.append([completion.token_ids for completion in done])
    assert calls and found[0] == found[1]


def test_without_a_compiler_pytorch_chooses(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path))
    caches = build.load_sampler, sampling.sampler_for
    for cache in caches:
        cache.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "hcot_lmeval.engine.device.sampling"):
            assert sampler_for(torch.float32) is None
        assert "tokens are chosen by PyTorch: CXX=no-such-compiler is not on the PATH" in caplog.text
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_sampler_that_chooses_otherwise_is_not_used(monkeypatch, caplog, tmp_path):
    sources = Path(shutil.copytree(build.SOURCES, tmp_path / "kernel"))
    right = (sources / "sample.cpp").read_text(encoding="utf-8")
    wrong = right.replace(" < top_p * total) break", " >= 0) break")  # no top-p
    assert wrong != right
    (sources / "sample.cpp").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path))
    caches = build.load_sampler, sampling.sampler_for
    for cache in caches:
        cache.cache_clear()
    try:
        assert sampler_for(torch.float32) is None
        assert "the compiled sampler chooses others on trial logits" in caplog.text
    finally:
        for cache in caches:
            cache.cache_clear()


def test_logits_of_other_types_are_refused():
    with pytest.raises(KernelUnavailableError, match="logits are bfloat16; the kernel knows float32 and float64"):
        build.load_sampler(torch.bfloat16)
