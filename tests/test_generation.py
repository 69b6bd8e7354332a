"""`model.generate` with pruning: the engine's tokens, transformers' where nothing prunes, and no wish passed over."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
)

from hcot_lmeval import NoteTaker, PrunedGeneration, generate
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.notes import NotesFile
from hcot_lmeval.tokens import encode_prompt
from tests.test_bundled import load

PROBLEMS = ["c=4*7;a=b-c;b=c+c;a?", "a=1+1;a?", "b=2*3;a=b+b;a?"]


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load("tiny-hcot")
    tokenizer.padding_side = "left"
    return model.double(), tokenizer


def inputs(tokenizer, texts):
    return {
        name: value
        for name, value in tokenizer(texts, return_tensors="pt", padding=True).items()
        if name in ("input_ids", "attention_mask")
    }


def test_tokens_are_those_of_the_engine_at_every_batch(loaded, tmp_path):
    model, tokenizer = loaded
    with NoteTaker(tmp_path / "notes.jsonl") as notes:
        pruned = PrunedGeneration(tokenizer, note_taker=notes, max_context=256)
        given = inputs(tokenizer, PROBLEMS)
        found = model.generate(**given, custom_generate=pruned, max_new_tokens=100, return_dict_in_generate=True)
    requests = [
        Request(str(n), tuple(encode_prompt(tokenizer, text)), SamplingParams(max_gen_toks=100))
        for n, text in enumerate(PROBLEMS)
    ]
    expected = Engine(model, tokenizer, max_context=256).generate(requests)
    width = given["input_ids"].shape[1]
    for row, done, twin in zip(found.sequences, found.completions, expected, strict=True):
        assert done.token_ids == twin.token_ids and done.live_ids == twin.live_ids
        assert tuple(row[width : width + len(twin.token_ids)].tolist()) == twin.token_ids
        assert set(row[width + len(twin.token_ids) :].tolist()) <= {tokenizer.pad_token_id}
    assert sum(done.statistics.prune_events for done in found.completions) > 5
    assert len(list(NotesFile(tmp_path / "notes.jsonl"))) == len(PROBLEMS)
    pruned = PrunedGeneration(tokenizer, max_context=256)
    alone = model.generate(**inputs(tokenizer, PROBLEMS[:1]), custom_generate=pruned, max_new_tokens=100)
    assert alone[0].tolist() == [*requests[0].prompt_ids, *expected[0].token_ids]


@pytest.mark.parametrize(
    "config",
    [
        {"max_new_tokens": 12},
        {"max_length": 30},
        {"max_new_tokens": 12, "min_new_tokens": 10},
        {"max_new_tokens": 12, "repetition_penalty": 1.3},
        {"max_new_tokens": 12, "eos_token_id": [1, 20, 21]},
        {"max_new_tokens": 12, "eos_token_id": torch.tensor([3, 4])},
        {"max_new_tokens": 9, "num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_without_pruning_the_tokens_are_those_of_generate(loaded, config):
    model, tokenizer = loaded
    given = inputs(tokenizer, PROBLEMS)
    pruned = PrunedGeneration(tokenizer, policy="off")
    expected = model.generate(**given, **config)
    assert torch.equal(model.generate(**given, **config, custom_generate=pruned), expected)


def test_samples_have_the_distribution_of_generate_and_the_seed_of_torch(loaded):
    model, tokenizer = loaded
    given = inputs(tokenizer, ["a=1+1;a?"])
    pruned = PrunedGeneration(tokenizer, policy="off", max_slots=256)
    config = {"do_sample": True, "temperature": 30.0, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "max_new_tokens": 1}
    config |= {"num_return_sequences": 4000}

    def shares(**how):
        torch.manual_seed(1)
        drawn = model.generate(**given, **config, **how)[:, -1]
        return torch.bincount(drawn, minlength=64) / len(drawn), drawn

    ours, drawn = shares(custom_generate=pruned)
    theirs, _ = shares()
    assert (ours > 0).sum() > 1
    assert (ours - theirs).abs().max() < 5 * (0.25 / 4000 * 2) ** 0.5
    assert torch.equal(shares(custom_generate=pruned)[1], drawn)


class Bias(LogitsProcessor):
    pass


class Own(TemperatureLogitsWarper):
    pass


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        ({"logits_processor": [Bias()]}, "Bias"),
        ({"logits_processor": [Own(1.0)]}, "Own"),
        ({"logits_processor": [RepetitionPenaltyLogitsProcessor(50.0)]}, "RepetitionPenaltyLogitsProcessor"),
        ({"logits_processor": [TopKLogitsWarper(1)], "do_sample": True}, "TopKLogitsWarper"),
        ({"stopping_criteria": [MaxLengthCriteria(21)]}, "MaxLengthCriteria"),
        ({"stopping_criteria": [EosTokenCriteria(37)]}, "EosTokenCriteria"),
        ({"position_ids": 3 * torch.arange(20)[None]}, "position_ids"),
        ({"attention_mask": torch.arange(20)[None]}, "attention_mask"),
        ({"stopping_criteria": [MaxTimeCriteria(1.0)]}, "MaxTimeCriteria"),
        ({"num_beams": 3}, "beam search"),
        ({"typical_p": 0.5, "do_sample": True}, "TypicalLogitsWarper"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_engine_does_not_do_is_refused_by_name(loaded, wish, name):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=f"pruned generation has no .*{name}"):
        model.generate(
            **{**inputs(tokenizer, PROBLEMS[:1]), **wish}, custom_generate=PrunedGeneration(tokenizer), max_new_tokens=3
        )


def test_stop_strings_end_a_row_in_its_answer(loaded):
    model, tokenizer = loaded
    pruned = PrunedGeneration(tokenizer, stop_strings="boxed")
    config = GenerationConfig(max_new_tokens=100, return_dict_in_generate=True, eos_token_id=1, pad_token_id=0)
    found = model.generate(**inputs(tokenizer, PROBLEMS[:1]), generation_config=config, custom_generate=pruned)
    [done] = found.completions
    assert (done.finish_reason, done.stop) == ("stop", "boxed") and "c+c" in done.text


def test_an_engine_serves_until_the_model_or_its_ends_change(loaded):
    model, tokenizer = loaded
    pruned = PrunedGeneration(tokenizer)
    ends = frozenset({1})
    assert pruned.engine(model, ends) is pruned.engine(model, ends)
    assert pruned.engine(model, ends) is not pruned.engine(model, frozenset({1, 2}))
    other, _ = load("tiny-hcot")
    assert pruned.engine(other, ends).decoder.model is other


def test_one_call_does_all_and_streams(loaded, tmp_path):
    model, tokenizer = loaded
    given = inputs(tokenizer, PROBLEMS[:1])
    pruned = PrunedGeneration(tokenizer, max_context=256)
    expected = model.generate(**given, custom_generate=pruned, max_new_tokens=100)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    with NoteTaker(tmp_path / "notes.jsonl") as notes:
        found = generate(
            model,
            **given,
            tokenizer=tokenizer,
            note_taker=notes,
            streamer=streamer,
            max_context=256,
            max_new_tokens=100,
        )
    assert torch.equal(found, expected)
    assert "".join(streamer) == tokenizer.decode(expected[0, given["input_ids"].shape[1] :])
    assert len(list(NotesFile(tmp_path / "notes.jsonl"))) == 1
    assert torch.equal(generate(model, given["input_ids"], max_new_tokens=100), expected)  # the checkpoint's tokenizer
    with pytest.raises(ValueError, match="a streamer is for a single row, and there are 3"):
        generate(model, **inputs(tokenizer, PROBLEMS), tokenizer=tokenizer, streamer=streamer, max_new_tokens=3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"tokenizer": "tiny-hcot"}, "tokenizer='tiny-hcot' is no tokenizer"),
        ({"note_taker": "notes.jsonl"}, "note_taker='notes.jsonl' has no method add"),
        ({"streamer": print}, "has no method put"),
        ({"stop_strings": 3}, "stop_strings=3 is neither a text nor texts"),
        ({"stop_strings": ["a", 3]}, "is neither a text nor texts"),
        ({"assistant_model": 1}, "pruned generation has no assistant_model"),
        ({"inputs": torch.zeros(0, 5, dtype=torch.int64)}, "input_ids holds no token"),
        ({"inputs": torch.tensor([5, 6])}, "input_ids is a tensor of torch.int64 [2]"),
        ({"inputs": torch.tensor([[5.0, 6.0]])}, "input_ids is a tensor of torch.float32 [1, 2]"),
        ({"inputs": torch.tensor([[5, -1]])}, "input_ids has ids from -1 to 5; the model knows the ids 0.."),
        ({"inputs": [[5, 6]]}, "input_ids is list [[5, 6]]; give a tensor"),
        ({"cache_implementation": "static"}, "no cache_implementation='static'; leave it out"),
        ({"prefill_chunk_size": 4}, "no prefill_chunk_size=4; leave it out"),
        ({"closing_tokens": 4}, "closing_tokens=4 does nothing without force_answer"),
        ({"run_ahead": 4}, "run_ahead=4 is of the device's loop and does nothing on the CPU"),
        ({"max_contxt": 3}, "max_contxt"),
        ({"policy": "evict"}, "trained under policy recompute"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_argument_is_said_at_once(loaded, arguments, told):
    model, tokenizer = loaded
    given = {"tokenizer": tokenizer, "inputs": torch.tensor([[5, 6]]), "max_new_tokens": 3, **arguments}
    with pytest.raises((TypeError, ValueError), match=re.escape(told)):
        generate(model, given.pop("inputs"), **given)


def test_a_model_from_nowhere_needs_a_tokenizer(loaded):
    model, _ = load("tiny-hcot")
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ValueError, match="pass its tokenizer="):
        generate(model, torch.tensor([[5, 6]]), max_new_tokens=3)
