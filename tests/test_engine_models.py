"""What the engine asks of a model, and models that are built otherwise: windows, positions, parts, modes, threads."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.gptj import modeling_gptj

from hcot_lmeval.engine import Decoder, Engine, Request, SamplingParams, UnsupportedModelError
from hcot_lmeval.rotary import FALLBACK_CONTEXT, position_limits, rotary_limit
from hcot_lmeval.training.forward import install, token_logprobs
from hcot_lmeval.vocabulary import marker_ids
from tests.tiny import favour, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MARKERS = marker_ids(TOKENIZER)
PROMPT = tuple(range(40, 48))
BLOCK = (MARKERS.open, *range(50, 70), MARKERS.split, 60, 61, MARKERS.close)
SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
OLD_STYLE = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}
IN_REGISTRY = hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS")
newer = pytest.mark.skipif(
    not IN_REGISTRY,
    reason="this release of transformers has gptj and codegen outside of its attention registry",
)
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build(kind: str, dtype: torch.dtype = torch.float64, **config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SMALL, **config}), dtype=torch.float32)
    return model.to(dtype).eval()


def make(model: PreTrainedModel, **options: Any) -> Engine:
    return Engine(model, markers=MARKERS, **{"eos_ids": (), "poison": True, "self_check": False, **options})


def request(name: str, ids: tuple[int, ...], **params: Any) -> Request:
    return Request(name, PROMPT, SamplingParams(max_gen_toks=len(ids), **params), forced_ids=ids)


def logits_of(engine: Engine, requests: list[Request]) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {}
    for _ in engine.stream(requests, on_logits=lambda r, k, n, row: seen.setdefault(r.id, []).append(row.clone())):
        pass
    return {name: torch.stack(rows) for name, rows in seen.items()}


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Of the ids behind the prompt, by one forward."""
    return model(torch.tensor([[*PROMPT, *ids]]), use_cache=False).logits[0, len(PROMPT) - 1 : -1]


# --- windows ----------------------------------------------------------------------------------------------------------

BY_MASK = {
    "phimoe": {"sliding_window": 30, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 2, **EXPERTS},
}
"""Models that have their window in the mask, and do not hand it to the attention."""


@pytest.mark.parametrize("kind", BY_MASK)
@pytest.mark.parametrize("loop", ["host", "device"])
def test_a_window_in_the_mask_alone_is_seen(kind: str, loop: str) -> None:
    model = build(kind, torch.float32, **BY_MASK[kind])
    ids = tuple(100 + i % 40 for i in range(60))
    if loop == "host":
        found = logits_of(make(model, policy="off"), [request("r", ids)])["r"]
        assert (found - plain_logits(model, ids)).abs().max() < 1e-4
    assert Decoder(model).windows[0] == 30
    greedy = Request("g", PROMPT, SamplingParams(max_gen_toks=60))
    (done,) = make(model, policy="off", loop=loop, compute="torch").generate([greedy])
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert list(done.token_ids) == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("kind", BY_MASK)
def test_the_self_check_outgrows_the_window(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, torch.float32, **BY_MASK[kind])
    decoder = Decoder(model)
    assert decoder.self_check() < 1e-5
    length = decoder.check_length()
    monkeypatch.setattr(decoder, "check_length", lambda: length)
    decoder.windows = dict.fromkeys(decoder.windows)
    with pytest.raises(UnsupportedModelError, match="failed the self-check"):
        decoder.self_check()


def test_windows_that_no_forward_could_reach_are_known() -> None:
    model = build("mistral", head_dim=8, sliding_window=5000, max_position_embeddings=2**17)
    assert Decoder(model).windows == {0: 5000, 1: 5000}
    assert Decoder(build("qwen2", use_sliding_window=False, sliding_window=7)).windows == {0: None, 1: None}


