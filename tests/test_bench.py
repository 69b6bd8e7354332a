"""The benchmark: the work is the same for all engines and is checked, and the figures are what they are said to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import check, floor, prune_events
from bench.check import WrongLogitsError, check_engines, largest, live_logits
from bench.engines import ENGINES, Contender, Setting, UnavailableError, gguf_file, hf, prepare
from bench.engines.hf import Generate
from bench.engines.llama import whole
from bench.floor import FloorTime
from bench.measure import Measurement, WrongTokensError, checked_run, figures, measure
from bench.models import SHAPES, make_model
from bench.tables import engine_table
from bench.timing import Timing
from bench.work import (
    CLOSE,
    LONG_LIVE,
    LONG_SCRIPT,
    MARKERS,
    OPEN,
    SPLIT,
    Sampling,
    Script,
    Work,
    fitted,
    make_work,
)

from hcot_lmeval.trace import LiveContext, live_ids
from tests.tiny import tiny_model

SCRIPT = Script(tokens=40, prompt=7, thought=9, solution=3, text=2)
VOCABULARY = SHAPES["tiny"]["vocab_size"]


def quiet(doing: str) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def model():
    return make_model("tiny")


def setting(model, batch: int = 2, *, stagger: bool = False, **fields) -> Setting:
    return Setting(model, make_work(batch, replace(SCRIPT, stagger=stagger), VOCABULARY), **fields)


def ready(name: str, given: Setting):
    try:
        return prepare(name, given)
    except UnavailableError as error:
        pytest.skip(str(error))


# --- the work ---------------------------------------------------------------------------------------------------------


def test_blocks_lie_where_the_script_says():
    trace = make_work(1, SCRIPT, VOCABULARY).traces[0]
    marks = [(i, token) for i, token in enumerate(trace) if token in MARKERS.ids]
    first = [(0, OPEN), (10, SPLIT), (14, CLOSE)]
    assert marks[:6] == first + [(i + SCRIPT.block, token) for i, token in first]
    assert SCRIPT.block == 17 and len(trace) == 40


def test_work_depends_on_its_arguments_alone_and_prompts_begin_differently():
    work = make_work(5, SCRIPT, VOCABULARY)
    assert work == make_work(5, SCRIPT, VOCABULARY)
    assert work.aligned and len({prompt[0] for prompt in work.prompts}) == 5
    assert {len(prompt) for prompt in work.prompts} == {7}


def test_staggered_rows_end_their_blocks_in_different_steps():
    work = make_work(4, replace(SCRIPT, stagger=True), VOCABULARY)
    assert not work.aligned and {len(trace) for trace in work.traces} == {40}
    first = [min(prunes) for prunes in work.prunes]
    assert first == [14 + row * SCRIPT.block // 4 for row in range(4)]


@pytest.mark.parametrize("policy", ["off", "recompute", "evict"])
def test_live_tokens_are_those_of_the_rule(policy):
    work = make_work(3, replace(SCRIPT, stagger=True), VOCABULARY)
    peaks, total = [], 0
    for prompt, trace in zip(work.prompts, work.traces, strict=True):
        context = LiveContext(MARKERS, policy)
        for token in prompt:
            context.push_inert(token)
        for token in trace:
            before = len(context.live)
            step = context.push(token)
            total += before + 1 if policy == "evict" else len(context.live)
            assert step.rewind + len(step.forward) == (before + 1 if policy == "evict" else len(context.live))
        peaks.append(context.peak)
    assert work.peak_live(policy) == max(peaks)
    assert work.mean_live(policy) == pytest.approx(total / work.tokens)
    assert (work.peak_live("off") == 47) and (work.peak_live("recompute") < 47)


def test_long_script_stays_within_its_live_tokens():
    assert make_work(1, LONG_SCRIPT, VOCABULARY).peak_live("recompute") <= LONG_LIVE < LONG_SCRIPT.tokens // 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda name=name: Script(**{name: 0}), f"{name}=0 is not allowed")
            for name in ("tokens", "prompt", "thought")
        ),
        *((lambda n=n: make_work(n, SCRIPT, VOCABULARY), f"batch={n} ") for n in (0, VOCABULARY)),
        (lambda: Sampling(temperature=-1.0), "temperature"),
        (lambda: Sampling(temperature=1.0, top_p=0.0), "temperature"),
        (lambda: Sampling(top_p=0.9), "temperature"),
        (lambda: Sampling(top_k=5), "temperature"),
    ],
)
def test_work_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_does_the_same_work(model, name, stagger):
    """Twice, since an engine that keeps something from its first run would be faster in the second."""
    given = setting(model, 3, stagger=stagger)
    contender = ready(name, given)
    for _ in range(2):
        timing = checked_run(Measurement(name), contender)
        assert timing.tokens == given.work.traces or not contender.forced
        assert timing.seconds >= sum(step.seconds for step in timing.steps)
    contender.close()
    if stagger or not timing.steps:
        return
    assert len(timing.steps) == given.work.tokens - 1
    prunes = {i: 3 for i in given.work.prunes[0]} if contender.policy != "off" else {}
    assert {i: step.prunes for i, step in enumerate(timing.steps) if step.prunes} == prunes
    assert [i for i, step in enumerate(timing.steps) if not step.ordinary] == sorted(prunes)


SAMPLED = Sampling(temperature=0.6, top_p=0.95, top_k=20)


@pytest.mark.parametrize("name", [n for n in ENGINES if n not in ("vllm", "continuous")])
def test_engines_that_sample_still_write_the_script(model, name, monkeypatch):
    asked, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *given, **more: asked.append(more) or generate(*given, **more))
    given = setting(model, 2, sampling=SAMPLED)
    contender = ready(name, given)
    assert checked_run(Measurement(name), contender).tokens == given.work.traces
    contender.close()
    for more in asked:
        assert more["do_sample"] and (more["temperature"], more["top_p"], more["top_k"]) == (0.6, 0.95, 20)


def test_our_engine_and_llama_cpp_sample_as_they_are_told(model):
    given = setting(model, 2, sampling=SAMPLED)
    (params,) = {request.params for request in ready("recompute", given).requests}
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    llama = ready("llama.cpp", given)
    assert llama.sampler is not None and ready("llama.cpp", setting(model, 2)).sampler is None
    logits = llama.decode([whole(prompt) for prompt in given.work.prompts])
    best = {int(token) for token in logits.argpartition(-20)[:, -20:].ravel()}
    chosen = [tuple(llama.choose(logits)) for _ in range(30)]
    assert len(set(chosen)) > 1 and {token for pair in chosen for token in pair} <= best
    llama.close()


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("vlllm", {}, ValueError, r"no engine 'vlllm'; known are generate, off, .*vllm"),
        ("recompute", {"options": {"speed": 1}}, ValueError, "unknown engine option speed"),
        ("continuous", {"sampling": SAMPLED}, UnavailableError, "decodes greedily"),
    ],
)
def test_what_cannot_be_prepared_says_why(model, name, fields, error, message):
    with pytest.raises(error, match=message):
        prepare(name, setting(model, **fields))


def test_our_slots_hold_exactly_the_peak(model):
    """With one token less a row ends early: the peak that is reported is the one that is needed."""
    given = setting(model)
    short = replace(given, options={"max_context": given.work.peak_live("recompute") - 1})
    with pytest.raises(WrongTokensError, match="tokens of the script"):
        checked_run(Measurement("recompute"), prepare("recompute", short))


@pytest.mark.parametrize("policy", ["off", "recompute"])
def test_steps_on_the_device_are_not_watched(model, policy):
    """Watched, they would run on the host; so the whole is timed, and the prompts once more."""
    given = setting(model, options={"loop": "device"})
    timing = checked_run(Measurement(policy), prepare(policy, given))
    assert timing.steps == () and timing.prune is None
    assert timing.step is not None and timing.step * (given.work.tokens - 1) < timing.seconds
    (made,) = figures([Measurement(policy, [timing])], [FloorTime({"linear": 1.0}, 0.0, 1.0)], given.work)
    assert made.mean
    with pytest.raises(UnavailableError, match="shows no logits"):
        prepare(policy, replace(given, on_logits=lambda row, generated, logits: None))


class Liar(Contender):
    """An engine that does not do its work."""

    def __init__(self, setting: Setting, timing: Timing) -> None:
        super().__init__(setting)
        self.timing = timing

    def run(self) -> Timing:
        return self.timing


@pytest.mark.parametrize(
    ("forced", "change", "message"),
    [
        (True, {"tokens": ((1,) * 40, (1,) * 40)}, "tokens of the script"),
        (True, {"tokens": ()}, "tokens of the script"),
        (True, {"peak_live": 46}, "held 46 tokens of a row at most; under policy off it is 47"),
        (False, {"tokens": ((1,) * 40, (1,) * 39)}, "40 tokens in each of 2 rows"),
    ],
)
def test_other_work_is_an_error(model, forced, change, message):
    given = setting(model)
    honest = Timing(1.0, given.work.traces, 47)
    checked_run(Measurement("liar"), Liar(given, honest))
    liar = Liar(given, replace(honest, **change))
    liar.forced = forced
    with pytest.raises(WrongTokensError, match=message):
        checked_run(Measurement("liar"), liar)


@pytest.mark.parametrize("stagger", [False, True])
def test_resubmission_sends_the_live_contexts_of_the_rule(model, monkeypatch, stagger):
    given, sent = setting(model, 3, stagger=stagger), []
    decode = hf.decode

    def spy(model, ids, mask, forced, **limits):
        sent.append([row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)])
        return decode(model, ids, mask, forced, **limits)

    monkeypatch.setattr(hf, "decode", spy)
    checked_run(Measurement("resubmit"), prepare("resubmit", given))
    work, done = given.work, [0] * 3
    for contexts in sent:
        rows = [row for row in range(3) if done[row] < work.tokens]
        expected = [live_ids((*work.prompts[r], *work.traces[r][: done[r]]), work.prompt, MARKERS) for r in rows]
        assert contexts == expected
        for row in rows:
            rest = work.traces[row][done[row] :]
            done[row] += rest.index(CLOSE) + 1 if CLOSE in rest else len(rest)
    assert done == [work.tokens] * 3
    assert len(sent) == max(map(len, work.prunes)) + 1 > 2


# --- logits -----------------------------------------------------------------------------------------------------------


def row_logits(model, policy: str, work: Work, row: int) -> torch.Tensor:
    return live_logits(model, work.context(row, policy), work.traces[row])


@pytest.mark.parametrize("policy", ["off", "recompute"])
def test_live_logits_are_those_of_a_forward_at_every_token(policy):
    model = tiny_model("qwen2", torch.float64)
    work = make_work(2, replace(SCRIPT, stagger=True), 320)
    for row, (prompt, trace) in enumerate(zip(work.prompts, work.traces, strict=True)):
        found = row_logits(model, policy, work, row)
        assert len(found) == work.tokens
        for n, given in enumerate(found):
            ids = live_ids((*prompt, *trace[:n]), work.prompt, MARKERS, policy)
            with torch.inference_mode():
                torch.testing.assert_close(given, model(torch.tensor([ids])).logits[0, -1], rtol=0, atol=1e-9)


def test_logits_are_compared_at_every_token_of_every_row():
    model, work = tiny_model("qwen2"), make_work(1, SCRIPT, 320)
    off, recompute = ([row_logits(model, policy, work, 0)] for policy in ("off", "recompute"))
    seen = {(0, n): logits for n, logits in enumerate(recompute[0])}
    assert largest(seen, recompute) == 0
    assert largest(seen, off) > 0.1  # nothing but the prunes tells the two apart
    assert largest({**seen, (0, 3): seen[0, 3] * float("nan")}, recompute) == float("inf")
    del seen[0, 3]
    assert largest(seen, recompute) == float("inf")


def test_engines_compute_what_the_model_does(model, monkeypatch):
    found = check_engines(setting(model), list(ENGINES), quiet)
    assert found["evict"] == "no plain forward equals it"
    ours = [found[name] for name in ("generate", "off", "recompute", "recompute+grammar", "resubmit")]
    assert 0 < max(ours) < 1e-4
    monkeypatch.setitem(check.ALLOWED, "float32", 1e-12)
    with pytest.raises(WrongLogitsError, match="recompute: a logit differs"):
        check_engines(setting(model), ["recompute"], quiet)


# --- the file for llama.cpp -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_survive_the_file(tmp_path, dtype, tied):
    gguf = pytest.importorskip("gguf")
    model = tiny_model("qwen2", dtype, tie_word_embeddings=tied)
    gguf_file.write_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    weights = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight" or not tied}
    assert set(written) == {gguf_file.gguf_name(name) for name in weights}
    for name, weight in weights.items():
        tensor = written[gguf_file.gguf_name(name)]
        kept = torch.float32 if weight.dim() == 1 else dtype
        assert tensor.tensor_type.name == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[kept]
        bits = torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8).flatten()
        assert torch.equal(bits.view(kept).view(weight.shape), weight.to(kept))


def test_sizes_survive_the_file_and_other_models_have_none(tmp_path):
    gguf = pytest.importorskip("gguf")
    gguf_file.write_gguf(tiny_model("qwen2"), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    sizes = {"embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "vocab_size": 320}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    assert {name: fields[f"qwen2.{name}"].contents() for name in sizes} == sizes
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    with pytest.raises(ValueError, match="model_type='llama' cannot be written"):
        gguf_file.write_gguf(tiny_model("llama"), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_norm\.weight' has no place"):
        gguf_file.gguf_name("model.layers.0.self_attn.q_norm.weight")


# --- taking turns -----------------------------------------------------------------------------------------------------


def test_an_engine_whose_work_does_not_fit_has_a_reason(model, monkeypatch):
    """At once, or in the middle: then its earlier runs do not count."""
    monkeypatch.setattr(floor, "STEPS", 1)
    plain, runs = Generate.run, []

    def run(self):
        runs.append(self)
        if len(runs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return plain(self)

    monkeypatch.setattr(Generate, "run", run)
    given = setting(model)
    found, floors = measure(given, ["generate", "off"], 3, quiet)
    assert found[0].reason == "out of memory: CUDA out of memory." and len(runs) == 3
    made = figures(found, floors, given.work)
    assert made[0].tokens_per_second is None and made[1].tokens_per_second and made[1].times_base is None
    assert "generate: not run: out of memory" in engine_table(made, floors, given.work)


@pytest.mark.parametrize("live", [110, 150, 200])
def test_thoughts_are_as_long_as_the_live_context_allows(live):
    script = replace(SCRIPT, tokens=300)
    thought = fitted(script, live).thought
    longer = (replace(script, thought=n) for n in (thought, thought + 1))
    peaks = [make_work(1, one, VOCABULARY).peak_live("recompute") for one in longer]
    assert peaks[0] <= live < peaks[1]


def test_engines_take_turns_and_the_warm_up_does_not_count(model, monkeypatch):
    monkeypatch.setattr(floor, "STEPS", 1)
    done: list[str] = []
    found, floors = measure(setting(model), ["recompute", "vllm", "off"], 2, done.append)
    assert [len(m.timings) for m in found] == [2, 0, 2] and len(floors) == 2
    assert "needs" in found[1].reason or "not installed" in found[1].reason
    order = ["floor", "recompute", "vllm", "off"]
    assert [text.split(":")[0] for text in done] == ["recompute", "vllm", "off", *order, *order]


# --- prune events -----------------------------------------------------------------------------------------------------


def test_an_event_and_its_prefill_forward_as_many_tokens_at_one_place(model, monkeypatch):
    forward, chunks = prune_events.Engine(model, markers=MARKERS).decoder.__class__.forward, []

    def spy(self, pool, planned):
        chunks.extend((chunk.start, len(chunk.ids)) for chunk in planned)
        return forward(self, pool, planned)

    monkeypatch.setattr("hcot_lmeval.engine.decoder.Decoder.forward", spy)
    (found,) = prune_events.time_events(model, [prune_events.Place(5, 20, 30)], 2, quiet)
    prompt, decoded = (0, 20 + 30 + 2 + 2), [(54, 1), (55, 1), (56, 1)]  # three words of the solution are decoded
    event, after = (21, 6), (27, 1)
    prefill = [*[(21, 1)] * 3, (21, 6)]
    assert chunks == [prompt, *decoded, event, after, *prefill] * 3
    assert len(found.events) == len(found.prefills) == 2 and found.ratio > 0
