"""The engine against the slow twin, at every step: batch 1 and ragged batches, memory full of NaN, slots used again.

By default a sample that takes about a minute; ``HCOT_LMEVAL_FULL=1`` runs more than a thousand traces in every policy.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.grammar import Grammar, label_tokens
from hcot_lmeval.trace import LiveContext, compile_trace, push_all
from tests.full import FULL
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import EOS, MARKERS, POLICIES, as_reference, pruned, reference_logits, rewrite
from tests.tiny import KINDS, favour, in_full_precision, tiny_model

FORCED = 60 if FULL else 10
"""Forced traces for each model kind, notation and policy."""
SAMPLED = 48 if FULL else 8
ALONE = FORCED if FULL else 2
"""How many of them run at batch 1 too."""
FP64, FP32 = 1e-9, 1e-4

Logits = dict[tuple[str, int], torch.Tensor]


def make_model(kind: str, dtype: torch.dtype = torch.float64):
    # windows so short that most traces outgrow them
    window = {"sliding_window": 16} if kind in ("mistral", "gemma2", "phi3") else {}
    model = tiny_model(kind, dtype, vocab_size=VOCAB_SIZE, **window)
    return favour(model, sorted(MARKERS["hcot"].ids), 1.5)


PATHS = [(kind, "torch") for kind in KINDS] + [(kind, "native") for kind in ("qwen2", "qwen3", "llama")]
"""Every model kind by its own modules, and those of the Llama kind by compiled steps too."""


@pytest.fixture(scope="module", params=PATHS, ids="-".join)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def kind(path):
    return path[0]


@pytest.fixture(scope="module")
def compute(path):
    return path[1]


@pytest.fixture(scope="module")
def models(kind, compute):
    """The model that the engine drives and its twin, which share weights and nothing else."""
    model, twin = make_model(kind), as_reference(make_model(kind))
    return model, in_full_precision(twin) if compute == "native" else twin


def make_engine(model, notation: str, policy: str, **options) -> Engine:
    settings = {"slots": 8, "eos_ids": (EOS,), "poison": True, "self_check": False, "compute": "torch", **options}
    return Engine(model, markup=notation, markers=MARKERS[notation], policy=policy, **settings)


def run(engine: Engine, requests: Sequence[Request]) -> tuple[dict[tuple[str, int], Completion], Logits]:
    """Generates and returns the completions and all logits [generated, V], by (request id, sample)."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def watch(request: Request, sample: int, count: int, logits: torch.Tensor) -> None:
        rows = seen.setdefault((request.id, sample), [])
        assert count == len(rows), "one call for each token"
        rows.append(logits.clone())

    done = {(c.request.id, c.sample): c for c in engine.stream(requests, on_logits=watch)}
    return done, {key: torch.stack(rows) for key, rows in seen.items()}


def forced(name: str, ids: Sequence[int], prompt_len: int, **params) -> Request:
    """A request that generates the given trace and ends there."""
    generated = tuple(ids[prompt_len:])
    settings = SamplingParams(max_gen_toks=len(generated), **params)
    return Request(name, tuple(ids[:prompt_len]), settings, forced_ids=generated)


def random_requests(notation: str, count: int, first: int = 0) -> list[Request]:
    """Forced traces of 8 to 40 generated tokens; neighbouring seeds have different shapes."""
    markers = MARKERS[notation]
    traces = [random_trace(seed, markers, random.Random(seed).randint(8, 40)) for seed in range(first, first + count)]
    return [forced(str(i), *trace) for i, trace in enumerate(traces)]


def difference(model, completion: Completion, logits: torch.Tensor, notation: str, policy: str, **acts) -> float:
    """Returns the largest difference to the slow twin's logits, NaN if there is a NaN."""
    prompt = completion.request.prompt_ids
    ids = [*prompt, *completion.token_ids]
    expected = reference_logits(model, ids, len(prompt), MARKERS[notation], policy, **acts)[: len(logits)]
    assert logits.shape == expected.shape
    assert (len(logits) == len(completion.token_ids)) or completion.finish_reason == "context"
    return (logits - expected).abs().max().item()