def test_the_self_check_covers_the_neighbour_and_the_pruned_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teeth: rows that see their neighbour's angles, and rows whose memory is not that of their place."""
    decoder = Decoder(build("phi3", **LONGROPE, max_position_embeddings=1024))
    with monkeypatch.context() as patch:
        patch.setattr("hcot_lmeval.engine.decoder.rotary_limit", lambda config: None)
        patch.setattr("hcot_lmeval.engine.decoder.Decoder.check_length", lambda self: 40)
        with pytest.raises(UnsupportedModelError, match="failed the self-check"):
            decoder.self_check()
    decoder = Decoder(build("qwen2"), compute="torch")
    monkeypatch.setattr("hcot_lmeval.engine.decoder.KEPT", 5)
    forward = decoder.forward
    monkeypatch.setattr(
        decoder,
        "forward",
        lambda pool, chunks: forward(pool, [c if c.start != 5 else type(c)(0, 5, c.ids, c.positions) for c in chunks]),
    )
    with pytest.raises(UnsupportedModelError, match="failed the self-check"):
        decoder.self_check()


# --- rotary embeddings that depend on the length ----------------------------------------------------------------------

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
CHANGING = [("phi3", LONGROPE, 32), ("llama", LONGROPE, 32), ("qwen2", DYNAMIC, 128), ("mistral", DYNAMIC, 128)]


@pytest.mark.parametrize(("kind", "rope", "limit"), CHANGING)
def test_longer_rows_than_angles_allow_are_refused(kind: str, rope: dict[str, Any], limit: int) -> None:
    window = {"sliding_window": None, "head_dim": 8} if kind == "mistral" else {}
    model = build(kind, **rope, **window)
    assert rotary_limit(model.config) == (rope["rope_parameters"]["rope_type"], limit)
    with pytest.raises(ValueError, match=rf"max_context={limit + 1} .*set max_context={limit}"):
        make(model, max_context=limit + 1)
    with pytest.raises(ValueError, match=rf"max_position={limit + 1} .*set max_position={limit}"):
        make(model, policy="evict", max_context=limit, max_position=limit + 1)
    assert make(model, policy="evict", max_context=limit).limits.position == limit
    if kind != "qwen2":
        return
    make(model)  # what the configuration allows is what has angles


@pytest.mark.parametrize(("kind", "rope", "limit"), CHANGING[:3])
def test_up_to_there_rows_do_not_depend_on_one_another(kind: str, rope: dict[str, Any], limit: int) -> None:
    """Short rows beside one that fills the context, to the last token, and beside one that prunes."""
    model = build(kind, **rope)
    long = tuple(100 + i % 40 for i in range(limit - len(PROMPT)))
    requests = [request("short", long[:7]), request("long", long), request("pruned", (*BLOCK[8:], *BLOCK, 70, 71))]
    engine = make(model, max_context=limit, slots=3)
    found = logits_of(engine, requests)
    for name, ids in (("short", long[:7]), ("long", long)):
        assert (found[name] - plain_logits(model, ids)).abs().max() < 1e-9
    alone = logits_of(engine, requests[2:])["pruned"]
    assert (found["pruned"] - alone).abs().max() < 1e-9


def test_packed_rows_that_are_longer_are_refused() -> None:
    model = build("phi3", **LONGROPE)
    install(model)
    for length in (32, 33):
        ids = torch.arange(length)[None]
        batch = {"input_ids": ids + 40, "position_ids": ids, "death": torch.full_like(ids, length)}
        batch |= {"shift_labels": ids + 41, "states": torch.zeros_like(ids), "classes": torch.zeros_like(ids)}
        if length == 32:
            assert torch.isfinite(token_logprobs(model, batch)).all()
            continue
        with pytest.raises(ValueError, match=r"need 33 positions.*\(longrope\).*more than 32 tokens"):
            token_logprobs(model, batch)


def test_parameters_by_type_of_layer() -> None:
    config = PreTrainedConfig(max_position_embeddings=64)
    config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}
    assert rotary_limit(config) == ("dynamic", 64)
    config.rope_parameters = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert rotary_limit(config) is None


