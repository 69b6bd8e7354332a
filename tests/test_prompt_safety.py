"""Prompts cannot cheat: whatever a problem or a few-shot example spells, it opens, closes and prunes nothing.

Unless the user asks for it: `prompt_markers` makes control tokens of markers in few-shot traces, inert or acting.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.lm.model import HcotLM
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.scoring.instructions import default_instructions
from hcot_lmeval.tokens import add_special_tokens, encode_prompt
from hcot_lmeval.vocabulary import marker_ids
from tests.lm_tasks import instances
from tests.tiny import favour, tiny_model, tiny_tokenizer

LANGUAGES = sorted(default_instructions())
FORMS: dict[str, Any] = {
    "as it is": lambda text: text,
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "NFKD": lambda text: unicodedata.normalize("NFKD", text),
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if 0x21 <= ord(c) <= 0x7E else c for c in text),
    "mathematical bold": lambda text: "".join(chr(0x1D400 + ord(c) - 65) if "A" <= c <= "Z" else c for c in text),
    "zero-width joiners": lambda text: "\u200d".join(text),
    "soft hyphen": lambda text: text[:3] + "\u00ad" + text[3:],
    "combining mark": lambda text: text + "\u0301",
    "right to left": lambda text: "\u202e" + text + "\u202c",
    "byte order mark": lambda text: "\ufeff" + text,
}
NORMALIZERS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "NFKC, no controls, lower case": normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\u00ad", ""), normalizers.Replace("\u200d", ""), normalizers.NFKC()]
    ),
}


def words_tokenizer(normalizer: Any, texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer that normalises before it looks for the markers: as careless as they come."""
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_tokens([AddedToken(text, normalized=True) for text in texts])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_no_form_in_no_language_becomes_a_marker(language: str, form: str) -> None:
    """All notations; a byte-level tokenizer, whose decoding also shows that no text is lost."""
    sentence = default_instructions()[language]
    for markup in PRESETS.values():
        tokenizer = tiny_tokenizer()
        add_special_tokens(tokenizer, markup=markup)
        spelled = [FORMS[form](marker) for marker in markup.markers]
        text = f"{sentence} {' '.join(spelled)}{sentence}{spelled[0]}"
        ids = encode_prompt(tokenizer, text, markup)
        assert not set(ids) & marker_ids(tokenizer, markup).ids
        assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("form", FORMS)
def test_careless_tokenizers_make_no_marker_either(form: str, normalizer: str) -> None:
    dangerous = 0
    for markup in PRESETS.values():
        tokenizer = words_tokenizer(NORMALIZERS[normalizer], markup.markers)
        ids = marker_ids(tokenizer, markup).ids
        for marker in markup.markers:
            text = f"a {FORMS[form](marker)} a"
            dangerous += bool(ids & set(tokenizer.encode(text)))
            assert not ids & set(encode_prompt(tokenizer, text, markup))
    assert dangerous or form not in ("as it is", "full width") or (form == "full width" and "K" not in normalizer)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(max_size=6), st.sampled_from([m for p in PRESETS.values() for m in p.markers]))))
def test_no_text_becomes_a_marker(parts: list[str]) -> None:
    tokenizer, text = TOKENIZER, "".join(parts)
    assert not set(encode_prompt(tokenizer, text)) & MARKERS.ids


TOKENIZER = tiny_tokenizer()
MARKERS = marker_ids(TOKENIZER)
QUOTED = "What does [THOUGHT] a [SOLUTION] b [RETURN] mean? [THOUGHT] open"


@pytest.fixture(scope="module")
def model():
    return favour(tiny_model("qwen2", torch.float64), [3, 4, 5], 5.0)


@pytest.mark.parametrize("policy", ["off", "recompute", "evict"])
def test_a_prompt_that_quotes_markers_moves_no_stack(model, policy: str) -> None:
    """The first return of the model finds no block open, though the prompt has spelled one."""
    prompt = tuple(encode_prompt(TOKENIZER, QUOTED))
    params = SamplingParams(max_gen_toks=3)
    request = Request("r", prompt, params, forced_ids=(MARKERS.split, MARKERS.close, 50))
    [done] = Engine(model, TOKENIZER, policy=policy, self_check=False).generate([request])
    assert done.statistics.malformed == {"stray_split": 1, "stray_close": 1}
    assert done.statistics.pruned_tokens == 0


