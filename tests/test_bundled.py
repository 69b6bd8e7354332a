"""The bundled checkpoints do what their cards say."""

from __future__ import annotations

import itertools
import re

import picture
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval.assets import BUNDLED, ROOT, resolve
from hcot_lmeval.engine import Engine
from hcot_lmeval.record import read_record
from hcot_lmeval.synthetic import problems
from hcot_lmeval.tokens import encode_prompt
from hcot_lmeval.training.evaluation import free_run

POLICIES = {"tiny-hcot": "recompute", "tiny-evict": "evict", "tiny-flat": "off"}
CONTEXT = 128
"""Live tokens; the flat traces of the problems below have about 250 tokens."""


def load(name: str):
    path = resolve(name)
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def metrics(name: str, policy: str, context: int = CONTEXT, count: int = 24) -> dict[str, float]:
    model, tokenizer = load(name)
    chosen = itertools.islice(problems("test", [5], seed=1), count)
    asked = [(encode_prompt(tokenizer, problem.prompt), problem.answer) for problem in chosen]
    limits = {"max_context": context, "max_gen_toks": 1000, "batch_size": count}
    return free_run(model, tokenizer, asked, policy=policy, markup="hcot", **limits).metrics


@pytest.mark.parametrize("name", BUNDLED)
def test_is_small_and_says_where_it_comes_from(name) -> None:
    assert sum(file.stat().st_size for file in (ROOT / name).iterdir()) <= 8e6
    card = (ROOT / name / "README.md").read_text()
    record = read_record(ROOT / name)
    assert record.policy == POLICIES[name]
    assert record.command == f"python scripts/train.py sft scripts/configs/{name}.yaml"
    assert record.command in card and f"pretrained={name}" in card and record.data_hash in card
    assert (ROOT / name / "curves.png").is_file()


@pytest.mark.parametrize("name", ["tiny-hcot", "tiny-evict"])
def test_solves_what_does_not_fit_into_its_window(name) -> None:
    found = metrics(name, POLICIES[name])
    assert found["accuracy"] >= 22 / 24
    assert found["illegal_traces"] == 0
    assert found["generated_tokens"] > 1.5 * CONTEXT and found["peak_live_tokens"] <= CONTEXT
    assert found["pruned_share"] > 0.9


@pytest.mark.parametrize("name", ["tiny-hcot", "tiny-flat"])
def test_without_pruning_the_window_is_too_small(name) -> None:
    assert metrics(name, "off")["accuracy"] <= 2 / 24


def test_the_flat_twin_can_use_room() -> None:
    assert metrics("tiny-flat", "off", context=1024)["completion"] > 0.8


def test_the_other_policy_is_refused() -> None:
    model, tokenizer = load("tiny-evict")
    with pytest.raises(ValueError, match="trained under policy evict"):
        Engine(model, tokenizer, policy="recompute")


def test_the_picture_of_a_trace_is_what_the_bundled_model_writes() -> None:
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(picture.write_trace()), "run scripts/picture.py"


def test_an_engine_loads_a_checkpoint_by_name() -> None:
    engine = Engine.from_pretrained("tiny-hcot", dtype="float64", max_context=99)
    assert (engine.policy.value, engine.limits.context, engine.decoder.model.dtype) == ("recompute", 99, torch.float64)
    prompt = "a=[THOUGHT];a?"
    assert engine.encode(prompt) == tuple(encode_prompt(engine.tokenizer, prompt))
    assert engine.markers is not None and engine.markers.open not in engine.encode(prompt)


SNIPPETS = re.findall(r"```python\n(.*?)```", (picture.ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_readme_runs_as_it_stands(snippet: str) -> None:
    """With a bundled model and its problems, which need no download."""
    code = snippet.replace("MODEL", resolve("tiny-hcot")).replace(
        'tasks=["aime24_boxed"]', 'tasks=["hcot_arith"], limit=1'
    )
    exec(code, {})
