"""Float32 weights read from a copy in bfloat16: the same logits bit for bit, and only where it pays."""

import gc
import weakref

import psutil
import pytest
import torch

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.decoder import Decoder, UnsupportedModelError
from hcot_lmeval.engine.native import build, weights
from hcot_lmeval.engine.native.step import NativeStep
from hcot_lmeval.engine.native.weights import DISTANCES, NoCopyError, Reading, choose_reading
from hcot_lmeval.engine.slots import Chunk, KVPool
from tests.native_cases import LESS, SHAPES
from tests.reference import EOS, MARKERS
from tests.tiny import tiny_model

NO_MEMORY = type("Memory", (), {"available": 1000})


def make(shape="long", kind="qwen2"):
    """A model whose weights are numbers of bfloat16, as those of most checkpoints are."""
    model = tiny_model(kind, torch.float32, initializer_range=0.1, **SHAPES[shape])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def logits_of(native, tokens=1):
    pool = KVPool(Decoder(native.owner, check=False, compute="torch").layers, tokens, 8, poison=True)
    return native.forward(pool, [Chunk(slot, 0, [9 + slot], range(1)) for slot in range(tokens)])


def few():
    return build.load_kernel(torch.float32, torch.float32).few_tokens()


# --- the same values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["", *LESS])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_same_bit_for_bit(shape, kind, flag, compiled_with):
    compiled_with(*flag.split())
    model = make(shape, kind)
    packed, plain = NativeStep(model, weights="packed"), NativeStep(model)
    assert packed.reading.copied and not plain.reading.copied
    for tokens in (1, 2, 3, 4, 5, 7):
        assert torch.equal(logits_of(packed, tokens), logits_of(plain, tokens))


def test_the_copy_is_what_is_read():
    """With other numbers in it the logits of few tokens change, and those of more do not."""
    native = NativeStep(make(), weights="packed")
    before = [logits_of(native, tokens) for tokens in (1, few(), few() + 1)]
    native.reader.copy.memory.view(torch.int16).bitwise_xor_(1 << 6)
    assert [torch.equal(logits_of(native, len(logits)), logits) for logits in before] == [False, False, True]


# --- in the engine ----------------------------------------------------------------------------------------------------


def generate(model, **options):
    engine = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), poison=True, compute="native", **options)
    params = SamplingParams(max_gen_toks=16, logprobs=True)
    forced = (3, 40, 41, 4, 42, 5)  # a block, so that something is pruned
    requests = [Request(str(i), tuple(range(9, 12 + 2 * i)), params, forced_ids=forced) for i in range(5)]
    done = engine.generate(requests)
    assert all(completion.statistics.prune_events for completion in done)
    return [(completion.token_ids, completion.logprobs) for completion in done], engine


def test_the_engine_writes_the_same_with_few_rows_and_many():
    model = make()
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
    monkeypatch.setattr(weights, "LEAST_BYTES", 1)
    monkeypatch.setattr(NativeStep, "product_seconds", lambda self: 2.0 - self.reading.copied)


def test_changed_weights_are_never_read_from_an_old_copy(large):
    model = make()
    steps = {form: NativeStep(model, weights=form) for form in ("auto", "plain", "packed")}
    assert [native.reading.copied for native in steps.values()] == [True, False, True]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    for native in steps.values():
        native.refresh()
    assert [native.reading.copied for native in steps.values()] == [False, False, True]
    fresh = logits_of(NativeStep(model))
    assert all(torch.equal(logits_of(native), fresh) for native in steps.values())


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
        model.lm_head.weight.mul_(2)
    for _ in range(2):
        with pytest.raises(NoCopyError, match="that are free"):
            native.refresh()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    with pytest.raises(NoCopyError, match="not all numbers of bfloat16"):
        native.refresh()


# --- whether it pays --------------------------------------------------------------------------------------------------


def test_a_copy_is_made_for_few_rows_alone(large):
    model = make()
    assert NativeStep(model, weights="auto", rows=few()).reading.copied
    assert not NativeStep(model, weights="auto", rows=few() + 1).reading.copied
    assert not NativeStep(tiny_model("qwen2", torch.float32), weights="auto", rows=1).reading.copied
    engines = [Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), slots=slots) for slots in ("auto", 3)]
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
    ways = [Reading(False, 512), Reading(False, 2560), Reading(True, 512)]
    taken = dict(zip(ways, [1.0, 0.97, 0.99], strict=True))
    assert choose_reading(ways, taken.get) == ways[0]  # nothing is so much faster
    taken[ways[1]] = 0.9
    assert choose_reading(ways, taken.get) == ways[1]
    taken[ways[2]] = 0.88
    assert choose_reading(ways, taken.get) == ways[2]


def test_every_way_is_tried_by_turns_and_its_best_time_counts(monkeypatch):
    monkeypatch.setattr(weights, "TRIALS", 3)
    ways, seen = [Reading(False, 512), Reading(False, 0)], []
    times = iter([1.0, 2.0, 9.0, 0.5, 1.0, 2.0])
    assert choose_reading(ways, lambda way: seen.append(way) or next(times)) == ways[1]
    assert seen == ways * 3


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_copied_is_said(monkeypatch):
    with pytest.raises(NoCopyError, match=r"its weights are bfloat16: load it with dtype='float32'"):
        NativeStep(tiny_model("qwen2", torch.bfloat16), weights="packed")
    with pytest.raises(NoCopyError, match="its weights are not all numbers of bfloat16"):
        NativeStep(tiny_model("qwen2", torch.float32), weights="packed")
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
