"""The compiled step against the model's own modules: sizes, types, instruction sets, and when it stands back.

That it decodes exactly, with pruning, is in test_engine_exact.py.
"""

import ctypes
import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.decoder import Decoder, UnsupportedModelError
from hcot_lmeval.engine.native import build, packing, step
from hcot_lmeval.engine.native.build import KernelUnavailableError
from hcot_lmeval.engine.native.packing import DISTANCES, Reading
from hcot_lmeval.engine.native.step import NativeStep
from hcot_lmeval.engine.native.weights import Packing, UnreadableModelError
from hcot_lmeval.engine.slots import Chunk, KVPool
from tests.native_cases import LESS, SHAPES, STEPS, chunk
from tests.reference import EOS, MARKERS
from tests.tiny import in_full_precision, tiny_model

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of a logit, relative to the largest."""


def compared(model, steps, *, length=40):
    """Runs the same steps by the model's modules and by the kernel; returns the largest relative difference."""
    decoder, native = Decoder(model, check=False, compute="torch"), NativeStep(model)
    pools = [KVPool(decoder.layers, 3, length, poison=True) for _ in range(2)]
    worst = 0.0
    for chunks in steps:
        with decoder.attached():
            expected = decoder.forward(pools[0], chunks)
        found = native.forward(pools[1], chunks)
        assert found.dtype == expected.dtype and found.shape == expected.shape
        gap = (found - expected).abs().max() / expected.abs().max()
        worst = max(worst, gap.item()) if gap == gap else float("nan")
    return worst


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_sizes_and_types(kind, shape, dtype):
    model = tiny_model(kind, dtype, initializer_range=0.1, **SHAPES[shape])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    if dtype == torch.float64:
        in_full_precision(model)
    assert compared(model, STEPS) <= TOLERANCE[dtype]


@settings(max_examples=25)
@given(st.data())
def test_any_schedule(data):
    """Rewinds to anywhere, chunks of any size, any slots: whatever the engine may ask for."""
    model = in_full_precision(tiny_model("qwen2", torch.float64))
    held, steps = [0, 0, 0], []
    for _ in range(data.draw(st.integers(2, 6))):
        chunks = []
        for slot in data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))]:
            start = data.draw(st.integers(0, held[slot]))
            ids = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=min(20, 40 - start)))
            held[slot] = start + len(ids)
            chunks.append(chunk(slot, start, ids))
            if held[slot] == 40:
                held[slot] = 20
        steps.append(chunks)
    assert compared(model, steps) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_long_prompt_at_once_is_read_as_in_pieces(dtype):
    """Products take so many tokens block by block; blocks end in the middle of a prompt, and the last one is short."""
    model = tiny_model("qwen2", dtype, initializer_range=0.1, **SHAPES["long"])
    model = in_full_precision(model) if dtype == torch.float64 else model
    ids = [(7 * i + i * i) % 300 + 8 for i in range(199)]  # three blocks of 66 and a single token
    whole = [chunk(0, 0, ids)]
    assert compared(model, [whole], length=200) <= TOLERANCE[dtype]
    native, pools = NativeStep(model), [KVPool(Decoder(model, check=False).layers, 1, 200, poison=True) for _ in "ab"]
    for start in range(0, 199, 40):
        in_pieces = native.forward(pools[1], [chunk(0, start, ids[start : start + 40])])
    assert torch.equal(native.forward(pools[0], whole), in_pieces)