def check_all(model, done, logits, notation: str, policy: str, tolerance: float = FP64, **acts) -> float:
    worst = 0.0
    for key, completion in done.items():
        gap = difference(model, completion, logits[key], notation, policy, **acts)
        assert gap <= tolerance, f"request {key}: logits differ by {gap:.2e}"  # a NaN fails, too
        ids = [*completion.request.prompt_ids, *completion.token_ids]
        inert = 0 if acts.get("prompt_acts") else len(completion.request.prompt_ids)
        assert list(completion.live_ids) == pruned(ids, inert, MARKERS[notation], policy)
        worst = max(worst, gap)
    return worst


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_forced_traces(models, kind, compute, notation, policy, record_property):
    model, twin = models
    requests = random_requests(notation, FORCED)
    done, logits = run(make_engine(model, notation, policy, compute=compute), requests)
    assert len(done) == FORCED
    for request in requests:
        assert done[request.id, 0].token_ids == request.forced_ids
        assert done[request.id, 0].finish_reason == ("length" if EOS not in request.forced_ids else "eos")
    worst = check_all(twin, done, logits, notation, policy)
    assert policy == "off" or sum(c.statistics.prune_events for c in done.values()) >= FORCED
    alone = make_engine(model, notation, policy, slots=1, compute=compute)
    worst = max(worst, check_all(twin, *run(alone, requests[:ALONE]), notation, policy))
    record_property("max_logit_difference", worst)
    print(f"{kind} {compute} {notation} {policy}: {worst:.1e}")


@pytest.mark.parametrize("policy", POLICIES)
def test_sampled_traces(models, kind, compute, policy, record_property):
    """What the model writes itself, greedy and with noise: the same tokens at batch 1, 3, 8 and in any order."""
    model, twin = models
    notation = ("hcot", "pencil", "memento")[KINDS.index(kind) % 3]
    requests = sampled_requests(notation, SAMPLED)
    done, logits = run(make_engine(model, notation, policy, compute=compute), requests)
    worst = check_all(twin, done, logits, notation, policy)
    print(f"{kind} {compute} {notation} {policy} sampled: {worst:.1e}")
    record_property("max_logit_difference", worst)
    if policy != "off":
        assert sum(c.statistics.prune_events for c in done.values()) >= SAMPLED // 4
    tokens = {key: completion.token_ids for key, completion in done.items()}
    shuffled = random.Random(1).sample(requests, len(requests))
    for slots, order in ((1, requests), (3, requests), (3, shuffled), (8, shuffled)):
        again, _ = run(make_engine(model, notation, policy, slots=slots, step_tokens=7, compute=compute), order)
        assert {key: completion.token_ids for key, completion in again.items()} == tokens, f"slots={slots}"


def sampled_requests(notation: str, count: int) -> list[Request]:
    """Half of them greedy, half with noise; the first tokens open a block, so that there is something to prune."""
    noisy = ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 20, "min_p": 0.02})
    requests = []
    for i in range(count):
        ids, prompt_len = random_trace(100 + i, MARKERS[notation], length=6 + i % 9, shape="nested")
        extra = noisy[i // 2 % 3] if i % 2 else {"repetition_penalty": 1.2 if i % 4 else 1.0}
        params = SamplingParams(max_gen_toks=18 + 3 * (i % 7), seed=i, **extra)
        requests.append(Request(str(i), tuple(ids[:prompt_len]), params, forced_ids=tuple(ids[prompt_len:])))
    return requests


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS if FULL else ["hcot"])
def test_in_single_precision(kind, compute, notation, policy, record_property):
    model, twin = make_model(kind, torch.float32), as_reference(make_model(kind, torch.float32))
    worst = 0.0
    for slots in (8, 1) if FULL else (8,):
        engine = make_engine(model, notation, policy, slots=slots, compute=compute)
        done, logits = run(engine, random_requests(notation, FORCED, first=500))
        worst = max(worst, check_all(twin, done, logits, notation, policy, FP32))
    record_property("max_logit_difference", worst)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)], ids=["fp32", "bf16"])
