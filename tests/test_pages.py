"""Weights, keys and values on huge pages: the same numbers, stored elsewhere, and only where it is safe."""

import copy
import gc
import itertools
import sys

import pytest
import torch

from hcot_lmeval.engine import Engine, Request, SamplingParams, slots
from hcot_lmeval.engine import slots as pages
from hcot_lmeval.engine.slots import PAGE, KVPool, LayerSpec, allocate, move_to_huge_pages
from tests.reference import EOS, MARKERS
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for huge pages")


@pytest.fixture(autouse=True)
def offered(monkeypatch):
    """Whatever this machine's switch says, and however small the model."""
    monkeypatch.setattr(pages, "offered", lambda: True)
    monkeypatch.setattr(pages, "LEAST_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_stay_what_they_are(dtype):
    model = tiny_model("qwen2", dtype, tie_word_embeddings=True)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    assert "pages of 2 MiB" in move_to_huge_pages(model)
    places = []
    for name, parameter in model.named_parameters():
        same, values = before[name]
        assert parameter is same and torch.equal(parameter, values) and parameter.requires_grad
        places.append((parameter.data_ptr(), parameter.nbytes))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert min(places)[0] % PAGE == 0 and all(at % pages.ALIGNMENT == 0 for at, _ in places)
    places.sort()
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(places))


def test_a_model_is_moved_once():
    model = tiny_model("llama", torch.float32)
    assert move_to_huge_pages(model) and move_to_huge_pages(model) == ""
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.clone()
    assert move_to_huge_pages(model)  # what came from elsewhere


def test_moved_models_train_save_and_load(tmp_path):
    model = tiny_model("qwen2", torch.float32)
    move_to_huge_pages(model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, twin.lm_head.weight)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_memory_that_others_use_stays_where_it_is():
    model = tiny_model("qwen2", torch.float32)
    model.lm_head.weight.data.share_memory_()
    flat = torch.randn(2, *model.model.norm.weight.shape)
    model.model.norm.weight.data = flat[0]  # a piece of something larger
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias.data = attention.v_proj.bias.data
    stay = [model.lm_head.weight, model.model.norm.weight, attention.k_proj.bias, attention.v_proj.bias]
    before = {id(p): p.data_ptr() for p in model.parameters()}
    assert move_to_huge_pages(model)
    unmoved = {id(p) for p in model.parameters() if p.data_ptr() == before[id(p)]}
    assert unmoved == {id(p) for p in stay}


@pytest.mark.parametrize(
    ("name", "value"),
    [("offered", lambda: False), ("LEAST_BYTES", 2**40), ("psutil.virtual_memory", None)],
    ids=["switched off", "too small", "no memory"],
)
def test_nothing_is_moved_where_it_does_not_pay_or_fit(name, value, monkeypatch):
    model = tiny_model("qwen2", torch.float32)
    before = [p.data_ptr() for p in model.parameters()]
    if value is None:
        monkeypatch.setattr(pages.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    else:
        monkeypatch.setattr(pages, name, value)
    assert move_to_huge_pages(model) == "" and [p.data_ptr() for p in model.parameters()] == before


@pytest.mark.parametrize("switch", ["always [madvise] never", "always madvise [never]", None])
def test_the_switch_of_the_system_is_read(switch, monkeypatch, tmp_path):
    monkeypatch.undo()
    file = tmp_path / "enabled"
    if switch is not None:
        file.write_text(switch + "\n")
    monkeypatch.setattr(pages, "SWITCH", file)
    assert pages.offered() is (switch is not None and "[never]" not in switch)


def test_the_engine_moves_weights_unless_it_is_told_not_to():
    """The tokens are the same, pruned on the way."""
    forced, done = (3, 40, 41, 4, 42, 5), []
    for moves in (False, True):
        model = tiny_model("qwen2", torch.float32)
        before = model.lm_head.weight.data_ptr()
        engine = Engine(model, markers=MARKERS["hcot"], eos_ids=(EOS,), compute="native", huge_pages=moves)
        assert (model.lm_head.weight.data_ptr() != before) is moves
        (completion,) = engine.generate([Request("1", (8, 9), SamplingParams(max_gen_toks=20), forced_ids=forced)])
        assert completion.statistics.prune_events
        done.append(completion.token_ids)
    assert done[0] == done[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_keys_and_values_that_fill_a_page_lie_on_such_pages(dtype):
    shape = LayerSpec(query_heads=2, heads=2, key_dim=64, value_dim=4, dtype=dtype, device=torch.device("cpu"))
    pool = KVPool({0: shape}, slots=3, length=PAGE // 128, poison=True, huge_pages=True)
    assert pool.keys[0].shape == (3, PAGE // 128, 2, 64) and pool.keys[0].dtype == dtype
    assert pool.keys[0].data_ptr() % PAGE == 0 and bool(pool.keys[0].isnan().all())
    assert pool.values[0].nbytes < PAGE and bool(pool.values[0].isnan().all())


def test_memory_outlives_whoever_asked_for_it():
    kept = allocate(2 * PAGE)[PAGE : PAGE + 8]
    gc.collect()
    assert kept.fill_(7).tolist() == [7] * 8


@pytest.mark.parametrize("huge", [True, False])
def test_the_engine_has_its_slots_there_unless_it_is_told_not_to(huge, monkeypatch):
    asked = []
    monkeypatch.setattr(slots, "allocate", lambda size: asked.append(size) or allocate(size))
    engine = Engine(tiny_model("qwen2", torch.float32), markers=MARKERS["hcot"], eos_ids=(EOS,), huge_pages=huge)
    engine.generate([Request("1", (8, 9), SamplingParams(max_gen_toks=4))])
    assert sum(asked) == (engine.live.kv_bytes if huge else 0)