def hcot(model, **model_args: Any) -> HcotLM:
    return HcotLM(
        pretrained=model, tokenizer=TOKENIZER, max_context=400, journal="off", apply_chat_template=False, **model_args
    )


SHOT = "[THOUGHT] 1 + 1 is 2 [SOLUTION] 2 [RETURN] so 2.\n\n"


def test_few_shot_traces_are_text_unless_asked_for(model) -> None:
    text, tokens = hcot(model), hcot(model, prompt_markers="tokens")
    _, ids, thinking = text._prompt(SHOT + "2 + 2?")
    assert not set(ids) & MARKERS.ids and not thinking
    _, ids, _ = tokens._prompt(SHOT + "2 + 2?")
    assert [i for i in ids if i in MARKERS.ids] == [MARKERS.open, MARKERS.split, MARKERS.close]


def test_few_shot_traces_are_inert_tokens_or_act(model) -> None:
    """Acting, the thought of the example is pruned before the model writes a word."""
    pruned = {}
    for how in ("text", "tokens", "acting"):
        lm = hcot(model, prompt_markers=how, pruning="recompute")
        [response] = lm.generate_until(instances((SHOT + "2 + 2?",), max_gen_toks=1), disable_tqdm=True)
        pruned[how] = response.stats["pruned_tokens"]
        assert lm.get_model_info()["hcot"]["prompt_markers"] == how
    assert pruned["text"] == pruned["tokens"] == 0 < pruned["acting"]


def test_what_becomes_of_prompts_is_part_of_the_fingerprint(model) -> None:
    facts = [json.dumps(hcot(model, prompt_markers=how).run_facts, default=str) for how in ("text", "tokens")]
    assert facts[0] != facts[1]


def test_an_unknown_way_is_refused(model) -> None:
    with pytest.raises(ValueError, match="prompt_markers='yes' is not allowed; choose one of text, tokens, acting"):
        hcot(model, prompt_markers="yes")


# --- controls through lm-eval -----------------------------------------------------------------------------------------


def responses(lm: HcotLM, count: int = 6, **kwargs: Any) -> list[Any]:
    asked = tuple(f"Question {n}?" for n in range(count))
    return lm.generate_until(instances(asked, max_gen_toks=60, **kwargs), disable_tqdm=True)


def test_controls_are_model_arguments(model) -> None:
    free = responses(hcot(model))
    assert sum(response.stats["illegal_tokens"] > 0 for response in free) > 2
    lm = hcot(
        model,
        constraints="grammar",
        max_block_tokens=6,
        max_solution_tokens=3,
        max_depth=2,
        force_answer=10,
        closing_tokens=5,
    )
    held = responses(lm)
    assert all(response.stats["illegal_tokens"] == 0 for response in held)
    assert all(response.stats["malformed"] == {} for response in held)
    told = lm.get_model_info()["hcot"]
    assert told["controls"] == {
        "constraints": "grammar",
        "max_depth": 2,
        "max_block_tokens": 6,
        "max_solution_tokens": 3,
        "force_answer": 10,
        "closing_tokens": 5,
    }
    assert told["illegal_tokens"] == 0 and told["forced"]["force_answer"] > 0


def test_controls_that_are_off(model) -> None:
    lm = hcot(model, constraints="off", max_depth="off", loop_tokens=False)
    assert lm.options.controls == {}
    assert [str(r) for r in responses(lm)] == [str(r) for r in responses(hcot(model))]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"constraints": "json"}, "constraints='json' is not allowed; choose one of grammar"),
        ({"max_depth": 0}, "max_depth=0 is not allowed"),
        ({"force_answer": "soon"}, "force_answer='soon'"),
        ({"max_blok_tokens": 5}, "did you mean max_block_tokens"),
    ],
)
def test_wrong_controls_are_refused(model, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hcot(model, **argument)