# --- learned positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "opt", pytest.param("gptj", marks=newer)])
def test_learned_positions_end_where_the_table_ends(kind: str) -> None:
    names = {"opt": {"ffn_dim": 32, "word_embed_proj_dim": 32}}
    shape = {"vocab_size": 320, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}
    config = {**SMALL, **names[kind], "max_position_embeddings": 64} if kind in names else {**shape, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config)).eval()
    with pytest.raises(ValueError, match=r"max_context=65 is beyond the 64 positions .* set max_context=64"):
        make(model, max_context=65)
    with pytest.raises(ValueError, match="max_position=65"):
        make(model, policy="evict", max_position=65)
    (done,) = make(model).generate([Request("r", PROMPT, SamplingParams(max_gen_toks=100))])
    assert (done.finish_reason, len(done.live_ids)) == ("context", 64)


# --- models of several parts, and others ------------------------------------------------------------------------------


def test_every_part_gets_its_own_attention_back() -> None:
    """Gemma 4 with ears, which attend in a way of their own; Gemma 3 with a part that is eager."""
    text = {**SMALL, "head_dim": 8, "sliding_window": 8}
    ears = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    four = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 320}
    sound = CONFIG_MAPPING["gemma4"](
        text_config={**text, **four}, audio_config=ears, vision_config=None, audio_token_id=3, image_token_id=4
    )
    eye = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    image = CONFIG_MAPPING["gemma3"](text_config=text, vision_config={**eye, "image_size": 28, "patch_size": 14})
    for config, chosen in ((sound, None), (image, {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})):
        model = AutoModelForImageTextToText.from_config(config).eval()
        if chosen:
            model.set_attn_implementation(chosen)
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        before = [part._attn_implementation for part in configs]
        assert len(set(before)) == 2 or not IN_REGISTRY  # older releases have one way for all parts
        decoder = Decoder(model)
        assert [part._attn_implementation for part in configs] == before
        with pytest.raises(ZeroDivisionError), decoder.attached():
            1 / 0  # noqa: B018
        assert [part._attn_implementation for part in configs] == before


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("afmoe", {"sliding_window": 30, "head_dim": 8, **EXPERTS}),
        ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_key_value_heads": 2}),
        pytest.param("gptj", OLD_STYLE, marks=newer),
        pytest.param("codegen", OLD_STYLE, marks=newer),
    ],
)
@pytest.mark.parametrize("loop", ["host", "device"])
def test_more_families(kind: str, config: dict[str, Any], loop: str) -> None:
    """Some of them view what attention returns, which has to be contiguous."""
    shape = {} if "n_embd" in config else SMALL
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**shape, "vocab_size": 320, **config})).eval()
    assert Decoder(model).self_check() < 1e-5
    (done,) = make(model, loop=loop).generate([request("r", (*BLOCK, 50))])
    assert done.statistics.prune_events == 1


def test_weights_that_are_no_numbers_are_named() -> None:
    model = build("qwen2", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"its weight model\.layers\.1\.mlp\.up_proj\.weight holds"):
        Engine(model, markers=MARKERS)
    model = build("qwen2", torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)
    with pytest.raises(UnsupportedModelError, match="in float16 a plain forward gives logits that are NaN or infinite"):
        Engine(model, markers=MARKERS)


