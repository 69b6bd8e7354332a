"""What a GPU has to show before its figures are believed; ``scripts/check_gpu.py`` prints it.

`probe_all` holds every attention backend against the textbook, on the shapes and dtypes that models have.

`compare_all` holds the tokens of the device's loop against the slow twin, full recomputation with the model's own
forward. Models are random and small, their vocabulary is so short that they write markers all the time, in no good
order. A row begins with a block in a block that it is forced to write; every other token is sampled. The twin is given
what the row has written and chooses each of these tokens once more, from logits of its own: plain forwards of the live
context under ``off`` and ``recompute``, one forward of the whole trace under its mask for ``evict``. Its noise is made
on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hcot_lmeval.engine import Completion, Engine, Request, SamplingParams
from hcot_lmeval.engine.device.choice import COARSE_TOLERANCE, MAKERS, TOLERANCE, errors
from hcot_lmeval.engine.device.state import on
from hcot_lmeval.engine.sampling import gumbel
from hcot_lmeval.engine.slots import LayerSpec
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.masks import attention_masks
from hcot_lmeval.trace import LiveContext, Policy, compile_trace

VOCABULARY, EOS, FIRST_WORD = 16, 0, 4
MARKERS = MarkerIds(1, 2, 3)
MOST = 240
"""Most tokens of a trace, prompt included; also the largest position."""
FORCED = (1, 5, 6, 1, 7, 8, 2, 9, 3, 10, 2, 11, 12, 3)
"""A block in a block, which every row writes first."""
KINDS = ("qwen2", "qwen3", "llama")


# --- attention backends -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """One backend on one kind of layer.

    Attributes:
        backend: its name.
        layer: what kind of layer.
        errors: largest errors of single queries and of chunks, relative to the largest entry; empty if it did not run.
        reason: why it did not run.
        passed: whether all errors are allowed; what did not run fails only if it raised an error.
    """

    backend: str
    layer: str
    errors: tuple[float, ...] = ()
    reason: str = ""
    passed: bool = True


def layers(device: torch.device) -> dict[str, LayerSpec]:
    """Returns kinds of layers: grouped heads, windows, soft caps, sinks, in several dtypes."""
    plain = LayerSpec(12, 2, 128, 128, torch.bfloat16, device)
    single = plain._replace(dtype=torch.float32)
    return {
        "12/2 heads of 128, bfloat16": plain,
        "12/2 heads of 128, float16": plain._replace(dtype=torch.float16),
        "12/2 heads of 128, float32": single,
        "32/8 heads of 64, bfloat16": LayerSpec(32, 8, 64, 64, torch.bfloat16, device),
        "window of 70, bfloat16": plain._replace(window=70),
        "window of 70, float32": single._replace(window=70),
        "soft cap, window, 256, bfloat16": LayerSpec(8, 4, 256, 256, torch.bfloat16, device, window=70, softcap=50.0),
        "sinks, bfloat16": LayerSpec(64, 8, 64, 64, torch.bfloat16, device, window=128, sinks=True),
        "slots in float8, bfloat16": plain._replace(stored=torch.float8_e4m3fn),
    }


def probe_all(device: torch.device) -> Iterator[Probe]:
    """Yields what every backend makes of every kind of layer."""
    with on(device):
        for name in MAKERS:
            for layer, need in layers(device).items():
                yield probe(name, layer, need)


def probe(name: str, layer: str, need: LayerSpec) -> Probe:
    """Returns what one backend makes of one kind of layer."""
    try:
        backend = MAKERS[name]()
    except Exception as error:  # a package that is missing, or one that is broken
        return Probe(name, layer, reason=_first_line(error))
    reason = backend.refuses(need)
    if reason:
        return Probe(name, layer, reason=reason)
    try:
        with torch.inference_mode():
            found = tuple(error for _, error in errors(backend, need))
    except Exception as error:  # whatever a kernel that does not compile or run here raises
        return Probe(name, layer, reason=f"{type(error).__name__}: {_first_line(error)}", passed=False)
    allowed = TOLERANCE.get(need.dtype, COARSE_TOLERANCE)
    return Probe(name, layer, found, passed=all(error <= allowed for error in found))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass
class Identity:
    """One model under one policy.

    Attributes:
        kind: of the model.
        policy: what a return does.
        way: options of the engine.
        tokens: that were compared.
        prunes: among them.
        mismatches: tokens that the twin would not have chosen.
    """

    kind: str
    policy: str
    way: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    prunes: int = 0
    mismatches: int = 0

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing differs; prunes too unless there are none."""
        return self.tokens > 0 and self.mismatches == 0 and (self.prunes > 0) == (self.policy != Policy.OFF)


