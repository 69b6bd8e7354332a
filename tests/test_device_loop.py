"""The device's loop against the host's: the same tokens, live context, events and statistics for the same requests."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from hcot_lmeval.engine import Completion, Engine, EngineOptions, Request, SamplingParams
from hcot_lmeval.engine.device import loop
from hcot_lmeval.engine.device.loop import Program, runs_on_device
from hcot_lmeval.engine.device.state import State
from tests.random_traces import random_trace
from tests.reference import EOS, MARKERS, POLICIES, as_reference, reference_logits
from tests.test_engine_exact import (
    FP64,
    forced,
    generated_that_fit,
    make_engine,
    make_model,
    random_requests,
    sampled_requests,
)
from tests.tiny import tiny_model, tiny_tokenizer

KINDS = ("qwen2", "qwen3", "llama")
WAYS = (
    {},
    {"slots": 3, "reforward": "replay", "step_tokens": 7},
    {"slots": 5, "run_ahead": 2},
    {"run_ahead": 9, "reforward": "chunk"},
    {"slots": 11, "run_ahead": 16, "reforward": "replay"},
)
"""Fewer slots than requests, either way to read solutions again, and a host that lags behind."""


def requests_of(notation: str, count: int = 10) -> list[Request]:
    """Forced traces, greedy and sampled ones, prompts of 1 to 12 tokens."""
    plain = [replace(r, params=replace(r.params, repetition_penalty=1.0)) for r in sampled_requests(notation, count)]
    return [r for pair in zip(plain, random_requests(notation, count, first=7), strict=True) for r in pair]


def facts(done: Completion) -> dict[str, object]:
    """Everything of a completion but the times, and how much of a prompt was shared: that depends on the order."""
    statistics = done.statistics.as_dict()
    events = [
        (type(e).__name__, *(getattr(e, f.name) for f in fields(e) if f.name not in ("time", "shared")))
        for e in done.note.events
    ]
    return {
        "request": (done.request.id, done.sample),
        "tokens": done.token_ids,
        "live": done.live_ids,
        "end": (done.finish_reason, done.stop, done.text),
        "events": events,
        "statistics": {k: v for k, v in statistics.items() if k not in ("wall_seconds", "tokens_per_second")},
    }


def compare(model, notation: str, policy: str, requests: list[Request], ways=WAYS, **options) -> int:
    """Returns the prunes of the host's loop."""
    host = make_engine(model, notation, policy, loop="host", **options).generate(requests)
    expected = [facts(done) for done in host]
    for way in ways:
        engine = make_engine(model, notation, policy, loop="device", **{**options, **way})
        assert [facts(done) for done in engine.generate(requests)] == expected, way
        assert engine.live.requests_done == len(expected)
        assert engine.live.generated_tokens == sum(len(done.token_ids) for done in host)
    return sum(done.statistics.prune_events for done in host)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(request.param)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_the_loops_agree(model, notation, policy):
    first = KINDS.index(model.config.model_type) + [*MARKERS].index(notation)
    ways = [WAYS[first % 5], WAYS[(first + 2) % 5]]
    prunes = compare(model, notation, policy, requests_of(notation, 7), ways)
    assert prunes >= 7 or policy == "off"  # more than 120 in all


