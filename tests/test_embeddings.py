"""Rows of new tokens, each held against its definition: the mean of the rows of a phrase."""

from __future__ import annotations

import math

import peft
import pytest
import torch

from hcot_lmeval.embeddings import PHRASES, Seeding, padded
from hcot_lmeval.markup import PRESETS, Markup
from hcot_lmeval.tokens import add_special_tokens
from tests.tiny import MARKERS, THINK, VOCAB_SIZE, tiny_model, tiny_tokenizer

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def bare_tokenizer():
    return tiny_tokenizer(markers=False, think=False)


def tables(model):
    """Every parameter with a row per token, tied ones once."""
    found = {id(p): (name, p) for name, p in model.named_parameters() if name.startswith("lm_head") or "embed" in name}
    return dict(found.values())


def phrase_mean(table, tokenizer, phrase):
    rows = [table[i].double() for i in tokenizer.encode(phrase, add_special_tokens=False)]
    return (sum(rows) / len(rows)).to(table.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        ("qwen2", {"tie_word_embeddings": True}, 1),
        ("qwen3", {"tie_word_embeddings": False}, 2),
        ("phi", {"tie_word_embeddings": False}, 3),  # its head has a bias
    ],
)
def test_new_rows_are_means_of_their_phrase_and_old_ones_stay(kind, config, count, dtype):
    tokenizer, before, model = bare_tokenizer(), bare_tokenizer(), tiny_model(kind, dtype, **config)
    old = {name: table.detach().clone() for name, table in tables(model).items()}
    assert len(old) == count
    assert len(add_special_tokens(tokenizer, model).tokens) == 5
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 384
    new = tables(model)
    assert new.keys() == old.keys()
    for name, table in new.items():
        assert table.dtype == dtype and table.requires_grad
        assert torch.equal(table[:VOCAB_SIZE], old[name])
        for token in (*MARKERS, *THINK):
            row = table[tokenizer.convert_tokens_to_ids(token)]
            assert torch.equal(row, phrase_mean(old[name], before, PHRASES[token])), (name, token)


@pytest.mark.parametrize("method", ["mean", "noise", "none"])
def test_padding_rows_are_near_the_mean_of_all_and_never_likely(method):
    tokenizer, model = bare_tokenizer(), tiny_model("qwen2", torch.bfloat16)
    mean = model.get_output_embeddings().weight.detach().double().mean(0)
    add_special_tokens(tokenizer, model, seeding=Seeding(method))
    for table in tables(model).values():
        assert table.isfinite().all()
    padding = model.get_output_embeddings().weight[len(tokenizer) :].double()
    assert len(padding) == 384 - VOCAB_SIZE - 5
    torch.testing.assert_close(padding, mean.expand_as(padding), atol=2e-3, rtol=2e-2)
    logits = model(torch.arange(1, 60)[None]).logits[0].float()
    assert (logits[:, len(tokenizer) :].amax(-1) < logits[:, :VOCAB_SIZE].amax(-1) - 1).all()