# --- token ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["auto", "torch"])
def test_ids_that_the_embedding_lacks_are_refused(compute: str) -> None:
    small = tiny_model("qwen2", vocab_size=256)
    with pytest.raises(ValueError, match=r"ids up to 319, but the embedding of the model has rows for 256 tokens"):
        Engine(small, TOKENIZER, compute=compute)
    grown = tiny_tokenizer(markers=False, think=False)
    grown.add_special_tokens({"additional_special_tokens": ["[THOUGHT]", "[SOLUTION]", "[RETURN]"]})
    model = tiny_model("qwen2")
    with pytest.raises(ValueError, match=r"markers go up to id 322.*rows for 320 tokens.*add_special_tokens"):
        Engine(model, grown, compute=compute)
    with pytest.raises(ValueError, match="eos_ids go up to id 320"):
        make(model, eos_ids=(320,))
    engine = make(model, compute=compute)
    for wrong in (320, 10**9, -1):
        for given in (
            Request("r", (40, wrong)),
            Request("r", PROMPT, forced_ids=(wrong,)),
            Request("r", PROMPT, SamplingParams(stop_ids=(wrong,))),
        ):
            with pytest.raises(ValueError, match=str(wrong)):
                engine.generate([given])


def test_added_tokens_for_other_uses_may_lack_rows() -> None:
    """Gemma 3 has one for images, beyond the rows of its small models."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(Engine(tiny_model("qwen2"), tokenizer).generate([request("r", (50, 51))])) == 1


def test_an_end_id_beyond_the_vocabulary_never_comes() -> None:
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [2, 400]
    engine = Engine(model, markers=MARKERS, self_check=False)
    assert engine.limits.eos_ids == {2}
    params = SamplingParams(max_gen_toks=4, min_gen_toks=3)
    assert len(engine.generate([Request("r", PROMPT, params)])[0].token_ids) >= 3


def test_a_reserve_that_leaves_nothing_is_refused() -> None:
    engine = Engine(tiny_model("qwen2"), TOKENIZER, self_check=False, force_answer=20)
    with pytest.raises(ValueError, match=r"force_answer=20 keeps all of max_gen_toks=20"):
        engine.generate([Request("r", PROMPT, SamplingParams(max_gen_toks=20))])


# --- modes and threads ------------------------------------------------------------------------------------------------


def test_dropout_rests_while_the_engine_runs() -> None:
    config = CONFIG_MAPPING["gpt2"](vocab_size=320, n_embd=32, n_head=4, n_layer=2, initializer_range=0.25)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = make(model).generate([Request("r", PROMPT, SamplingParams(max_gen_toks=20))])[0].token_ids
    engine = make(model)
    model.train()
    model.transformer.h[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    assert engine.generate([Request("r", PROMPT, SamplingParams(max_gen_toks=20))])[0].token_ids == expected
    assert make(model, self_check=True).generate([Request("r", PROMPT, SamplingParams(max_gen_toks=20))])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("compute", ["auto", "torch"])
@pytest.mark.parametrize("shared", [True, False], ids=["one engine", "two engines"])
def test_threads_do_not_meet(compute: str, shared: bool) -> None:
    """One engine in several threads, and several engines of one model: what each writes is what it writes alone."""
    model = favour(tiny_model("qwen2"), sorted(MARKERS.ids), 1.5)
    before = model.config._attn_implementation
    first = make(model, compute=compute)
    engines = [first] * 3 if shared else [first, make(model, compute=compute), make(model, compute=compute)]
    jobs = [
        [
            Request(f"{k}-{i}", PROMPT[i % 3 :], SamplingParams(max_gen_toks=20 + i, temperature=1.0, seed=9 * k + i))
            for i in range(6)
        ]
        for k in range(3)
    ]
    alone = [[done.token_ids for done in first.generate(job)] for job in jobs]
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}

    def work(k: int) -> None:
        for turn in range(4):
            found[k, turn] = [done.token_ids for done in engines[k].generate(jobs[k])]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(k, turn): alone[k] for k in range(3) for turn in range(4)}
    assert model.config._attn_implementation == before


def test_a_model_without_a_context_limit_gets_the_fallback() -> None:
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    model = SimpleNamespace(config=config, named_buffers=lambda: [])
    assert position_limits(model, "it", None, None, evict=True) == (FALLBACK_CONTEXT, FALLBACK_CONTEXT)
