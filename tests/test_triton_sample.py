"""The Triton kernel that chooses tokens: in the interpreter against PyTorch, and compiled for GPUs."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from hcot_lmeval.engine.device import sampling
from hcot_lmeval.engine.device.sampling import chooses_alike, kernel_for
from tests.interpreter import run_in_interpreter

CPU = torch.device("cpu")


def test_in_the_interpreter_it_chooses_what_pytorch_does():
    assert run_in_interpreter(_INSIDE) == ["probed", "compared", "decoded"]


_INSIDE = """
import math, random
import torch
from hcot_lmeval.engine.device import sampling, triton_kernels
from hcot_lmeval.engine.sampling import Draw, SamplingParams, choose, derive_seed, signed
from tests import test_device_sampling

cpu = torch.device("cpu")
kernel = sampling.kernel_for(cpu)
assert kernel is not None
print("probed")

triton_kernels.SPAN = 256  # more blocks than one, and places on both sides of their edges
rng, generator = random.Random(0), torch.Generator().manual_seed(0)
for _ in range(60):
    dtype, size = rng.choice([torch.float32, torch.float64]), rng.choice([1, 255, 256, 257, 700])
    scores = torch.randn(3, size, generator=generator, dtype=dtype) * rng.choice([0.0, 0.3, 3.0, 30.0])
    scores = scores.round() if rng.random() < 0.5 else scores
    if rng.random() < 0.4:
        scores[:, torch.randperm(size, generator=generator)[: size // 2]] = -math.inf
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0, 1.0]),  # 1, so that scores are logits
            top_k=rng.choice([0, 1, 2, 20, 10**6]),
            top_p=rng.choice([1.0, 0.9991, 0.9503, 0.5007, 1e-9]),
            min_p=rng.choice([0.0, 0.05, 0.5, 1.0]),
        )
        for _ in range(3)
    ]
    draws = [Draw(p, rng.getrandbits(64), rng.randrange(10**6)) for p in params]
    names = "temperature", "top_p", "min_p"
    settings = (torch.tensor([getattr(p, name) for p in params], dtype=dtype) for name in names)
    starts = torch.tensor([signed(derive_seed(d.seed, d.generated + 1)) for d in draws])
    top_k = torch.tensor([p.top_k for p in params])
    found = triton_kernels.choose(scores, *settings, top_k, starts, int(top_k.max()), True)
    assert found.tolist() == choose(scores, draws)[0], (scores, draws)
    assert sampling.choose_by(kernel, scores, draws) == found.tolist()
print("compared")

plain = test_device_sampling.Sampler
test_device_sampling.Sampler = lambda places: plain(places, most=40, kernel=kernel)
for dtype in (torch.float32, torch.float64):
    test_device_sampling.test_the_choices_are_those_of_the_host(dtype)
print("decoded")
"""


@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("scores", ["*fp32", "*fp64"])
def test_it_compiles_for_gpus(scores, truncates, top_k):
    """For compute capability 9.0 by Triton's own assembler; that needs no GPU."""
    triton = pytest.importorskip("triton", reason="needs triton, which comes with PyTorch for CUDA")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hcot_lmeval.engine.device.triton_kernels import SPAN, WARPS, choose_rows

    types = [*[scores] * 4, "*i64", scores, "*i64", "*i64", "i32", *["constexpr"] * 3]
    constants = {(len(types) - 3 + i,): value for i, value in enumerate((truncates, top_k, SPAN))}
    source = ASTSource(
        fn=choose_rows, signature=dict(zip(choose_rows.arg_names, types, strict=True)), constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
    assert compiled.asm["cubin"]


def test_a_kernel_that_chooses_otherwise_is_noticed():
    def greedy(scores, *_):
        return scores.argmax(-1)

    def without_top_k(scores, temperature, top_p, min_p, top_k, starts, most, truncates):
        plain = sampling.Sampler(sampling.hash_places(scores.shape[1], CPU), most=most)
        return plain.sampled(scores, sampling.SamplingRows(temperature, top_p, min_p), top_k * 0, starts)

    assert not chooses_alike(greedy, CPU)
    assert not chooses_alike(without_top_k, CPU)


def test_where_it_cannot_run_pytorch_chooses_and_the_log_says_why(caplog):
    kernel_for.cache_clear()
    with caplog.at_level(logging.INFO, "hcot_lmeval.engine.device.sampling"):
        assert kernel_for(CPU) is None
    assert "tokens are sampled on cpu by PyTorch; not by triton: it " in caplog.text