@pytest.mark.parametrize("policy", POLICIES)
def test_windows_and_caps(policy):
    """Gemma 2: windows of 16 positions, which under evict are not places, and capped scores."""
    compare(make_model("gemma2"), "hcot", policy, requests_of("hcot", 4), WAYS[1:3])


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_slots_of_a_smaller_dtype(kv_dtype):
    """Both round what they store in the same way, in single tokens as in chunks."""
    for policy, way in zip(POLICIES, ({}, WAYS[1], WAYS[3]), strict=True):
        compare(make_model("qwen2"), "hcot", policy, requests_of("hcot", 4), (way,), kv_dtype=kv_dtype)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_full_contexts_and_positions_that_end(notation, policy):
    model, requests = make_model("qwen2"), random_requests(notation, 10, first=40)
    options = {"max_context": 24, "max_position": 30}
    compare(model, notation, policy, requests, WAYS[1:2], **options)
    done = make_engine(model, notation, policy, loop="device", max_context=24).generate(requests)
    for request, completion in zip(requests, done, strict=True):
        fits = generated_that_fit(request, notation, policy, 24)
        assert completion.token_ids == request.forced_ids[:fits]
    assert {c.finish_reason for c in done} == {"length", "context"}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_logits_are_those_of_the_slow_twin(model, policy, monkeypatch):
    """At every step of forced traces, whether solutions are read again in one piece or token by token."""
    twin = as_reference(make_model(model.config.model_type))
    seen: dict[int, list[torch.Tensor]] = {}
    plain = Program.offer

    def watch(self, rows, logits):
        state = self.state.read(rows)
        for i, row in enumerate(rows.tolist()):
            if state.runs[i] and state.left[i] == 1:
                seen.setdefault(row, []).append(logits[i].clone())
        plain(self, rows, logits)

    monkeypatch.setattr(Program, "offer", watch)
    for notation, reforward in (("hcot", "chunk"), ("pencil", "replay")):
        requests = random_requests(notation, 5)
        seen.clear()
        engine = make_engine(model, notation, policy, loop="device", reforward=reforward, slots=5)
        engine.generate(requests)
        for slot, request in enumerate(requests):
            ids, start = [*request.prompt_ids, *request.forced_ids], len(request.prompt_ids)
            expected = reference_logits(twin, ids, start, MARKERS[notation], policy)[:-1]
            assert (torch.stack(seen[slot]) - expected).abs().max() <= FP64


def test_a_device_that_never_prunes_is_noticed(monkeypatch):
    plain = State.follow
    monkeypatch.setattr(State, "follow", lambda self, *given: plain(self, *given)._replace(prunes=given[1] < 0))
    for policy in ("recompute", "evict"):
        with pytest.raises(AssertionError):
            compare(make_model("qwen2"), "hcot", policy, requests_of("hcot", 6), WAYS[1:2])


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_share_their_prompt(policy):
    prompt, marks = tuple(range(20, 32)), MARKERS["hcot"]
    params = SamplingParams(max_gen_toks=20, temperature=1.0, n=5)
    opened = (marks.open, 40, 41, marks.split, 42, marks.close)
    requests = [Request("a", prompt, params, forced_ids=opened), Request("b", prompt[:7], params)]
    compare(make_model("llama"), "hcot", policy, requests, WAYS[1:4])


def test_what_only_the_host_knows_ends_a_row_late_and_leaves_no_trace():
    """Stop strings, loops and stop ids; the slots are used again at once."""
    tokenizer, model = tiny_tokenizer(), tiny_model("qwen2", torch.float64)
    words = [tuple(tokenizer.encode(f"{n} is it STOP and on and on", add_special_tokens=False)) for n in range(9)]
    again = (20, 21, 22) * 40
    strings = tuple(tokenizer.decode(ids[4:6]) for ids in words[:1])
    requests = [
        Request(str(i), (30 + i,), SamplingParams(max_gen_toks=60, stop_strings=strings), forced_ids=ids)
        for i, ids in enumerate(words)
    ]
    requests += [Request(f"loop {i}", (40,), SamplingParams(max_gen_toks=90), forced_ids=again) for i in range(3)]
    requests += [Request("id", (41,), SamplingParams(max_gen_toks=9, stop_ids=(50,)), forced_ids=(49, 50, 51))]
    options = {"slots": 2, "markers": MARKERS["hcot"], "policy": "recompute", "loop_tokens": 30, "eos_ids": (EOS,)}

    def generate(**way) -> list[dict[str, object]]:
        engine = Engine(model, tokenizer, poison=True, self_check=False, **{**options, **way})
        return [facts(done) for done in engine.generate(requests)]

    expected = generate(loop="host")
    assert {fact["end"][0] for fact in expected} >= {"stop", "loop"}
    for run_ahead in (1, 2, 12):
        assert generate(loop="device", run_ahead=run_ahead) == expected


