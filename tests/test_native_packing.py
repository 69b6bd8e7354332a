"""Weights in fewer bits: the same values, the same logits bit for bit, and only where they pay."""

import ctypes
import gc
import weakref

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.decoder import Decoder, UnsupportedModelError
from hcot_lmeval.engine.native import build, packing
from hcot_lmeval.engine.native.packing import DISTANCES, PACKED_DISTANCES, NoCopyError, Reading, choose_reading
from hcot_lmeval.engine.native.step import NativeStep
from hcot_lmeval.engine.native.weights import Matrix, Packing
from hcot_lmeval.engine.slots import Chunk, KVPool
from tests.native_cases import LESS, SHAPES
from tests.reference import EOS, MARKERS
from tests.tiny import tiny_model

NO_MEMORY = type("Memory", (), {"available": 1000})


def in_bfloat16(model):
    """Has every weight a value of bfloat16, as those of such a checkpoint are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def of_many_magnitudes(model):
    """Strews zeros, denormals and numbers far from the others over a corner of the first matrix of each layer.

    The corner is that of a single block, or of two, however wide the processor's vectors are.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            corner = layer.self_attn.q_proj.weight[:8, :8]
            for value in (0.0, 1e-41, -1e-20, 3.0):
                corner[tuple(torch.randint(8, (2, 3), generator=generator))] = value
    return model


def make(shape="long", *, narrow=False, kind="qwen2"):
    model = tiny_model(kind, torch.float32, initializer_range=0.1, **SHAPES[shape])
    return in_bfloat16(model) if narrow else of_many_magnitudes(model)


def logits_of(native, tokens=1):
    pool = KVPool(Decoder(native.owner, check=False, compute="torch").layers, tokens, 8, poison=True)
    return native.forward(pool, [Chunk(slot, 0, [9 + slot], range(1)) for slot in range(tokens)])


def few():
    found = Packing()
    build.load_kernel(torch.float32, torch.float32).packing(ctypes.byref(found))
    return found.few


# --- the same values --------------------------------------------------------------------------------------------------


def decode(blocks, bases, rows):
    """Reads packed blocks as kernel/packed.hpp describes them, number by number; `rows` serve those that are marked."""
    lanes = blocks.shape[-1]
    found = np.empty_like(rows)
    for at, base in np.ndenumerate(bases):
        bundle, across = at
        place = (slice(8 * bundle, 8 * bundle + 8), slice(lanes * across, lanes * across + lanes))
        if base == 255:
            found[place] = rows[place]
            continue
        words = [[int(word) for word in line] for line in blocks[at]]
        for k in range(lanes):
            codes = [(words[i][k] >> 31, words[i][k] & 0x7FFFFFF) for i in range(7)]
            last = sum((words[i][k] >> 27 & 15) << 4 * i for i in range(7))
            codes.append((last >> 27, last & 0x7FFFFFF))
            found[place][:, k] = [sign << 31 | (rest + (int(base) << 23)) for sign, rest in codes]
    return found


