"""What users see of the engine: budgets, endings, sharing, memory, and what it refuses. Exactness has its own file."""

from __future__ import annotations

import logging

import peft
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hcot_lmeval.engine import Decoder, Engine, Request, SamplingParams, UnsupportedModelError, attention, slots
from hcot_lmeval.events import Prefill
from hcot_lmeval.notes import NoteTaker, read_notes
from hcot_lmeval.tokens import encode_prompt
from hcot_lmeval.trace import Policy, live_ids
from hcot_lmeval.vocabulary import marker_ids
from tests.tiny import favour, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MARKERS = marker_ids(TOKENIZER)
OPEN, SPLIT, CLOSE = MARKERS.open, MARKERS.split, MARKERS.close
EOS = TOKENIZER.eos_token_id
PROMPT = tuple(encode_prompt(TOKENIZER, "What is the sum of the first ten even numbers?"))
BLOCK = (OPEN, *range(40, 60), SPLIT, 60, 61, CLOSE)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", torch.float64)


def make(model, **options) -> Engine:
    return Engine(model, TOKENIZER, **{"poison": True, "self_check": False, **options})


def forced(*tokens: int, max_gen_toks: int | None = None, **params) -> Request:
    return Request("r", PROMPT, SamplingParams(max_gen_toks=max_gen_toks or len(tokens), **params), forced_ids=tokens)


def only(engine: Engine, request: Request):
    (completion,) = engine.generate([request])
    return completion


# --- endings ----------------------------------------------------------------------------------------------------------