def test_min_gen_toks_and_prompts_without_room():
    model = make_model("qwen2")
    early = SamplingParams(max_gen_toks=12, min_gen_toks=6, temperature=1.0, stop_ids=tuple(range(8, 40)))
    requests = [Request(str(i), (20 + i, 21), replace(early, seed=i)) for i in range(6)]
    requests += [Request("long", (20,) * 30, SamplingParams(max_gen_toks=3)), forced("short", [20, 21, 22, 23], 1)]
    compare(model, "hcot", "recompute", requests, WAYS[1:3], max_context=26)


# --- who is served ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "params", "named"),
    [
        ({"constraints": "grammar"}, {}, "constraints=grammar"),
        ({"ablation": "oldest"}, {}, "ablation=oldest"),
        ({"prompt_acts": True}, {}, "prompt_acts"),
        ({}, {"repetition_penalty": 1.5}, "repetition_penalty=1.5"),
        ({}, {"logprobs": True}, "logprobs"),
    ],
)
def test_what_the_device_cannot_do_is_named(options, params, named, caplog):
    model, request = make_model("qwen2"), Request("r", (20,), SamplingParams(max_gen_toks=3, **params))
    with pytest.raises(ValueError, match=named):
        make_engine(model, "hcot", "recompute", loop="device", **options).generate([request])
    engine = make_engine(model, "hcot", "recompute", **options)
    decoder = engine.decoder
    on_cuda = SimpleNamespace(device=torch.device("cuda"), layers=decoder.layers, pool_kind=decoder.pool_kind)
    with caplog.at_level(logging.INFO):
        assert not runs_on_device(on_cuda, engine.options, [request], watched=False)
        assert runs_on_device(on_cuda, EngineOptions(loop_tokens=5), [Request("r", (20,))], watched=False)
    assert f"the host runs the steps, since the device's loop cannot serve {named}" in caplog.text


def test_compiled_steps_are_asked_for_and_write_the_same(monkeypatch):
    """By Dynamo alone, for a compiler of C++ takes a minute; off by default."""
    asked = []

    def compile_eagerly(step, *, backend, **how):
        asked.append((backend, how))
        return dynamo(step, backend="eager", **how)

    dynamo = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    torch._dynamo.reset()
    requests, model = requests_of("hcot", 4), make_model("qwen2")
    plain, compiled = (
        [facts(done) for done in make_engine(model, "hcot", "recompute", loop="device", **way).generate(requests)]
        for way in ({}, {"compiled": True})
    )
    assert plain == compiled
    assert asked == [("inductor", {"fullgraph": True, "dynamic": False})]


def test_watching_the_logits_takes_the_host():
    engine = make_engine(make_model("qwen2"), "hcot", "off", loop="device")
    with pytest.raises(ValueError, match="on_logits"):
        list(engine.stream([Request("r", (20,))], on_logits=lambda *_: None))


def test_auto_is_the_host_on_the_cpu(monkeypatch):
    monkeypatch.setattr(loop, "State", None)
    make_engine(make_model("qwen2"), "hcot", "off").generate([Request("r", (20,), SamplingParams(max_gen_toks=2))])


def test_a_device_and_a_host_that_disagree_are_an_error(monkeypatch):
    engine = make_engine(make_model("qwen2"), "hcot", "off", loop="device", eos_ids=())
    ids, start = random_trace(1, MARKERS["hcot"], 20)
    plainly = State.begin

    def short(request: Request) -> Request:
        return replace(request, params=replace(request.params, max_gen_toks=5))

    monkeypatch.setattr(State, "begin", lambda self, slot, request, *rest: plainly(self, slot, short(request), *rest))
    with pytest.raises(RuntimeError, match="after 5 tokens"):
        engine.generate([forced("r", ids, start)])


def test_the_models_attention_is_its_own_between_results():
    model = make_model("qwen2")
    before = model.config._attn_implementation
    engine = make_engine(model, "hcot", "recompute", loop="device", slots=2)
    for _ in engine.stream(requests_of("hcot", 3)):
        assert model.config._attn_implementation == before
        assert not any(hasattr(module, "hcot_step") for module in model.modules())