def test_a_tied_head_stays_tied():
    tokenizer, model = bare_tokenizer(), tiny_model("llama", tie_word_embeddings=True)
    add_special_tokens(tokenizer, model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_noise_is_added_to_the_mean_of_the_phrase():
    tokenizer, loudly = bare_tokenizer(), Seeding("noise", noise=0.5)
    quiet, loud, twin = (tiny_model("llama", torch.float64, hidden_size=512) for _ in range(3))
    add_special_tokens(tokenizer, quiet)
    add_special_tokens(bare_tokenizer(), loud, seeding=loudly)
    add_special_tokens(bare_tokenizer(), twin, seeding=loudly)
    ids = tokenizer.convert_tokens_to_ids([*MARKERS, *THINK])
    assert all(torch.equal(a, b) for a, b in zip(tables(loud).values(), tables(twin).values(), strict=True))
    noise = torch.stack([(tables(loud)[name] - table)[ids] for name, table in tables(quiet).items()]).flatten()
    assert abs(noise.mean()) < 5 * 0.5 / math.sqrt(len(noise))
    assert abs(noise.std() - 0.5) < 5 * 0.5 / math.sqrt(2 * len(noise))
    input_noise, head_noise = noise.chunk(2)
    assert abs(torch.corrcoef(torch.stack([input_noise, head_noise]))[0, 1]) < 5 / math.sqrt(len(input_noise))


def test_noise_leaves_a_bias_at_the_mean():
    quiet, loud = tiny_model("phi"), tiny_model("phi")
    for model, method in ((quiet, "mean"), (loud, "noise")):
        add_special_tokens(bare_tokenizer(), model, seeding=Seeding(method))
    new = slice(VOCAB_SIZE, VOCAB_SIZE + 5)
    assert torch.equal(quiet.lm_head.bias[new], loud.lm_head.bias[new])
    assert not torch.equal(quiet.lm_head.weight[new], loud.lm_head.weight[new])


@pytest.mark.parametrize("method", ["mean", "noise", "none"])
def test_the_seed_decides_and_the_global_random_state_stays(method):
    models = [tiny_model("qwen2", tie_word_embeddings=False) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        state = torch.get_rng_state()
        add_special_tokens(bare_tokenizer(), model, seeding=Seeding(method, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
    first, same, other = ([table.detach() for table in tables(model).values()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))  # the padding rows, if nothing else


def test_method_none_reads_no_phrase():
    markup = Markup("own", "<a>", "<b>", "<c>", keep=frozenset())
    added = add_special_tokens(bare_tokenizer(), tiny_model("qwen2"), markup, Seeding("none"))
    assert added.seeding == {"method": "none", "seed": 0, "rows": {}}
    assert list(added.tokens) == ["<a>", "<b>", "<c>", *THINK]


def test_spare_rows_of_a_padded_embedding_are_seeded_and_the_others_stay():
    """Qwen2.5 has 271 rows more than tokens, and the published checkpoint's markers took the first of them."""
    tokenizer, model = bare_tokenizer(), tiny_model("qwen2", vocab_size=500)
    old = model.get_input_embeddings().weight.detach().clone()
    add_special_tokens(tokenizer, model)
    table = model.get_input_embeddings().weight
    assert len(table) == padded(500) == 512
    assert torch.equal(table[VOCAB_SIZE], phrase_mean(old, bare_tokenizer(), PHRASES["[THOUGHT]"]))
    kept = [i for i in range(500) if not VOCAB_SIZE <= i < VOCAB_SIZE + 5]
    assert torch.equal(table[kept], old[kept])


def test_only_what_is_missing_is_seeded():
    tokenizer, model = tiny_tokenizer(markers=True, think=False), tiny_model("llama")
    old = model.get_input_embeddings().weight.detach().clone()
    added = add_special_tokens(tokenizer, model)
    assert list(added.tokens) == list(added.seeding["rows"]) == list(THINK)
    assert torch.equal(model.get_input_embeddings().weight[:VOCAB_SIZE], old)
    again = model.get_input_embeddings().weight.detach().clone()
    assert add_special_tokens(tokenizer, model) == ({}, {"method": "mean", "seed": 0, "rows": {}})
    assert torch.equal(model.get_input_embeddings().weight, again)


def test_tokens_that_only_the_tokenizer_has_get_rows():
    """A tokenizer saved with the markers, beside the base model."""
    tokenizer, model = bare_tokenizer(), tiny_model("llama")
    assert len(add_special_tokens(tokenizer).tokens) == 5
    old = model.get_input_embeddings().weight.detach().clone()
    added = add_special_tokens(tokenizer, model)
    assert added.tokens == {}
    assert list(added.seeding["rows"]) == [*MARKERS, *THINK]
    row = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("[RETURN]")]
    assert torch.equal(row, phrase_mean(old, bare_tokenizer(), PHRASES["[RETURN]"]))


@pytest.mark.parametrize("markup", PRESETS)
def test_every_token_of_every_notation_has_a_phrase_of_its_own(markup):
    tokens = [*PRESETS[markup].markers, *PRESETS[markup].think]
    assert len({PHRASES[token] for token in tokens}) == len(tokens)


def test_users_phrases_come_before_ours_and_what_was_done_is_told():
    tokenizer, before, model = bare_tokenizer(), bare_tokenizer(), tiny_model("qwen3")
    old = model.get_input_embeddings().weight.detach().clone()
    seeding = Seeding("noise", noise=0.0, phrases={"[THOUGHT]": "open a book"}, seed=7)
    told = add_special_tokens(tokenizer, model, "hcot", seeding).seeding
    assert {name: told[name] for name in ("method", "noise", "seed")} == {"method": "noise", "noise": 0.0, "seed": 7}
    ids = before.encode("open a book", add_special_tokens=False)
    assert told["rows"]["[THOUGHT]"] == {"phrase": "open a book", "ids": ids}
    assert told["rows"]["[RETURN]"]["phrase"] == PHRASES["[RETURN]"]
    row = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("[THOUGHT]")]
    assert torch.equal(row, phrase_mean(old, before, "open a book"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Seeding("middle"), "seeding='middle' is unknown; choose one of mean, noise, none"),
        (lambda: Seeding("noise", noise=-0.1), "noise=-0.1 is not allowed"),
        (lambda: Seeding("noise", noise=float("nan")), "noise=nan is not allowed"),
    ],
)
def test_settings_that_are_not_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("markup", "phrases", "message"),
    [
        ("hcot", {"[THOUGTH]": "x"}, r"\[THOUGTH\] is no token of the markup; its tokens are \[THOUGHT\], .*</think>"),
        ("pencil", {"[THOUGHT]": "x"}, r"\[THOUGHT\] is no token of the markup; its tokens are \[CALL\]"),
        ("hcot", {"[THOUGHT]": ""}, r"the phrase '' of \[THOUGHT\] is encoded as \[\]"),
        (Markup("own", "<a>", "<b>", "<c>", keep=frozenset()), {"<b>": "b", "<c>": "c"}, "no phrase for .* <a>"),
    ],
)
def test_phrases_that_cannot_be_used_change_nothing(markup, phrases, message):
    tokenizer, model = bare_tokenizer(), tiny_model("qwen2")
    with pytest.raises(ValueError, match=message):
        add_special_tokens(tokenizer, model, markup, Seeding(phrases=phrases))
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE


def test_a_phrase_of_tokens_that_the_model_lacks_is_refused():
    tokenizer, model = bare_tokenizer(), tiny_model("qwen2")
    tokenizer.add_tokens(["subproblem"])
    with pytest.raises(ValueError, match=r"'subproblem'.*does not name rows of the model"):
        add_special_tokens(tokenizer, model)


def test_a_model_is_extended_before_it_is_wrapped():
    tokenizer, model = bare_tokenizer(), tiny_model("qwen2")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [320, 321]})
    early = peft.get_peft_model(tiny_model("qwen2"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="before wrapping it"):
        add_special_tokens(tokenizer, early)
    assert len(tokenizer) == VOCAB_SIZE
    add_special_tokens(tokenizer, model)
    wrapped = peft.get_peft_model(model, config)
    assert wrapped(torch.tensor([tokenizer.encode("a[THOUGHT]b")])).logits.isfinite().all()
    assert len(add_special_tokens(tokenizer, wrapped).tokens) == 0


def test_an_extended_checkpoint_comes_back_as_it_was(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = bare_tokenizer(), tiny_model("qwen2", tie_word_embeddings=True)
    add_special_tokens(tokenizer, model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tables(model).values(), tables(loaded).values(), strict=True))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(add_special_tokens(again, loaded).tokens) == 0
    assert again.encode("[THOUGHT]a</think>") == tokenizer.encode("[THOUGHT]a</think>")