@pytest.mark.parametrize("longest", [12_000, 20_000])
def test_long_contexts_beside_short_ones(longest):
    """All heads of a row attend together, or, where their scores do not fit into the cache, a group after the other."""
    model = tiny_model("qwen2", torch.float32, **SHAPES["even"])
    decoder, native = Decoder(model, check=False, compute="torch"), NativeStep(model)
    pool = KVPool(decoder.layers, 5, longest + 1, huge_pages=True)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.normal_(generator=torch.Generator().manual_seed(len(tensor)))
    chunks = [chunk(slot, held, [9 + slot]) for slot, held in enumerate((longest, 3, longest // 2, 900, longest))]
    found = native.forward(pool, chunks)
    assert torch.equal(found, torch.cat([native.forward(pool, [one]) for one in chunks]))
    with decoder.attached():
        expected = decoder.forward(pool, chunks)
    assert (found - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


@pytest.mark.parametrize("flag", LESS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_processors_that_can_do_less(flag, dtype, compiled_with):
    compiled_with(flag)
    model = tiny_model("qwen3", dtype, initializer_range=0.1, **SHAPES["odd"])
    assert compared(in_full_precision(model) if dtype == torch.float64 else model, STEPS) <= TOLERANCE[dtype]


def generate(model, **options):
    requests = []
    for i in range(9):
        prompt = tuple((7 * i + j * j) % 300 + 8 for j in range(2 + 3 * i))
        params = SamplingParams(max_gen_toks=14 + i, seed=i, temperature=float(i % 2), logprobs=True)
        forced = (3, 40, 41, 4, 42, 5)  # a block, so that something is pruned
        requests.append(Request(str(i), prompt, params, forced_ids=forced))
    engine = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), poison=True, **options)
    done = engine.generate(requests)
    assert sum(c.statistics.prune_events for c in done) >= len(done)
    return [(c.token_ids, c.logprobs) for c in done]


@pytest.mark.parametrize("flag", ["", *LESS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_bit_for_bit_whatever_runs_beside(dtype, flag, compiled_with):
    """A token's logits depend neither on its batch, nor on how its prompt was cut, nor on the threads.

    Rows of weights are long enough for every way to walk along them, unrolled or not, and for its remainder.
    """
    compiled_with(*flag.split())
    model = tiny_model("qwen2", dtype, **SHAPES["long"])
    alone = generate(model, slots=1, compute="native")
    threads = torch.get_num_threads()
    try:
        for slots, step_tokens, threads_now in ((3, 5, 2), (9, None, 1), (9, 2, 3)):
            torch.set_num_threads(threads_now)
            assert generate(model, slots=slots, step_tokens=step_tokens, compute="native") == alone
    finally:
        torch.set_num_threads(threads)


def test_changed_and_replaced_weights_are_seen():
    model = tiny_model("qwen2")
    engine = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), compute="native")
    request = Request("1", (9, 10, 11), SamplingParams(max_gen_toks=12))
    before = engine.generate([request])[0].token_ids
    with torch.no_grad():
        model.model.norm.weight.neg_()
    changed = engine.generate([request])[0].token_ids
    model.model.norm.weight = torch.nn.Parameter(-model.model.norm.weight.detach())
    assert changed != before
    assert engine.generate([request])[0].token_ids == before


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_changed_behind_the_back_of_pytorch_are_seen(dtype, form):
    """Through ``.data`` nothing is counted; norms and biases in bfloat16, and weights in fewer bits, are copies."""
    if form == "packed" and dtype == torch.bfloat16:
        pytest.skip("weights in bfloat16 have no copy in fewer bits")
    model = tiny_model("qwen2", dtype)
    parts = {
        "norm": model.model.layers[0].input_layernorm.weight,
        "bias": model.model.layers[1].self_attn.k_proj.bias,
        "weight": model.model.layers[1].mlp.up_proj.weight,
        "head": model.lm_head.weight,
    }
    options = {"slots": 1, "compute": "native", "weights": form}
    engine = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), **options)
    request = Request("1", (9, 10, 11), SamplingParams(max_gen_toks=12, logprobs=True))
    logprobs = engine.generate([request])[0].logprobs
    for name, part in parts.items():
        part.data.add_(0.2 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        fresh = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), **options)
        found = engine.generate([request])[0].logprobs
        assert found == fresh.generate([request])[0].logprobs != logprobs, name
        logprobs = found
    assert engine.decoder.weights_name == form


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [320]}, "a token id is out of range"),
        ({"ids": [10**9]}, "a token id"),
        ({"ids": [-1]}, "a token id"),
        ({"positions": [-1]}, "a position"),
        ({"slot": 2}, "a place in the pool"),
        ({"slot": -1}, "a place in the pool"),
        ({"start": 40, "positions": range(41)}, "a place in the pool"),
    ],
)
def test_the_kernel_checks_what_it_is_given(change, message):
    native = NativeStep(tiny_model("qwen2"))
    pool = KVPool(Decoder(tiny_model("qwen2"), check=False).layers, 2, 20, poison=True)
    with pytest.raises(IndexError, match=message):
        native.forward(pool, [Chunk(**{"slot": 1, "start": 0, "ids": [319], "positions": [0], **change})])
    assert native.forward(pool, [Chunk(1, 0, [319], [0])]).isfinite().all()


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    return model


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"])).base_model.model


