"""The tokenizer of the tiny models knows every character of the synthetic problems."""

from __future__ import annotations

import itertools

import pytest
from transformers import AutoTokenizer

from hcot_lmeval.markup import PRESETS
from hcot_lmeval.synthetic import ALPHABET, TASKS, flat_trace, gold_trace
from hcot_lmeval.training.tiny import tiny_model, tiny_tokenizer
from hcot_lmeval.vocabulary import marker_ids
from tests.synthetic_traces import words


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("markup", PRESETS)
def test_a_token_is_a_character(task: str, markup: str) -> None:
    tokenizer = tiny_tokenizer(markup)
    for problem in itertools.islice(TASKS[task]("train", 0), 6):
        for text in (problem.prompt + gold_trace(problem, markup), problem.prompt + flat_trace(problem, markup)):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert tokenizer.convert_ids_to_tokens(ids) == words(text, markup)
            assert tokenizer.unk_token_id not in ids
        ids = tokenizer.encode(gold_trace(problem, markup))
        assert ids.count(marker_ids(tokenizer, markup).close) == problem.blocks


def test_a_saved_tokenizer_reads_the_same_tokens(tmp_path) -> None:
    """AutoTokenizer goes by the family of the model beside it, whose own rules know bytes and words."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_model(tokenizer).save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for task, text in itertools.product(TASKS, (gold_trace, flat_trace)):
        problem = next(TASKS[task]("train", 0))
        ids = tokenizer.encode(problem.prompt + text(problem))
        assert reloaded.encode(problem.prompt + text(problem)) == ids
        assert reloaded.decode(ids) == problem.prompt + text(problem)


@pytest.mark.parametrize("markup", PRESETS)
def test_the_vocabulary_is_small(markup: str) -> None:
    """128 rows hold it, which is what the embedding is padded to."""
    tokenizer = tiny_tokenizer(markup)
    assert len(ALPHABET) < len(tokenizer) <= 128
