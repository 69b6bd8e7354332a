"""Every backend against the textbook: ragged rows, slots in any order, windows, caps, sinks, NaN all around."""

from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from bench import gpu

from hcot_lmeval.engine.attention import Scores
from hcot_lmeval.engine.device import choice
from hcot_lmeval.engine.device.attention import Decode, Ragged, Sdpa, UnavailableError
from hcot_lmeval.engine.device.choice import FlashAttn, TorchFlash, choose, errors, wrong
from hcot_lmeval.engine.device.state import Feed
from hcot_lmeval.engine.options import ATTENTION
from hcot_lmeval.engine.slots import KVPool, LayerSpec
from tests.interpreter import run_in_interpreter

CPU = torch.device("cpu")
NEEDS = {
    "grouped 12/2": LayerSpec(12, 2, 128, 128, torch.float32, CPU),
    "window": LayerSpec(4, 4, 16, 16, torch.float32, CPU, window=16),
    "cap and sinks": LayerSpec(6, 2, 24, 40, torch.float32, CPU, window=70, softcap=5.0, sinks=True),
    "one head": LayerSpec(7, 1, 64, 64, torch.float32, CPU, sinks=True),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
def test_plain_pytorch(need, dtype):
    need = need._replace(dtype=dtype)
    assert Sdpa().refuses(need) == "" and wrong(Sdpa(), need) == ""


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_plain_pytorch_reads_slots_of_another_dtype(stored):
    for need in NEEDS.values():
        need = need._replace(stored=stored)
        assert Sdpa().refuses(need) == "" and wrong(Sdpa(), need) == ""


def test_triton():
    """In the interpreter. It cannot multiply bfloat16; float16 goes the same way through the kernel."""
    assert run_in_interpreter(_IN_TRITON) == ["checked"] * 4 * len(NEEDS)


_IN_TRITON = """
import torch
from hcot_lmeval.engine.device.choice import MAKERS, wrong
from tests.test_device_attention import NEEDS
backend = MAKERS["triton"]()
for need in NEEDS.values():
    assert "float64" in backend.refuses(need._replace(dtype=torch.float64))
    for dtype, stored in ((torch.float32, None), (torch.float16, None), (torch.float32, torch.float16),
                          (torch.float16, torch.float8_e4m3fn)):
        need = need._replace(dtype=dtype, stored=stored)
        assert backend.refuses(need) == "" and wrong(backend, need) == "", (need, wrong(backend, need))
        print("checked")
"""


class Launches:
    """In place of a kernel; keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *given, **constants: self.calls.append((given, constants))


TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    int: "i32",
    float: "fp32",
}


@pytest.mark.parametrize("need", gpu.layers(CPU).values(), ids=gpu.layers(CPU))
def test_triton_compiles_for_gpus(need, monkeypatch):
    """For compute capability 9.0 by Triton's own assembler, as it would be launched; that needs no GPU."""
    triton = pytest.importorskip("triton", reason="needs triton, which comes with PyTorch for CUDA")
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hcot_lmeval.engine.device import triton_kernels

    kernels = {name: getattr(triton_kernels, name) for name in ("attend_part", "combine_parts")}
    launches = {name: Launches() for name in kernels}
    for name, recorder in launches.items():
        monkeypatch.setattr(triton_kernels, name, recorder)
    launch(triton_kernels.TritonDecode(), need)
    for name, kernel in kernels.items():
        ((given, constants),) = launches[name].calls
        types = [TRITON_TYPES[x.dtype if isinstance(x, torch.Tensor) else type(x)] for x in given]
        signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
        places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
        attributes = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(given) if is_divisible(x)}
        source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY


def is_divisible(given: torch.Tensor | float) -> bool:
    """Whether Triton takes it for a multiple of 16, as it does pointers from PyTorch."""
    return isinstance(given, torch.Tensor) or (isinstance(given, int) and given % 16 == 0)


SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have at compute capability 9.0 (CUDA C++ Programming Guide)."""


def launch(backend: Sdpa, need: LayerSpec) -> None:
    """Calls its decode for two rows."""
    slots, first, lengths = torch.tensor([[1, 0], [0, 3], [9, 7]])
    keys, values = (torch.zeros(3, 40, need.heads, dim, dtype=need.dtype) for dim in (need.key_dim, need.value_dim))
    query = torch.zeros(2, need.query_heads, need.key_dim, dtype=need.dtype)
    sinks = query[0, :, 0].contiguous() if need.sinks else None
    scores, at = Scores(need.key_dim**-0.5, need.softcap, sinks), Ragged.of(slots, first, lengths, 40)
    backend.decode(query, keys.to(need.stored or need.dtype), values.to(need.stored or need.dtype), at, scores)


def test_the_probe_notices_what_is_wrong():
    class Long(Sdpa):
        def decode(self, query, keys, values, at, scores):
            return super().decode(
                query, keys.nan_to_num(), values.nan_to_num(), at._replace(lengths=at.lengths + 1), scores
            )

    class Unordered(Sdpa):
        def decode(self, query, keys, values, at, scores):
            return super().decode(query, keys, values, at._replace(slots=at.slots.sort().values), scores)

    class Careless(Sdpa):
        def chunk(self, query, keys, values, segments, scores):
            return super().chunk(query, keys, values, segments, scores._replace(window=None))

    need = NEEDS["window"]
    assert wrong(Sdpa(), need) == ""
    assert "decode" in wrong(Long(), need) and "decode" in wrong(Unordered(), need)
    assert "chunk" in wrong(Careless(), need) and wrong(Careless(), need._replace(window=None)) == ""
    assert [kind for kind, _ in errors(Sdpa(), need)] == ["decode", "chunk"]


def test_the_option_names_every_backend():
    assert ("auto", *choice.MAKERS) == ATTENTION


def test_the_first_that_serves_is_chosen_and_the_others_have_reasons(monkeypatch, caplog):
    class Broken(Sdpa):
        def decode(self, query, keys, values, at, scores):
            return super().decode(query, keys, values, at, scores) * 1.01

    def missing():
        raise UnavailableError("it is not there")

    makers = {"a": missing, "b": Broken, "c": lambda: FlashAttn(_with_cache), "sdpa": Sdpa, "e": Sdpa}
    monkeypatch.setattr(choice, "MAKERS", makers)
    monkeypatch.setattr(choice, "ATTENTION", ("auto", "a", "b", "c", "sdpa", "e"))
    with caplog.at_level(logging.INFO):
        assert type(choose([NEEDS["window"], NEEDS["one head"]])) is Sdpa
    assert "by sdpa; not a: it is not there; not b: its decode is off by 1.0e-02" in caplog.text
    assert "not c: it needs CUDA, not cpu" in caplog.text
    with pytest.raises(ValueError, match=r"attention='a' cannot be used: a: it is not there"):
        choose([NEEDS["window"]], "a")
    with pytest.raises(ValueError, match="attention='f' is unknown; choose one of auto, a"):
        choose([NEEDS["window"]], "f")


def test_what_flash_kernels_refuse():
    cuda = LayerSpec(12, 2, 128, 128, torch.bfloat16, torch.device("cuda"))
    both = torch_flash, flash_attn = TorchFlash(), FlashAttn(_with_cache)
    for kernel in both:
        assert kernel.refuses(cuda) == kernel.refuses(cuda._replace(stored=torch.bfloat16)) == ""
        assert "float32" in kernel.refuses(cuda._replace(dtype=torch.float32))
        assert "head sizes" in kernel.refuses(cuda._replace(key_dim=192))
        assert "sinks" in kernel.refuses(cuda._replace(sinks=True))
        assert "not in float16" in kernel.refuses(cuda._replace(stored=torch.float16))
    assert "cap" in torch_flash.refuses(cuda._replace(softcap=50.0))
    assert "window" in flash_attn.refuses(cuda._replace(window=16))
    assert torch_flash.refuses(cuda._replace(window=16)) == flash_attn.refuses(cuda._replace(softcap=50.0)) == ""


def test_calls_of_flash_kernels():
    """The kernels themselves run on CUDA alone; here plain functions take their arguments as documented."""
    assert wrong(FlashAttn(_with_cache), NEEDS["grouped 12/2"]) == ""
    assert wrong(TorchFlash(_flash), NEEDS["grouped 12/2"]) == wrong(TorchFlash(_flash), NEEDS["window"]) == ""


def _flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, seqused_k, **spans):
    assert (dropout, debug) == (0.0, False) and len(cu_q) == len(cu_k) == len(seqused_k) + 1
    assert max_q >= (cu_q[1:] - cu_q[:-1]).max() and max_k >= seqused_k.max()
    assert {t.dtype for t in (cu_q, cu_k, seqused_k)} == {torch.int32}
    assert not spans or (causal and spans["window_size_right"] == 0)
    out = []
    for b in range(len(seqused_k)):
        queries, first, used = q[cu_q[b] : cu_q[b + 1]], int(cu_k[b]), int(seqused_k[b])
        assert causal or len(queries) == 1
        scores = Scores(scale, window=spans["window_size_left"] + 1 if spans else None)
        out.append(choice.textbook(queries, k[first : first + used], v[first : first + used], scores))
    return (torch.cat(out),)


def _with_cache(q, keys, values, *, cache_seqlens, cache_batch_idx, softmax_scale, causal, softcap):
    assert q.shape[1] == 1 or causal
    assert {t.dtype for t in (cache_seqlens, cache_batch_idx)} == {torch.int32}
    how = Scores(softmax_scale, softcap or None)
    rows = zip(q, cache_batch_idx.tolist(), cache_seqlens.tolist(), strict=True)
    return torch.stack([choice.textbook(x, keys[s, :n], values[s, :n], how) for x, s, n in rows])


def test_the_package_flash_attn_is_imported_when_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UnavailableError, match=r"flash-attn is not installed \(pip install 'hcot_lmeval\[flash\]'\)"):
        FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=_with_cache))
    capped = NEEDS["grouped 12/2"]._replace(softcap=5.0)
    assert wrong(FlashAttn(), capped) == "" and "CUDA" in FlashAttn().refuses(capped)


def test_windows_count_positions_where_they_are_not_places():
    positions = torch.tensor([[0, 1, 2, 9, 10, 11, 0], [0, 1, 2, 3, 4, 5, 0]])
    at = torch.tensor([0, 1])
    feed = Feed(at, at, torch.zeros(2, dtype=torch.int64), torch.tensor([5, 3]), at, torch.tensor([11, 3]))
    pool = KVPool({}, 2, 7)
    by_position, by_place = Decode(feed, pool, "", positions), Decode(feed, pool, "")
    assert by_position.ragged(4).first.tolist() == [3, 0] and by_position.ragged(10).first.tolist() == [2, 0]
    assert Decode(feed._replace(positions=feed.places), pool, "").ragged(4).first.tolist() == [2, 0]
    assert by_place.ragged(None).first.tolist() == [0, 0] and by_place.ragged(None).lengths.tolist() == [6, 4]