def partly_double(model):
    model.model.norm.double()
    return model


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
REFUSED = {
    "gemma2": (lambda: tiny_model("gemma2"), "type gemma2"),
    "window": (lambda: tiny_model("mistral"), "sliding window of 16"),
    "activation": (lambda: tiny_model("llama", hidden_act="gelu"), "hidden_act='gelu'"),
    "rope": (lambda: tiny_model("llama", **DYNAMIC), "rope_type='dynamic'"),
    "hook": (lambda: hooked(tiny_model("qwen2")), "layers.1.mlp has a hook"),
    "adapter": (lambda: adapted(tiny_model("qwen2")), "not a plain linear layer"),
    "types": (lambda: partly_double(tiny_model("qwen2")), "several types"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_know_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(UnreadableModelError, match=message):
        NativeStep(make())


def test_models_it_does_not_know_are_left_to_pytorch(caplog):
    with caplog.at_level(logging.INFO, "hcot_lmeval.engine.decoder"):
        assert Decoder(tiny_model("gemma2")).native is None
    assert "steps by PyTorch" in caplog.text and "type gemma2" in caplog.text
    assert Decoder(tiny_model("qwen2", torch.float16)).native is None
    with pytest.raises(UnsupportedModelError, match=r"compute='native' cannot run Gemma2.*type gemma2"):
        Decoder(tiny_model("gemma2"), compute="native")


def test_an_adapter_that_comes_later_is_not_passed_by():
    """The compiled step would compute without it."""
    model = tiny_model("qwen2")
    decoder = Decoder(model)
    assert decoder.native is not None
    get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    decoder.refresh()
    assert decoder.native is None


@pytest.mark.parametrize(("compiler", "message"), [("no-such-compiler", "not on the PATH"), ("false", "failed")])
def test_without_a_compiler_pytorch_computes(compiler, message, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.delenv(build.FLAGS_VARIABLE, raising=False)
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path))
    build.load_kernel.cache_clear()
    try:
        with pytest.raises(KernelUnavailableError, match=message):
            build.load_kernel(torch.float32, torch.float32)
        assert Decoder(tiny_model("qwen2")).native is None
        with pytest.raises(UnsupportedModelError, match=message):
            Decoder(tiny_model("qwen2"), compute="native")
    finally:
        build.load_kernel.cache_clear()


def test_a_kernel_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path))
    build.load_kernel.cache_clear()
    try:
        build.load_kernel(torch.float32, torch.float32)
        (kept,) = (tmp_path / "kernels").glob("*.so")
        build.load_kernel.cache_clear()
        monkeypatch.setattr(build, "compile_kernel", lambda *_: pytest.fail("compiled again"))
        build.load_kernel(torch.float32, torch.float32)
        assert list((tmp_path / "kernels").glob("*.so")) == [kept]
    finally:
        build.load_kernel.cache_clear()


def test_flags_that_are_asked_for_are_taken_or_an_error(compiled_with):
    model, found = tiny_model("qwen2", torch.float32), Packing()
    for width in (32, 64):
        compiled_with(f"-DVECTOR_BYTES={width}")
        NativeStep(model).kernel.packing(ctypes.byref(found))
        assert found.numbers == 8 * width // 4
    compiled_with("-DVECTOR_BYTES=48")
    with pytest.raises(
        ValueError, match=r"HCOT_LMEVAL_CXXFLAGS=.*-DVECTOR_BYTES=48.* failed: .*VECTOR_BYTES is 16, 32"
    ):
        Decoder(model)


@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_damaged_kernel_is_compiled_again(left, monkeypatch, tmp_path):
    """Loading one that was cut ends the process, or finds no function in it."""
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # in less time
    build.load_sampler.cache_clear()
    try:
        build.load_sampler(torch.float32)
        (kept,) = (tmp_path / "kernels").glob("*.so")
        whole = kept.read_bytes()
        kept.unlink()  # this process goes on with what it has loaded
        kept.write_bytes(whole[: int(left * len(whole))])
        build.load_sampler.cache_clear()
        build.load_sampler(torch.float32)
        (anew,) = (tmp_path / "kernels").glob("*.so")
        assert len(anew.read_bytes()) == len(whole)
    finally:
        build.load_sampler.cache_clear()


@pytest.mark.parametrize("weight", build.WEIGHTS.values())
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_compiler_takes_every_kernel(compiler, weight):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared")]
    command = [compiler, "-fsyntax-only", *flags, f"-DWEIGHT={weight}", str(build.SOURCES / "step.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_kernel_is_noticed_when_a_model_is_loaded(monkeypatch, caplog, tmp_path):
    sources = Path(shutil.copytree(build.SOURCES, tmp_path / "kernel"))
    right = (sources / "step.cpp").read_text(encoding="utf-8")
    wrong = right.replace("1 / std::sqrt(total / size + eps)", "1 / std::sqrt(total)")
    assert wrong != right
    (sources / "step.cpp").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", sources)
    build.load_kernel.cache_clear()
    try:
        assert Decoder(tiny_model("qwen2")).native is None
        assert "the compiled step is not used" in caplog.text
        with pytest.raises(UnsupportedModelError, match="self-check"):
            Decoder(tiny_model("qwen2"), compute="native")
    finally:
        build.load_kernel.cache_clear()


def test_the_way_to_read_weights_changes_nothing_but_the_time(monkeypatch):
    """It is tried where the model is large; whichever is taken, the bits are the same."""
    model = tiny_model("qwen2", torch.float32, **SHAPES["long"])
    decoder = Decoder(model, check=False, compute="torch")
    assert NativeStep(model).reading == Reading(False, DISTANCES[0])
    tried = []
    seconds = NativeStep.product_seconds
    monkeypatch.setattr(packing, "LEAST_BYTES", 1000)
    monkeypatch.setattr(step, "TRIED_BYTES", 1000)
    monkeypatch.setattr(NativeStep, "product_seconds", lambda self: tried.append(self.reading) or seconds(self))
    logits = []
    for distance in DISTANCES:
        fastest = Reading(False, distance)
        monkeypatch.setattr(packing, "choose_reading", lambda own, copied, time, way=fastest: [*map(time, own)] and way)
        native = NativeStep(model)
        assert native.reading == fastest and {way.distance for way in tried} == set(DISTANCES)
        logits.append(native.forward(KVPool(decoder.layers, 1, 8), [Chunk(0, 0, [9], range(1))]))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