def words(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


THINK = tuple(TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"]))
STOP, QUESTION = words("STOP"), words("The answer is 35.\n\nQuestion: how")
HIDDEN = (THINK[0], *STOP, OPEN, *STOP, SPLIT, *STOP, CLOSE, *STOP, THINK[1], 50, *STOP)
ENDINGS = {
    "the end token counts": ((50, 51, EOS, 52), {}, "eos", 3, TOKENIZER.decode([50, 51])),
    "a stop id": ((50, 51, 52), {"stop_ids": (51,)}, "stop", 2, TOKENIZER.decode([50, 51])),
    "a stop string, cut from the text": (
        QUESTION, {"stop_strings": ("\n\nQuestion:", "never")}, "stop", len(QUESTION) - 3, "The answer is 35.",
    ),
    "no stop string within a thought or the thinking": (
        (*HIDDEN, 51), {"stop_strings": ("STOP",)}, "stop", len(HIDDEN), None,
    ),
    "no stop string from before min_gen_toks": (
        words("a STOP, two STOP"), {"stop_strings": ("STOP",), "min_gen_toks": len(words("a STOP")) + 1}, "stop", None,
        "a STOP, two ",
    ),
    "max_gen_toks, which counts pruned tokens too": (
        (*BLOCK, 70, 71), {"max_gen_toks": len(BLOCK) + 1}, "length", len(BLOCK) + 1, None,
    ),
}  # fmt: skip
"""Tokens that are forced, parameters, the finish reason, how many tokens come, and the text."""


@pytest.mark.parametrize("case", ENDINGS)
def test_what_ends_a_row(model, case):
    tokens, params, reason, count, text = ENDINGS[case]
    done = only(make(model), forced(*tokens, **params))
    assert done.finish_reason == reason and done.statistics.generated_tokens == len(done.token_ids)
    assert done.token_ids == tokens[: len(done.token_ids)] and count in (None, len(done.token_ids))
    assert text in (None, done.text)
    if reason == "stop":
        assert done.stop in (*params.get("stop_ids", ()), *params.get("stop_strings", ()))
    assert len(done.live_ids) == len(PROMPT) + 5 or case != "max_gen_toks, which counts pruned tokens too"


def test_min_gen_toks_keeps_the_model_from_ending():
    eager = favour(tiny_model("qwen2"), [EOS], scale=50.0)
    free = only(make(eager), Request("r", PROMPT, SamplingParams(max_gen_toks=9)))
    held = only(make(eager), Request("r", PROMPT, SamplingParams(max_gen_toks=9, min_gen_toks=5)))
    assert EOS not in held.token_ids[:5]
    assert len(free.token_ids) <= len(held.token_ids)


@pytest.mark.parametrize("policy", Policy)
def test_max_context_counts_live_tokens(model, policy):
    """Ten blocks never fit at once; pruned, they do, and the trace is far longer than the context."""
    request = forced(*(BLOCK * 10), max_gen_toks=10 * len(BLOCK))
    limit = len(PROMPT) + 9 * 4 + len(BLOCK)
    done = only(make(model, policy=policy, max_context=limit), request)
    assert done.statistics.peak_live_tokens <= limit
    if policy is Policy.OFF:
        assert done.finish_reason == "context"
        assert len(done.token_ids) == limit - len(PROMPT)
    else:
        assert done.finish_reason == "length"
        assert done.token_ids == request.forced_ids


def test_evict_ends_where_positions_end(model):
    request = forced(*(BLOCK * 4), max_gen_toks=4 * len(BLOCK))
    done = only(make(model, policy="evict", max_position=len(PROMPT) + 30), request)
    assert (done.finish_reason, len(done.token_ids)) == ("context", 30)


def test_a_prompt_without_room_ends_at_once(model):
    short = Request("short", PROMPT[:3], SamplingParams(max_gen_toks=2))
    full, long = (Request(str(n), PROMPT * 9, SamplingParams(max_gen_toks=2)) for n in (0, 1))
    limit = len(PROMPT * 9)
    done = make(model, max_context=limit - 1, slots=1).generate([long, short])
    assert [d.finish_reason for d in done] == ["context", "length"]
    assert done[0].token_ids == () and done[0].statistics.prompt_tokens == limit
    assert make(model, max_context=limit).generate([full])[0].finish_reason == "context"


# --- many rows --------------------------------------------------------------------------------------------------------


def test_completions_come_in_the_order_of_requests(model):
    requests = [Request(str(n), PROMPT[: n + 1], SamplingParams(max_gen_toks=9 - n, n=2)) for n in range(5)]
    done = make(model, slots=3).generate(requests)
    assert [(d.request.id, d.sample) for d in done] == [(str(n), k) for n in range(5) for k in range(2)]


def test_samples_of_a_prompt_share_its_prefill(model):
    """However many samples: the prompt is forwarded once, and its last token once a sample."""
    engine = make(model, slots=3)
    request = Request("r", PROMPT, SamplingParams(max_gen_toks=6, temperature=1.0, n=7))
    done = engine.generate([request])
    prefills = [event for d in done for event in d.note.events if isinstance(event, Prefill)]
    assert sorted(p.shared for p in prefills) == [0] + [len(PROMPT) - 1] * 6
    assert len({d.token_ids for d in done}) == 7
    alone = [
        only(make(model, slots=1), Request("r", PROMPT, SamplingParams(max_gen_toks=6, temperature=1.0)))
        for _ in range(2)
    ]
    assert alone[0].token_ids == alone[1].token_ids == done[0].token_ids


def count_steps(engine: Engine, requests: list[Request], monkeypatch) -> int:
    steps = []
    forward = engine.decoder.forward
    monkeypatch.setattr(engine.decoder, "forward", lambda *given: steps.append(1) or forward(*given))
    engine.generate(requests)
    return len(steps)


def test_samples_of_a_prompt_start_together(model, monkeypatch):
    """One step reads the prompt, and then all samples run: no more steps than for as many prompts, and one."""
    engine = make(model, slots=64)
    params = SamplingParams(max_gen_toks=8, temperature=1.0, n=64)
    assert count_steps(engine, [Request("r", PROMPT, params)], monkeypatch) == 9
    equal = [Request(str(i), PROMPT, SamplingParams(max_gen_toks=8)) for i in range(64)]
    assert count_steps(engine, equal, monkeypatch) == 9


def test_many_waiting_requests_with_one_prompt_are_served_as_slots_get_free(model):
    requests = [Request(str(i), PROMPT[: 3 + i % 2], SamplingParams(max_gen_toks=1 + i % 3)) for i in range(400)]
    done = make(model, slots=7, step_tokens=2).generate(requests)
    assert [c.request.id for c in done] == [r.id for r in requests]
    beyond = [Request(str(i), PROMPT * 9, SamplingParams(max_gen_toks=2)) for i in range(5)]
    done = make(model, max_context=20, slots=2).generate([*beyond, *requests[:5]])
    assert [c.finish_reason for c in done] == ["context"] * 5 + ["length"] * 5


def test_long_prompts_are_read_in_pieces_beside_rows_that_decode(model):
    long = Request("long", PROMPT * 10, SamplingParams(max_gen_toks=5))
    short = Request("short", PROMPT, SamplingParams(max_gen_toks=30))
    whole = make(model).generate([short, long])
    pieces = make(model, step_tokens=7).generate([short, long])
    assert [d.token_ids for d in whole] == [d.token_ids for d in pieces]


def test_streams_of_one_engine_do_not_meet(model):
    engine = make(model, slots=2)
    requests = [Request(str(n), PROMPT[n:], SamplingParams(max_gen_toks=4 + n)) for n in range(4)]
    expected = [done.token_ids for done in engine.generate(requests)]
    first, second = engine.stream(requests), engine.stream(requests[::-1])
    found: dict[str, set[tuple[int, ...]]] = {}
    for pair in zip(first, second, strict=True):
        for done in pair:
            found.setdefault(done.request.id, set()).add(done.token_ids)
    assert [found[str(n)] for n in range(4)] == [{tokens} for tokens in expected]


@pytest.mark.parametrize(("listener", "loop"), [("on_token", "host"), ("on_logits", "host"), ("on_token", "device")])
def test_a_call_from_within_a_step_is_refused_and_harms_nobody(model, listener, loop):
    engine, request = make(model, loop=loop), Request("r", PROMPT, SamplingParams(max_gen_toks=6))
    expected = engine.generate([request])[0].token_ids
    for inner in (engine, make(model)):
        with pytest.raises(RuntimeError, match="is called from within one of its own steps"):
            list(engine.stream([request], **{listener: lambda *_, inner=inner: inner.generate([request])}))
        assert engine.generate([request])[0].token_ids == inner.generate([request])[0].token_ids == expected


def test_the_models_own_attention_is_back_between_results(model):
    before = model.config._attn_implementation
    for _ in make(model).stream([Request(str(n), PROMPT, SamplingParams(max_gen_toks=n + 1)) for n in range(3)]):
        assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError):
        list(make(model).stream([forced(50, 51)], on_logits=lambda *_: 1 / 0))
    assert model.config._attn_implementation == before


def test_progress_and_notes(model, tmp_path):
    engine = make(model)
    request = forced(*BLOCK, *BLOCK, 70)
    with NoteTaker(tmp_path / "notes.jsonl", decode=engine.decode) as notes:
        (done,) = engine.generate([request], notes)
    assert read_notes(notes.path) == [done.note]
    assert (engine.live.requests_done, engine.live.prune_events) == (1, 2)
    assert engine.live.generated_tokens == len(done.token_ids) == 2 * len(BLOCK) + 1
    assert engine.live.seconds > 0
    assert list(done.live_ids) == live_ids([*PROMPT, *done.token_ids], len(PROMPT), MARKERS)


def test_logprobs_are_those_of_the_live_context(model):
    seen = {}
    engine = make(model)
    request = forced(*BLOCK, 70, 71, temperature=0.7, logprobs=True)
    (done,) = engine.stream([request], on_logits=lambda r, k, n, logits: seen.__setitem__(n, logits))
    expected = [torch.log_softmax(seen[n] / 0.7, -1)[t].item() for n, t in enumerate(done.token_ids)]
    assert done.logprobs == pytest.approx(expected, abs=1e-12)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_that_holds_no_row_is_an_error_before_any_allocation(model, monkeypatch):
    monkeypatch.setattr(slots, "free_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="lower max_context"):
        make(model).generate([forced(50)])


def test_memory_that_holds_fewer_rows_is_noted(model, monkeypatch, caplog):
    per_token = sum(shape.token_bytes for shape in Decoder(model, check=False).layers.values())
    need = per_token * (len(PROMPT) + 4)
    monkeypatch.setattr(slots, "free_bytes", lambda device: int(2.5 * need / slots.MEMORY_SHARE))
    requests = [Request(str(n), PROMPT, SamplingParams(max_gen_toks=4)) for n in range(5)]
    with caplog.at_level(logging.WARNING):
        done = make(model, slots=4).generate(requests)
    assert len(done) == 5
    assert "2 rows" in caplog.text and "not 4" in caplog.text


def test_the_pool_is_as_large_as_planned(model):
    engine = make(model, slots=3)
    engine.generate([Request(str(n), PROMPT, SamplingParams(max_gen_toks=10)) for n in range(8)])
    per_token = sum(shape.token_bytes for shape in engine.decoder.layers.values())
    assert engine.live.kv_bytes == 3 * (len(PROMPT) + 10) * per_token
    assert per_token == 2 * 2 * 2 * 8 * 8  # layers x (k, v) x heads x head_dim x bytes of float64


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "off"}, "unknown engine option polcy; known are .*policy, markup"),
        ({"pruning": "off"}, "is policy here"),
        ({"policy": "prune"}, "choose one of off, recompute, evict"),
        ({"markup": "hcott"}, "choose one of hcot"),
        ({"slots": 0}, "slots=0"),
        ({"slots": "many"}, "slots='many'"),
        ({"max_context": 0}, "max_context=0"),
        ({"max_context": 64.5}, "max_context=64.5"),
        ({"max_context": "64"}, "max_context='64'"),
        ({"slots": True}, "slots=True"),
        ({"loop": "gpu"}, "loop='gpu' is not allowed; choose one of auto, host, device"),
        ({"reforward": "twice"}, "reforward='twice'"),
        ({"run_ahead": 0}, "run_ahead=0"),
        ({"attention": "fast"}, "attention='fast'"),
        ({"prompt_acts": "no"}, "prompt_acts='no'"),
        ({"think": "ab"}, "think='ab' is not allowed; give the two strings around the thinking"),
        ({"think": ("a",)}, r"think=\('a',\)"),
        ({"think": ("a", 1)}, r"think=\('a', 1\)"),
        ({"think": ("", "b")}, r"think=\('', 'b'\)"),
        ({"think_ids": (1,)}, r"think_ids=\(1,\)"),
        ({"eos_ids": 1}, "eos_ids=1 is not allowed; give a list of token ids"),
        ({"eos_ids": "ab"}, "eos_ids='ab'"),
        ({"eos_ids": [True]}, r"eos_ids=\[True\]"),
        ({"eos_ids": [-1]}, r"eos_ids=\[-1\]"),
        ({"markers": 3}, "markers=3"),
        ({"markup": 5}, "markup=5"),
        ({"max_slots": None}, "max_slots=None"),
        ({"markup": "pencil"}, r"lacks the pencil markers \[CALL\], \[SEP\]"),
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        make(model, **options)