def ways(device: torch.device, *, compiled: bool = False) -> list[dict[str, Any]]:
    """Returns the ways to run that are compared, compiled steps among them if asked for."""
    backends = ("triton", "sdpa") if device.type == "cuda" else ("sdpa",)
    found: list[dict[str, Any]] = [{"attention": name, "reforward": "replay"} for name in backends]
    found.append({"attention": "auto", "reforward": "chunk", "run_ahead": 2})
    if device.type == "cuda":
        found.append({"attention": "auto", "graphs": False})
    if compiled:
        found.append({"attention": "auto", "compiled": True})
    return found


def compare_all(
    device: torch.device, kinds: Sequence[str], *, rows: int, tokens: int, compiled: bool = False
) -> Iterator[Identity]:
    """Yields the result for every kind of model, policy and way."""
    for kind in kinds:
        model = small_model(kind).to(device)
        for policy in Policy:
            for way in ways(device, compiled=compiled):
                yield compare(model, Identity(kind, policy.value, way), rows=rows, tokens=tokens)


def compare(model: Any, found: Identity, *, rows: int, tokens: int) -> Identity:
    """Generates with the device's loop, compares with the twin, and returns `found` filled in."""
    options = {"markers": MARKERS, "eos_ids": (EOS,), "poison": True, "slots": max(1, rows // 2), **found.way}
    engine = Engine(model, policy=found.policy, loop="device", compute="torch", **options)
    for done in engine.generate(_requests(rows, tokens)):
        free = slice(len(FORCED), None)
        expected, written = twin_tokens(model, done, found.policy)[free], done.token_ids[free]
        found.tokens += len(expected)
        found.prunes += done.statistics.prune_events
        found.mismatches += sum(a != b for a, b in zip(expected, written, strict=True))
    return found


def small_model(kind: str) -> Any:
    """Returns a random model in float32, the same one at each call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=MOST,
        initializer_range=0.1,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _requests(rows: int, tokens: int) -> list[Request]:
    """Prompts of different lengths, all sampled."""
    return [
        Request(
            str(row),
            tuple(FIRST_WORD + (row * 7 + i) % (VOCABULARY - FIRST_WORD) for i in range(1 + row % 9)),
            SamplingParams(max_gen_toks=tokens, min_gen_toks=tokens // 2, temperature=1.0, seed=row),
            forced_ids=FORCED,
        )
        for row in range(rows)
    ]


def twin_tokens(model: Any, done: Completion, policy: str) -> list[int]:
    """Returns the token that the twin chooses at each place of what a row has written."""
    params, count = done.request.params, len(done.token_ids)
    if policy == Policy.EVICT:
        logits = _masked_logits(model, done)
    else:
        context = LiveContext(MARKERS, policy)
        for token in done.request.prompt_ids:
            context.push_inert(token)
        logits = live_logits(model, context, done.token_ids).float()
    logits[: params.min_gen_toks, EOS] = -torch.inf
    seeds = [params.seed] * count
    noise = gumbel(seeds, range(count), logits.shape[-1], torch.device("cpu"))
    return [int(token) for token in (logits / params.temperature + noise).argmax(-1)]


@torch.no_grad()
def _masked_logits(model: Any, done: Completion) -> torch.Tensor:
    """Logits before each token, [tokens, vocabulary], from one forward in which thoughts disappear by the mask."""
    prompt = len(done.request.prompt_ids)
    plan = compile_trace([*done.request.prompt_ids, *done.token_ids], prompt, MARKERS, Policy.EVICT)
    ids, positions, death = (torch.tensor([x], device=model.device) for x in (plan.ids, plan.positions, plan.death))
    masks = attention_masks(model.config, death, positions, model.config._attn_implementation, model.dtype)
    output = model(input_ids=ids, position_ids=positions, attention_mask=masks, use_cache=False)
    return output.logits[0, prompt - 1 : prompt - 1 + len(done.token_ids)].float().cpu()


@torch.inference_mode()
def live_logits(model: Any, context: LiveContext, trace: Sequence[int]) -> torch.Tensor:
    """Returns the logits before each token of a trace, by forwards of the live context from its start.

    There is one forward for each stretch between prunes: its outputs are those of all the shorter contexts in it.

    Args:
        model: a causal language model of transformers.
        context: has read the prompt.
        trace: the tokens that follow.

    Returns:
        [len(trace), vocabulary], on the CPU, in double precision.
    """
    found, since = [], 0
    for index, token in enumerate(trace):
        live, since = list(context.live), since + 1
        if context.push(token).is_prune or index + 1 == len(trace):
            ids = torch.tensor([live], device=model.device)
            found.append(model(input_ids=ids, use_cache=False).logits[0, -since:].double().cpu())
            since = 0
    return torch.cat(found)
