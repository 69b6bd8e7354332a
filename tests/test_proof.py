"""The proof of the device's loop: planted faults are found before a request is served, and results are the host's."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.engine.decoder import Decoder, UnsupportedModelError
from hcot_lmeval.engine.device import loop, proof
from hcot_lmeval.engine.device.attention import Sdpa
from hcot_lmeval.engine.device.sampling import Sampler
from hcot_lmeval.engine.device.state import RowState, State
from tests.reference import MARKERS, POLICIES
from tests.test_device_loop import facts
from tests.test_engine_exact import make_engine, make_model


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(proof, "_PROVED", {})


@pytest.fixture(scope="module")
def model():
    return make_model("qwen2").float()


def requests(count: int = 5) -> list[Request]:
    return [
        Request(str(i), tuple(range(3 + i, 9 + i)), SamplingParams(12, temperature=0.9, seed=i)) for i in range(count)
    ]


def engine_of(model, policy="recompute", **options) -> Engine:
    return make_engine(model, "hcot", policy, self_check=True, **options)


def offset(keys):
    """Every row of the keys one place later than it should be."""
    return keys.roll(1, dims=1)


def wrong_token(monkeypatch):
    plain = Sampler.choose
    monkeypatch.setattr(
        Sampler, "choose", lambda self, state, rows, logits: plain(self, state, rows, logits).add(1) % 50
    )


def stale_length(monkeypatch):
    """When its solution was read again, a row is one token longer than it says."""
    plain = State.skip

    def stale(self, slot, ids, length):
        plain(self, slot, ids, length)
        self.states[slot, RowState._fields.index("length")] += 1

    monkeypatch.setattr(State, "skip", stale)


def not_a_number(monkeypatch):
    plain = loop.Program.logits
    monkeypatch.setattr(loop.Program, "logits", lambda self, rows: plain(self, rows) * float("nan"))


def off_by_one_row(monkeypatch):
    plain = Sdpa.decode
    monkeypatch.setattr(Sdpa, "decode", lambda self, query, keys, *rest: plain(self, query, offset(keys), *rest))


def raises(monkeypatch):
    def fails(self, rows):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(loop.Program, "logits", fails)


def wrong_chunk(monkeypatch):
    """A solution that is read again in one piece lands one position late."""
    plain = Decoder.forward

    def late(self, pool, chunks, attend=None):
        if attend is not None:
            chunks = [replace(c, positions=[p + (c.start > 0) for p in c.positions]) for c in chunks]
        return plain(self, pool, chunks, attend)

    monkeypatch.setattr(Decoder, "forward", late)


FAULTS = {
    wrong_token: "in place of",
    stale_length: "",
    not_a_number: "NaN or infinite",
    off_by_one_row: "off by",
    raises: "RuntimeError: an illegal memory access was encountered",
    wrong_chunk: "off by",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_is_found_before_a_request_is_served(model, plant, monkeypatch, caplog):
    expected = [facts(done) for done in engine_of(model, loop="host").generate(requests())]
    plant(monkeypatch)
    engine = engine_of(model, loop="auto")
    monkeypatch.setattr("hcot_lmeval.engine.engine.runs_on_device", lambda *_, **__: True)  # as on CUDA
    with caplog.at_level(logging.WARNING):
        found = [facts(done) for done in engine.generate(requests())]
    assert found == expected
    assert FAULTS[plant] in caplog.text and "the device's loop, as asked for, is not used" in caplog.text
    assert "hcot doctor --out FILE" in caplog.text
    assert engine.live.requests_done == len(expected)
    with pytest.raises(UnsupportedModelError, match="loop='device' is wrong for Qwen2ForCausalLM"):
        engine_of(model, loop="device").generate(requests())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_what_is_right_passes(notation, policy, caplog):
    """Of any notation and policy; with fewer live tokens than the trials need, too."""
    for more in ({}, {"max_context": 20}, {"reforward": "replay", "run_ahead": 9}):
        engine = make_engine(make_model("qwen2"), notation, policy, self_check=True, loop="device", **more)
        with caplog.at_level(logging.WARNING):
            engine.generate(requests(2))
        assert engine.device_form() == engine.options
    assert "is not used" not in caplog.text


def test_the_trials_prune(model):
    engine = engine_of(model)
    done = engine.generate(engine.trials())
    assert sum(one.statistics.prune_events for one in done) >= 5 and max(one.statistics.max_depth for one in done) >= 2


@pytest.mark.parametrize(
    ("fault", "form"),
    [
        ("compiled", {"compiled": False}),
        ("graphs", {"compiled": False, "graphs": False}),
        ("attention", {"compiled": False, "graphs": False, "attention": "sdpa"}),
        ("sampling", {"compiled": False, "graphs": False, "attention": "sdpa", "compute": "torch"}),
    ],
)
def test_each_fallback_is_the_simplest_change_that_helps(fault, form):
    """The ladder on CUDA, on runs that are wrong as long as the faulty part takes part."""
    parts = {
        "compiled": lambda o: o.compiled,
        "graphs": lambda o: o.graphs,
        "attention": lambda o: o.attention == "auto",
        "sampling": lambda o: o.compute == "auto",
    }
    bad = [parts[name] for name in list(parts)[: list(parts).index(fault) + 1]]
    options = Engine.from_pretrained("tiny-hcot").options
    options = type(options)(**{**vars(options), "compiled": True})
    tried = []

    def run(asked, on_logits):
        if asked is not None:
            tried.append(asked)
            if any(part(asked) for part in bad):
                raise RuntimeError("wrong")
        return []

    found, _ = proof.prove(options, [], run, {"device": "a card", "fault": fault})
    assert {name: getattr(found, name) for name in form} == form
    assert len(tried) == len(form) + 1
    assert (
        proof.prove(options, [], run, {"device": "a card", "fault": fault})[0] == found and len(tried) == len(form) + 1
    )


def test_what_passed_on_a_card_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 15)
    options, tried = Engine.from_pretrained("tiny-hcot").options, []

    def run(asked, on_logits):
        tried.append(asked)
        return []

    assert proof.prove(options, [], run, {"device": "a card"}) == (options, 5) and len(tried) == 2
    monkeypatch.setattr(proof, "_PROVED", {})
    assert proof.prove(options, [], run, {"device": "a card"}) == (options, 5) and len(tried) == 2
    assert proof.prove(options, [], run, {"device": "another card"}) == (options, 5) and len(tried) == 4
    monkeypatch.setattr(proof, "_PROVED", {})
    monkeypatch.setenv("HCOT_LMEVAL_CACHE", "/proc/nowhere")
    assert proof.prove(options, [], run, {"device": "a card"}) == (options, 5) and len(tried) == 6


def test_a_near_tie_is_no_fault():
    logits = torch.zeros(50)
    logits[7], logits[9] = 3.0, 3.0 + 1e-5
    request = Request("r", (1,), SamplingParams(3, temperature=0.0))
    assert proof._is_tie(logits, request, 0, (7, 9)) and not proof._is_tie(logits, request, 0, (7, 8))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("policy", POLICIES)
def test_out_of_memory_halves_the_rows_and_loses_nothing(model, policy, way, monkeypatch, caplog):
    """Wherever it happens: while prompts are read, tokens decoded, or solutions read again."""
    options = {"loop": way, "slots": 6, "self_check": False, "compute": "torch"}
    expected = [facts(done) for done in make_engine(model, "hcot", policy, **options).generate(requests(9))]
    plain_forward, plain_call = Decoder.forward, Decoder.call
    for moment in (1, 2, 5, 11, 23):
        calls, told = [0], []

        def failing(self, *args, plain=plain_call, calls=calls, moment=moment, **more):
            calls[0] += 1
            if calls[0] in (moment, moment + 9):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return plain(self, *args, **more)

        engine = make_engine(model, "hcot", policy, **options)
        monkeypatch.setattr(Decoder, "call", failing)
        caplog.clear()
        done = {}
        for one in engine.stream(
            requests(9), on_token=lambda r, k, token, step, live, told=told: told.append((r.id, token))
        ):
            done[one.request.id] = facts(one)
        monkeypatch.setattr(Decoder, "call", plain_call)
        assert [done[request.id] for request in requests(9)] == expected
        assert "memory ran out; 3 rows go on side by side" in caplog.text
        assert engine.live.requests_done == 9
        assert engine.live.generated_tokens == sum(len(one["tokens"]) for one in expected)
        for one in expected:  # each token is told once
            assert [token for name, token in told if name == one["request"][0]] == list(one["tokens"])
    assert Decoder.forward is plain_forward


def test_one_row_that_does_not_fit_is_an_error(model, monkeypatch):
    def failing(self, *args, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(model, "hcot", "recompute", self_check=False, compute="torch")
    monkeypatch.setattr(Decoder, "call", failing)
    with pytest.raises(MemoryError, match=r"memory ran out with a single row .* lower max_context"):
        engine.generate(requests(5))


# --- training ---------------------------------------------------------------------------------------------------------


def flex(monkeypatch, model, *, fault=lambda out: out):
    """FlexAttention has no gradients on a CPU: textbook attention stands in for it, with the dense mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from hcot_lmeval import masks

    def attend(module, query, key, value, attention_mask, **more):
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None  # a plain causal forward
        out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **more)
        return fault(out) if mask is not None else out, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", attend)
    monkeypatch.setattr(masks, "block_mask", masks.dense_mask)
    monkeypatch.setattr(type(model), "_flex_attn_can_dispatch", lambda self, *_, **__: True, raising=False)
    model.set_attn_implementation("flex_attention")