def test_a_tokenizer_without_markers_serves_policy_off_alone(model):
    bare = tiny_tokenizer(markers=False)
    with pytest.raises(ValueError, match="pruning=off"):
        Engine(model, bare)
    (done,) = Engine(model, bare, policy="off").generate([Request("r", PROMPT, SamplingParams(max_gen_toks=3))])
    assert len(done.token_ids) == 3


def test_stop_strings_without_a_tokenizer(model):
    engine = Engine(model, markers=MARKERS, self_check=False)
    with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
        engine.generate([forced(50, stop_strings=("x",))])
    assert engine.generate([forced(50, 51)])[0].token_ids == (50, 51)


def test_prompts_that_are_none():
    with pytest.raises(ValueError, match="empty prompt"):
        Request("r", ())
    for wrong in ("text", [1, 2], (1, "2")):
        with pytest.raises(TypeError, match="tuple of token ids"):
            Request("r", wrong)


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}


MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "stablelm": {},  # hands no keyword arguments down to its attention
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},  # sinks
    "deepseek_v3": {**MLA, **EXPERTS, "n_routed_experts": 4, "num_key_value_heads": 2},  # keys wider than values
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_unusual_attention_passes_the_self_check(family):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = CONFIG_MAPPING[family](**{**SMALL, **heads, **FAMILIES[family]})
    assert Decoder(AutoModelForCausalLM.from_config(config).eval()).self_check() < 1e-4