def pack(rows):
    """Packs rows of bits of float32; returns blocks, bases and how many of them are marked."""
    kernel = build.load_kernel(torch.float32, torch.float32)
    found = Packing()
    kernel.packing(ctypes.byref(found))
    lanes = found.numbers // 8
    out, columns = rows.shape
    blocks = np.zeros((out // 8, columns // lanes, 7, lanes), np.uint32)
    bases = np.zeros(blocks.shape[:2], np.uint8)
    assert blocks[0, 0].size == found.words
    matrix = Matrix(rows.ctypes.data, None, out, columns, None, blocks.ctypes.data, bases.ctypes.data)
    assert kernel.blocks(ctypes.byref(matrix)) == bases.size
    return blocks, bases, kernel.pack(ctypes.byref(matrix), 1)


@settings(max_examples=60)
@given(st.integers(0, 255), st.integers(0, 18), st.integers(0, 2**32 - 1))
def test_blocks_hold_every_bit(lowest, spread, seed):
    """Any exponents, those of zeros, denormals, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    exponents = np.minimum(rng.integers(lowest, lowest + spread + 1, (16, 64)), 255).astype(np.uint32)
    rows = exponents << 23 | rng.integers(0, 2**23, (16, 64), dtype=np.uint32)
    rows |= rng.integers(0, 2, (16, 64), dtype=np.uint32) << 31
    blocks, bases, marked = pack(rows)
    assert marked == (bases == 255).sum()
    if min(spread, 255 - lowest) <= 15:
        assert marked == 0
    assert np.array_equal(decode(blocks, bases, rows), rows)


@pytest.mark.parametrize("flag", ["", *LESS])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("narrow", [False, True], ids=["28 bits", "bfloat16"])
def test_logits_are_the_same_bit_for_bit(narrow, shape, kind, flag, compiled_with):
    compiled_with(*flag.split())
    model = make(shape, narrow=narrow, kind=kind)
    packed, plain = NativeStep(model, weights="packed"), NativeStep(model)
    assert packed.reading.copied and packed.reader.copy.narrow == narrow and not plain.reading.copied
    for tokens in (1, 2, 3, 4, 5, 7):
        assert torch.equal(logits_of(packed, tokens), logits_of(plain, tokens))


@pytest.mark.parametrize(("narrow", "served"), [(False, 1), (True, None)], ids=["28 bits", "bfloat16"])
def test_the_copy_is_what_is_read(narrow, served):
    """With other numbers in it the logits of few tokens change, and those of more do not."""
    model = make(narrow=narrow)
    native, served = NativeStep(model, weights="packed"), served or few()
    before = [logits_of(native, tokens) for tokens in (1, served, served + 1)]
    bases = 0 if narrow else sum(native.kernel.blocks(ctypes.byref(matrix)) for matrix in native.model.matrices)
    numbers = native.reader.copy.memory[: native.reader.copy.memory.numel() - bases]
    numbers.view(torch.int32).bitwise_xor_(1 << 22)
    one, most, more = (torch.equal(logits_of(native, len(logits)), logits) for logits in before)
    assert (one, most, more) == (False, False, True)


def test_some_blocks_are_marked_and_most_are_not():
    native = NativeStep(make(), weights="packed")
    blocks = sum(native.kernel.blocks(ctypes.byref(matrix)) for matrix in native.model.matrices)
    marked = int((native.reader.copy.memory[-blocks:] == 255).sum())
    assert 0 < marked < packing.MOST_MARKED * blocks


# --- in the engine ----------------------------------------------------------------------------------------------------


def generate(model, **options):
    engine = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), poison=True, compute="native", **options)
    params = SamplingParams(max_gen_toks=16, logprobs=True)
    forced = (3, 40, 41, 4, 42, 5)  # a block, so that something is pruned
    requests = [Request(str(i), tuple(range(9, 12 + 2 * i)), params, forced_ids=forced) for i in range(5)]
    done = engine.generate(requests)
    assert all(completion.statistics.prune_events for completion in done)
    return [(completion.token_ids, completion.logprobs) for completion in done], engine


@pytest.mark.parametrize("narrow", [False, True], ids=["28 bits", "bfloat16"])
def test_the_engine_writes_the_same_with_few_rows_and_many(narrow):
    model = make(narrow=narrow)
    expected, plain = generate(model, slots=5, weights="plain")
    assert plain.decoder.weights_name == "plain"
    for slots in (1, 3, 5):
        found, engine = generate(model, slots=slots, weights="packed")
        assert found == expected and engine.decoder.weights_name == "packed"


def test_engines_of_a_model_share_the_copy_and_it_goes_with_the_last():
    model = make()
    first, second = NativeStep(model, weights="packed"), NativeStep(model, weights="packed")
    assert first.reader.copy is second.reader.copy
    held = weakref.ref(first.reader.copy)
    del first
    gc.collect()
    assert held() is not None
    del second
    gc.collect()
    assert held() is None


@pytest.fixture
def large(monkeypatch):
    """Has every model count as large, every way be tried, and the copy be found the fastest."""
    monkeypatch.setattr(packing, "LEAST_BYTES", 1)
    monkeypatch.setattr(NativeStep, "product_seconds", lambda self: 2.0 - self.reading.copied)


def test_changed_weights_are_never_read_from_an_old_copy(large):
    model = make()
    steps = {form: NativeStep(model, weights=form) for form in ("auto", "plain", "packed")}
    assert [native.reading.copied for native in steps.values()] == [True, False, True]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    for native in steps.values():
        native.refresh()
    assert [native.reading.copied for native in steps.values()] == [False, False, True]
    fresh = logits_of(NativeStep(model))
    assert all(torch.equal(logits_of(native), fresh) for native in steps.values())


def test_weights_that_are_no_more_of_bfloat16_are_packed_instead():
    model = make(narrow=True)
    native = NativeStep(model, weights="packed")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    native.refresh()
    assert native.reading == Reading(True, PACKED_DISTANCES[0]) and not native.reader.copy.narrow
    assert torch.equal(logits_of(native), logits_of(NativeStep(model)))


def test_changed_rotary_frequencies_are_read_again():
    def behind_others(native):  # a row alone at position 0 has nothing to turn against
        pool = KVPool(Decoder(native.owner, check=False, compute="torch").layers, 1, 8, poison=True)
        return native.forward(pool, [Chunk(0, 0, [9, 10, 11], range(3))])

    model = make()
    native = NativeStep(model)
    before = behind_others(native)
    model.model.rotary_emb.inv_freq.mul_(0.25)
    native.refresh()
    assert not torch.equal(behind_others(native), before)
    assert torch.equal(behind_others(native), behind_others(NativeStep(model)))


def test_a_copy_that_cannot_be_made_anew_is_asked_for_again(monkeypatch):
    model = make()
    native = NativeStep(model, weights="packed")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: NO_MEMORY)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    for _ in range(2):
        with pytest.raises(NoCopyError, match="that are free"):
            native.refresh()


# --- whether it pays --------------------------------------------------------------------------------------------------


def test_a_copy_is_made_for_few_rows_alone(large):
    model, narrow = make(), make(narrow=True)
    assert NativeStep(model, weights="auto", rows=1).reading.copied
    assert not NativeStep(model, weights="auto", rows=2).reading.copied
    assert NativeStep(narrow, weights="auto", rows=few()).reading.copied
    assert not NativeStep(narrow, weights="auto", rows=few() + 1).reading.copied
    engines = [Engine(narrow, markers=MARKERS["hcot"], eos_ids=(EOS,), slots=slots) for slots in ("auto", 3)]
    assert [engine.decoder.native.reading.copied for engine in engines] == [False, True]


def test_a_copy_that_is_not_faster_is_dropped(large, monkeypatch):
    monkeypatch.setattr(NativeStep, "product_seconds", lambda self: 1.0)
    native = NativeStep(make(), weights="auto")
    assert native.reader.copy is None and native.reading == Reading(False, DISTANCES[0])
    assert torch.equal(logits_of(native), logits_of(NativeStep(native.owner)))


def test_small_models_are_read_as_they_are():
    native = NativeStep(make(), weights="auto")
    assert native.reader.copy is None and native.reading == Reading(False, DISTANCES[0])


def test_the_fastest_way_is_chosen_if_it_is_worth_it():
    own, copied = [Reading(False, d) for d in (512, 2560)], [Reading(True, d) for d in (1536, 1024)]
    taken = dict(zip([*own, *copied], [1.0, 0.97, 0.99, 0.985], strict=True))
    assert choose_reading(own, copied, taken.get) == own[0]  # nothing is so much faster
    taken[own[1]] = 0.9
    assert choose_reading(own, copied, taken.get) == own[1]
    taken[copied[0]] = 0.88
    assert choose_reading(own, copied, taken.get) == copied[0]
    assert choose_reading([], copied, taken.get) == copied[0]
    assert choose_reading(own, [], taken.get) == own[1]


def test_every_way_is_tried_by_turns_and_its_best_time_counts(monkeypatch):
    monkeypatch.setattr(packing, "TRIALS", 3)
    ways, seen = [Reading(False, 512), Reading(False, 0)], []
    times = iter([1.0, 2.0, 9.0, 0.5, 1.0, 2.0])
    assert choose_reading(ways, [], lambda way: seen.append(way) or next(times)) == ways[1]
    assert seen == ways * 3


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_copied_is_said(monkeypatch):
    with pytest.raises(NoCopyError, match=r"its weights are bfloat16: load it with dtype='float32'"):
        NativeStep(tiny_model("qwen2", torch.bfloat16), weights="packed")
    wild = make()
    with torch.no_grad():
        for layer in wild.model.layers:
            layer.mlp.up_proj.weight[:, ::3] *= 1e-9
    with pytest.raises(NoCopyError, match=r"\d+% of the blocks of its weights hold numbers of too many"):
        NativeStep(wild, weights="packed")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: NO_MEMORY)
    with pytest.raises(NoCopyError, match=r"it takes 0.0 GiB, and 90% of the 0.0 GiB that are free"):
        NativeStep(make(), weights="packed")


def test_asking_for_a_copy_that_cannot_be_is_an_error():
    with pytest.raises(UnsupportedModelError, match=r"weights='packed': Qwen2.* has no packed copy, .*dtype='float32'"):
        Decoder(tiny_model("qwen2", torch.bfloat16), weights="packed")
    with pytest.raises(UnsupportedModelError, match=r"weights='packed': Qwen2.* is left to PyTorch.*double precision"):
        Decoder(tiny_model("qwen2", torch.float64), weights="packed")
    with pytest.raises(ValueError, match="compute='torch' switches them off"):
        Engine(tiny_model("qwen2"), markers=MARKERS["hcot"], weights="packed", compute="torch")
    with pytest.raises(ValueError, match="weights='int8' is not allowed; choose one of auto, plain, packed"):
        Engine(tiny_model("qwen2"), markers=MARKERS["hcot"], weights="int8")