def raising(out):
    raise RuntimeError("LoweringException: NoValidChoicesError")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda out: out, ""),
        (lambda out: out.roll(1, dims=1), "its loss is off by"),
        (lambda out: out.detach(), "its gradient of model."),
        (lambda out: out * float("nan"), "its loss is NaN or infinite"),
        (raising, "RuntimeError: LoweringException: NoValidChoicesError"),
    ],
    ids=["right", "off by one row", "no gradient", "NaN", "raises"],
)
def test_attention_is_proved_before_training(monkeypatch, caplog, fault, told):
    from hcot_lmeval.grammar import Grammar
    from hcot_lmeval.training.forward import LossSettings
    from hcot_lmeval.training.proof import settle_attention

    model = make_model("qwen2").float()
    settings = LossSettings(Grammar(MARKERS["hcot"], (None, None), frozenset({2})))
    flex(monkeypatch, model, fault=fault)
    with caplog.at_level(logging.WARNING):
        found = settle_attention(model, settings, "recompute", row_length=512)
    assert found == ("sdpa" if told else "flex_attention") == model.config._attn_implementation
    assert told in caplog.text and all(parameter.grad is None for parameter in model.parameters())
    if told:
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="the dense mask of 4 rows of 10000000 tokens would take"):
            settle_attention(model, settings, "recompute", row_length=10**7, rows=4)


def test_rows_are_planned_behind_what_running_takes(monkeypatch):
    from hcot_lmeval.engine import slots

    layer = slots.LayerSpec(2, 1, 8, 8, torch.float32, torch.device("cpu"), None, None, False)
    monkeypatch.setattr(slots, "free_bytes", lambda device: 100 * layer.token_bytes)
    device = torch.device("cpu")
    free = slots.plan_slots({0: layer}, 1, 1000)
    half = slots.plan_slots({0: layer}, 1, 1000, {device: (50 * layer.token_bytes, 0)})
    quarter = slots.plan_slots({0: layer}, 1, 1000, {device: (50 * layer.token_bytes, layer.token_bytes)})
    assert abs(half - free / 2) <= 1 and abs(quarter - free / 4) <= 1
