"""Models that are read row by row, beside plain forwards of their live text: states, old models, chunked attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hcot_lmeval.engine import Engine, Request, SamplingParams, UnsupportedModelError
from hcot_lmeval.engine.slots import Chunk
from hcot_lmeval.engine.states import SAVED_STATES, RowDecoder, RowPool
from tests.full import FULL
from tests.random_traces import VOCAB_SIZE, random_trace
from tests.reference import MARKERS, pruned

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"state_size": 8, "expand": 2}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "falcon": {"alibi": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "olmo_hybrid": DELTA,
    "falcon_h1": {"mamba_d_ssm": 64, "head_dim": 8, **HEADS},
    "bamba": {"attn_layer_indices": [1], **HEADS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "nemotron_h": {
        "layer_types": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "initializer_range": 0.1,  # beyond, time steps meet a limit that its single steps do not have
    },
    "kimi_linear": {
        **LATENT,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 16,
    },
    "deepseek_v32": {
        **LATENT,
        "q_lora_rank": 16,
        "index_n_heads": 8,  # of few, scores tie at zero
        "index_head_dim": 16,
        "index_topk": 256,  # of fewer than live tokens, its own cache and a plain forward choose others
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    },
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 48, "head_dim": 8},
}
LIMITS = {"lfm2": 1e-9, "falcon": 1e-9, "bloom": 1e-6, "mamba": 1e-5}
"""Kinds that compute in float64, the last two not throughout; others are held to what caching costs without prunes."""
TRACES = 40 if FULL else 5


def build(kind: str, **config: Any) -> PreTrainedModel:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = CONFIG_MAPPING[kind](**{**SMALL, **KINDS[kind], **config})
        model = AutoModelForCausalLM.from_config(given, dtype=torch.float32)
    return model.to(torch.float64 if kind in LIMITS else torch.float32).eval()


def make(model: PreTrainedModel, notation: str = "hcot", **options: Any) -> Engine:
    return Engine(model, markers=MARKERS[notation], **{"eos_ids": (), "poison": True, "slots": 8, **options})


def requests_of(notation: str) -> list[Request]:
    found = []
    for seed in range(TRACES):
        ids, inert = random_trace(seed, MARKERS[notation], 50)
        params = SamplingParams(max_gen_toks=len(ids) - inert)
        found.append(Request(str(seed), tuple(ids[:inert]), params, forced_ids=tuple(ids[inert:])))
    return found


@torch.no_grad()
def difference(engine: Engine, model: PreTrainedModel, requests: list[Request], notation: str, policy: str) -> float:
    """The largest one of a logit from a forward of the live text, relative to the largest logit."""
    worst, seen = 0.0, []
    for _ in engine.stream(requests, on_logits=lambda r, k, n, row: seen.append((r, n, row.clone()))):
        pass
    for request, count, row in seen if FULL else seen[::5]:
        ids = [*request.prompt_ids, *request.forced_ids[:count]]
        live = pruned(ids, len(request.prompt_ids), MARKERS[notation], policy)
        expected = model(torch.tensor([live]), use_cache=False).logits[0, -1]
        worst = max(worst, float((expected - row).abs().max() / expected.abs().max()))
    return worst


PAIRS = [(kind, notation) for kind in KINDS for notation in MARKERS if FULL or notation == "hcot" or kind == "lfm2"]


@pytest.mark.parametrize(("kind", "notation"), PAIRS)
def test_logits_are_those_of_the_live_text(kind: str, notation: str) -> None:
    model = build(kind)
    requests = requests_of(notation)
    requests = [*requests, *requests[::-1]]  # more than slots, so that they are used again, and prompts shared
    engine = make(model, notation)
    assert isinstance(engine.decoder, RowDecoder)
    found = difference(engine, model, requests, notation, "recompute")
    assert engine.live.prune_events > 4
    if kind in LIMITS:
        assert found < LIMITS[kind]
    else:
        unpruned = difference(make(model, notation, policy="off"), model, requests, notation, "off")
        assert found < max(3 * unpruned, 1e-5) and unpruned < 1e-3


@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_samples_do_not_depend_on_the_batch(kind: str) -> None:
    model, params = build(kind), SamplingParams(max_gen_toks=40, n=3, temperature=1.0)
    requests = [Request(str(k), (9, 10 + k, 12, 14, 20), params) for k in range(3)]
    texts = []
    for slots, order in ((1, 1), (8, 1), (8, -1)):
        done = make(model, slots=slots).generate(requests[::order])
        texts.append({(each.request.id, each.sample): each.token_ids for each in done})
    assert texts[0] == texts[1] == texts[2]


def test_states_are_saved_where_blocks_open_and_no_more_of_them_than_planned() -> None:
    engine, markers = make(build("lfm2")), MARKERS["hcot"]
    decoder: Any = engine.decoder
    pool = RowPool(decoder.layers, 1, 128)
    decoder.mark(pool, markers)
    read: list[int] = []
    embedding = decoder.model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, given: read.extend(given[0].flatten().tolist()))
    ids = [20, 21, *([markers.open, 30] * (SAVED_STATES + 3))]
    with decoder.attached():
        for start, token in enumerate(ids):
            decoder.forward(pool, [Chunk(0, start, [token], range(start + 1))])
        assert len(pool.rows[0].saved) == SAVED_STATES
        del read[:]
        decoder.forward(pool, [Chunk(0, len(ids) - 1, [40], range(len(ids)))])
        assert read == [40]  # the last block's state was put back
        del read[:]
        decoder.forward(pool, [Chunk(0, 7, [41], range(8))])  # behind a state that had to go
        assert read == [*ids[3:7], 41]


def test_what_has_no_exact_answer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'evict' cannot decode .*has read the thought.*'recompute'"):
        make(build("lfm2"), policy="evict")
    with pytest.raises(UnsupportedModelError, match="conv"):
        make(build("lfm2"), kv_dtype="bfloat16")
