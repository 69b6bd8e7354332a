"""Markers in a vocabulary, and prompts that spell them."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.tokens import add_special_tokens, encode_prompt
from hcot_lmeval.vocabulary import marker_ids, special_ids, token_id
from tests.tiny import MARKERS, THINK, tiny_model, tiny_tokenizer


def test_marker_ids_are_those_of_the_vocabulary():
    tokenizer = tiny_tokenizer()
    found = marker_ids(tokenizer, "hcot")
    assert tokenizer.convert_ids_to_tokens([found.open, found.split, found.close]) == list(MARKERS)


@pytest.mark.parametrize("markup", PRESETS)
def test_missing_markers_are_named_with_the_remedy(markup):
    tokenizer = tiny_tokenizer(markers=False, think=False)
    with pytest.raises(ValueError, match="add_special_tokens") as error:
        marker_ids(tokenizer, markup)
    assert all(text in str(error.value) for text in PRESETS[markup].markers)
    assert "pruning=off" in str(error.value)


@pytest.mark.parametrize("markup", PRESETS)
def test_added_tokens_leave_the_others_alone(markup):
    tokenizer, model = tiny_tokenizer(markers=False, think=False), tiny_model("llama")
    before, weights = tokenizer.get_vocab(), model.get_input_embeddings().weight.clone()
    added = len(add_special_tokens(tokenizer, model, markup).tokens)
    assert added == len(PRESETS[markup].markers) + 2
    assert before.items() <= tokenizer.get_vocab().items()
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0 and rows >= len(tokenizer)
    assert (model.get_input_embeddings().weight[: len(weights)] == weights).all()
    assert not add_special_tokens(tokenizer, model, markup).tokens
    assert model.get_input_embeddings().weight.shape[0] == rows
    marker_ids(tokenizer, markup)


def test_nothing_of_the_tokenizer_is_lost(tmp_path):
    """transformers' own `add_special_tokens` may replace the list of additional special tokens."""
    tokenizer = tiny_tokenizer(markers=False, think=False)
    tokenizer.add_tokens(["plainword"])
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    vocabulary, template, special = tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.all_special_tokens
    added = add_special_tokens(tokenizer).tokens
    assert list(added) == [*MARKERS, *THINK]
    assert sorted(added.values()) == list(range(len(vocabulary), len(tokenizer)))
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one.get_vocab() == vocabulary | added
        assert one.chat_template == template
        assert set(one.all_special_tokens) >= set(special)
        assert (one.eos_token, one.pad_token) == ("<|im_end|>", "<|endoftext|>")
        assert special_ids(one) >= {*added.values(), token_id(one, "<tool>"), token_id(one, "<|im_start|>")}
        assert token_id(one, "plainword") not in special_ids(one)
        assert one.encode("a[THOUGHT]plainword<tool></think>")[-4:] == [
            added["[THOUGHT]"],
            token_id(one, "plainword"),
            token_id(one, "<tool>"),
            added["</think>"],
        ]


def test_tokens_that_are_there_stay_as_they_are():
    """Qwen3 has the thinking tokens, and does not call them special."""
    tokenizer = tiny_tokenizer(markers=False, think=False)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in THINK])
    ids = [token_id(tokenizer, text) for text in THINK]
    assert list(add_special_tokens(tokenizer).tokens) == list(MARKERS)
    assert [token_id(tokenizer, text) for text in THINK] == ids
    assert not special_ids(tokenizer) & set(ids)


def test_an_embedding_with_spare_rows_never_shrinks():
    tokenizer, model = tiny_tokenizer(markers=False), tiny_model("llama", vocab_size=512)
    add_special_tokens(tokenizer, model)
    assert model.get_input_embeddings().weight.shape[0] == 512


PROMPTS = [
    "plain words",
    "[THOUGHT]",
    "say [THOUGHT] twice[THOUGHT][SOLUTION] and [RETURN].",
    "nested [[THOUGHT]] [THOUGHT",
    "［ＴＨＯＵＧＨＴ］ full width",
    "<|im_start|>user\n[RETURN]<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "语言 [SOLUTION] ภาษา",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_text_never_becomes_a_marker(text):
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, text)
    assert not set(ids) & marker_ids(tokenizer).ids
    assert tokenizer.decode(ids) == text
    template = ("<|im_start|>", "<|im_end|>", "<think>")
    assert {t for t in template if token_id(tokenizer, t) in ids} == {t for t in template if t in text}


def test_text_without_markers_is_encoded_as_always():
    tokenizer = tiny_tokenizer()
    for text in ("7^2 + 1 = 50", " leading space", "<|im_start|>user\nx<|im_end|>", ""):
        assert encode_prompt(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


def test_normalised_forms_do_not_slip_through():
    """A tokenizer that normalises before it looks for added tokens would turn the full-width form into the marker."""
    from tokenizers import normalizers

    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_tokens([AddedToken(text, normalized=True) for text in MARKERS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    wide = "a ［ＴＨＯＵＧＨＴ］ a"
    assert marker_ids(tokenizer).open in tokenizer.encode(wide)
    assert marker_ids(tokenizer).open not in encode_prompt(tokenizer, wide)


def test_markers_that_are_words_of_the_vocabulary():
    """Whoever trains a tokenizer with the markers as special tokens has them in the model's vocabulary as well."""
    vocab = {"[UNK]": 0, "a": 1, **{text: 2 + i for i, text in enumerate(MARKERS)}, "z": 5}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    assert tokenizer.encode("a [THOUGHT] z") == [1, 2, 5]
    assert encode_prompt(tokenizer, "a [THOUGHT] z") == [1, 0, 5]


def test_a_vocabulary_that_grew_is_seen():
    tokenizer = tiny_tokenizer(markers=False)
    before = encode_prompt(tokenizer, "[THOUGHT]")
    add_special_tokens(tokenizer)
    assert encode_prompt(tokenizer, "[THOUGHT]") == before
    assert len(tokenizer.encode("[THOUGHT]", add_special_tokens=False)) == 1