def test_the_self_check_notices_wrong_attention(model, monkeypatch):
    assert Decoder(model).self_check() < 1e-6  # eager attention, its reference, rounds to float32
    right = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, k, v, mask, scores: right(q, k, v, None, scores))
    with pytest.raises(UnsupportedModelError, match="failed the self-check"):
        Decoder(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    engine = Engine(tiny_model("llama", dtype), TOKENIZER)
    done = engine.generate([forced(*BLOCK, 50)])[0]
    assert done.statistics.prune_events == 1
    assert {shape.kv_dtype for shape in engine.decoder.layers.values()} == {dtype}


def test_adapters():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model("llama", torch.float64), lora).eval()
    expected = adapted.generate(input_ids=torch.tensor([PROMPT]), max_new_tokens=9, do_sample=False)[0, len(PROMPT) :]
    request = Request("r", PROMPT, SamplingParams(max_gen_toks=9))
    assert list(only(make(adapted, policy="off"), request).token_ids) == expected.tolist()
    plain = only(make(tiny_model("llama", torch.float64), policy="off"), request)
    assert list(plain.token_ids) != expected.tolist()
    virtual = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        make(peft.get_peft_model(tiny_model("llama"), virtual))


@pytest.mark.parametrize("compute", ["auto", "torch"])
@pytest.mark.parametrize(
    "types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_an_engine_follows_a_model_into_another_type(types, compute):
    model, tokenizer = tiny_model("qwen2", types[0]), tiny_tokenizer()
    requests = [Request("1", tuple(encode_prompt(tokenizer, "What is 7^2?")), SamplingParams(max_gen_toks=30))]
    options = {"policy": "off", "max_context": 64, "compute": compute}
    engine = Engine(model, tokenizer, **options)
    engine.generate(requests)
    model.to(types[1])
    (after,), (fresh,) = engine.generate(requests), Engine(model, tokenizer, **options).generate(requests)
    assert after.token_ids == fresh.token_ids
    assert engine.decoder.layers == Engine(model, tokenizer, **options).decoder.layers


@pytest.mark.parametrize("compute", ["auto", "torch"])
def test_weights_that_become_nan_end_a_run(compute):
    model = tiny_model("qwen2")
    engine = Engine(model, tiny_tokenizer(), policy="off", max_context=64, compute=compute)
    model.get_decoder().layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="logits that are NaN"):
        engine.generate([Request("1", (5, 6), SamplingParams(max_gen_toks=5))])


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"stop_strings": "abc"}, "a list of strings"),
        ({"stop_strings": (5,)}, "a list of strings"),
        ({"stop_ids": ("a",)}, "a list of token ids"),
        ({"top_k": 2.5}, "a whole number"),
        ({"max_gen_toks": True}, "a whole number"),
        ({"max_gen_toks": "5"}, "a whole number"),
        ({"temperature": "0.5"}, "a number"),
    ],
)
def test_sampling_parameters_of_other_kinds_are_refused(given, kind):
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.* is not allowed; it has to be {kind}"):
        SamplingParams(**given)


@pytest.mark.parametrize(("prompt", "told"), [(None, "None is no text"), (5, "5 is no text"), ("a\ud800", "at 1")])
def test_a_prompt_that_is_no_text_is_refused(prompt, told):
    with pytest.raises(ValueError, match=told):
        Engine.from_pretrained("tiny-hcot").encode(prompt)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"device='cuda:9' is not in this machine, which has cpu"):
        Engine.from_pretrained("tiny-hcot", device="cuda:9")