def test_coarser_types_differ_at_near_ties_alone(kind, compute, dtype, rounding):
    """Batch 1 and 8 agree up to rounding for as long as their tokens do; they part only at near-ties."""
    model = make_model(kind, dtype)
    requests = sampled_requests("hcot", 8)
    greedy = [replace(r, params=replace(r.params, temperature=0.0, repetition_penalty=1.0)) for r in requests]
    (one, logits_one), (many, logits_many) = (
        run(make_engine(model, "hcot", "recompute", slots=slots, compute=compute), greedy) for slots in (1, 8)
    )
    for key in one:
        pairs = list(zip(one[key].token_ids, many[key].token_ids, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        for a, b in zip(logits_one[key][: same + 1], logits_many[key], strict=False):
            assert (a - b).abs().max() <= rounding * a.abs().max()
        if same < len(pairs):
            best, other = logits_one[key][same][list(pairs[same])]
            assert best - other <= 2 * rounding * logits_one[key][same].abs().max()


@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_that_share_a_beginning(policy):
    """Copied prompts (equal ones, prefixes, n samples) leave no trace in the logits, in slots used before too."""
    model, twin = make_model("qwen2"), as_reference(make_model("qwen2"))
    rng = random.Random(3)
    stem = tuple(rng.randrange(8, VOCAB_SIZE) for _ in range(12))
    requests = []
    for i, prompt in enumerate([stem, stem, stem[:5], (*stem, 9, 10), (*stem[:7], 9), stem, stem[:1], (*stem, 9)]):
        ids, start = random_trace(i, MARKERS["pencil"], length=20, shape="nested")
        params = SamplingParams(max_gen_toks=24, temperature=1.0, seed=i, n=1 + i % 3)
        requests.append(Request(str(i), prompt, params, forced_ids=tuple(ids[start:])))
    for slots in (1, 3, 8):
        engine = make_engine(model, "pencil", policy, slots=slots, step_tokens=5)
        done, logits = run(engine, requests)
        assert len(done) == sum(request.params.n for request in requests)
        check_all(twin, done, logits, "pencil", policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_prompts_that_act(notation, policy):
    model, twin = make_model("llama"), as_reference(make_model("llama"))
    requests = []
    for seed in range(10):
        ids, _ = random_trace(seed, MARKERS[notation], length=30)
        requests.append(forced(str(seed), [9, *ids], 1 + len(ids) // 2))
    engine = make_engine(model, notation, policy, prompt_acts=True, step_tokens=6)
    check_all(twin, *run(engine, requests), notation, policy, prompt_acts=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_a_full_context_ends_the_row(notation, policy):
    """Rows end just before the token that does not fit, in slots that have not one place to spare."""
    model, twin = make_model("qwen3"), as_reference(make_model("qwen3"))
    requests, limit = random_requests(notation, 30, first=40), 24
    done, logits = run(make_engine(model, notation, policy, max_context=limit), requests)
    for request in requests:
        completion = done[request.id, 0]
        fits = generated_that_fit(request, notation, policy, limit)
        assert completion.token_ids == request.forced_ids[:fits]
        assert completion.finish_reason == ("length" if fits == len(request.forced_ids) else "context")
        assert completion.statistics.peak_live_tokens <= limit
    assert {c.finish_reason for c in done.values()} == {"length", "context"}
    check_all(twin, done, logits, notation, policy)


def generated_that_fit(request: Request, notation: str, policy: str, limit: int) -> int:
    """How many generated tokens a context of `limit` takes, by the rewriting rule alone."""
    ids, start = [*request.prompt_ids, *request.forced_ids], len(request.prompt_ids)
    for stop in range(start + 1, len(ids) + 1):
        before = len(pruned(ids[: stop - 1], start, MARKERS[notation], policy))
        after = len(pruned(ids[:stop], start, MARKERS[notation], policy))
        # only recompute never holds the closing marker together with what it prunes
        closes = rewrite(ids[:stop], start, MARKERS[notation]).blocks[-1:]
        prunes = policy == "recompute" and closes and closes[0].close == stop - 1 and closes[0].removed
        if (max(before, after) if prunes else before + 1) > limit:
            return stop - 1 - start
    return len(ids) - start


def test_an_engine_that_never_prunes_is_noticed(monkeypatch):
    """The comparison has teeth: lose the push on the opening marker, and logits and live context are wrong."""
    model, twin = make_model("qwen2"), as_reference(make_model("qwen2"))
    monkeypatch.setattr(LiveContext, "_open", lambda self, token: self._append(token, "open"))
    for policy in ("recompute", "evict"):
        done, logits = run(make_engine(model, "hcot", policy), random_requests("hcot", 8))
        gaps = [difference(twin, done[key], logits[key], "hcot", policy) for key in done]
        assert max(gaps) > 0.1
        with pytest.raises(AssertionError):
            check_all(twin, done, logits, "hcot", policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_statistics_follow_the_rule(notation, policy):
    markers = MARKERS[notation]
    requests = random_requests(notation, 16, first=80)
    done, _ = run(make_engine(make_model("qwen2"), notation, policy), requests)
    for request in requests:
        ids, start = [*request.prompt_ids, *request.forced_ids], len(request.prompt_ids)
        twin, found = rewrite(ids, start, markers), done[request.id, 0].statistics
        prunes = [] if policy == "off" else [b for b in twin.blocks if b.removed]
        source = compile_trace(ids, start, markers, policy).source
        live = [len(pruned(ids[:stop], start, markers, policy)) for stop in range(start + 1, len(ids) + 1)]
        context = LiveContext(markers, policy)
        for token in request.prompt_ids:
            context.push_inert(token)
        depths = [step.depth for step in push_all(context, request.forced_ids)]
        labels = label_tokens(ids, start, Grammar(markers, (None, None), frozenset({EOS})))
        illegal = sum(not label.legal for label in labels)
        assert found.prompt_tokens + found.generated_tokens - found.pruned_tokens == found.live_tokens == live[-1]
        assert found.as_dict() == {
            "prompt_tokens": start,
            "generated_tokens": len(ids) - start,
            "pruned_tokens": sum(len(b.removed) for b in prunes),
            "reforwarded_tokens": len(source) - len(set(source)),
            "live_tokens": live[-1],
            "peak_live_tokens": context.peak,
            "live_token_steps": sum(live),
            "prune_events": len(prunes),
            "blocks": len(twin.blocks) + twin.faults["unsplit_close"],
            "max_depth": max(depths),
            "malformed": dict(twin.faults),
            "illegal_tokens": illegal,
            "forced": {},
            "loops": 0,
            "finish_reason": "length",
            "wall_seconds": found.wall_seconds,
            "tokens_per_second": found.tokens_per_second,
        }
        assert found.tokens_per_second == pytest.approx(found.generated_tokens / found.wall_seconds)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notation", MARKERS)
def test_a_close_that_frees_nothing_has_to_fit(notation, policy):
    """An empty block in a context with no place to spare: the close fits only where a prune makes room for it."""
    model, markers = make_model("qwen2"), MARKERS[notation]
    ids = [9, 10, 11, markers.open, markers.split, markers.close, 12]
    request = forced("empty", ids, 3)
    done, _ = run(make_engine(model, notation, policy, max_context=5), [request])
    fits = generated_that_fit(request, notation, policy, 5)
    assert fits == {"hcot": 3, "pencil": 4, "memento": 2}[notation] or policy != "recompute"
    completion = done["empty", 0]
    assert completion.token_ids == request.forced_ids[:fits]
    assert completion.finish_reason == ("length" if fits == 4 else "context")
