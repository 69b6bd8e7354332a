"""A pushed checkpoint: what lies beside it, what a stranger runs, and what is refused before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from hcot_lmeval import PrunedGeneration
from hcot_lmeval.assets import resolve
from hcot_lmeval.push import HEADING, main

PROBLEM = "c=4*7;a=b-c;b=c+c;a?"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny-hcot"), folder)
    return folder


def test_a_stranger_generates_with_pruning(checkpoint, capsys):
    assert main([str(checkpoint)]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    given = {"input_ids": tokenizer(PROBLEM, return_tensors="pt")["input_ids"], "max_new_tokens": 200}
    pruned = PrunedGeneration(tokenizer, max_context=256)
    expected = model.generate(**given, custom_generate=pruned)
    theirs = {"custom_generate": str(checkpoint), "trust_remote_code": True, "max_context": 256}
    streamer = TextIteratorStreamer(tokenizer)
    found = model.generate(**given, **theirs, tokenizer=tokenizer, streamer=streamer, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.completions[0].statistics.prune_events > 2
    assert "".join(streamer) == tokenizer.decode(expected[0])
    assert torch.equal(model.generate(**given, **theirs), expected)


def test_a_card_is_kept_and_gets_its_section_once(checkpoint):
    card = checkpoint / "README.md"
    before = card.read_text()
    for _ in range(2):
        assert main([str(checkpoint)]) == 0
        after = card.read_text()
        assert after.startswith(before.rstrip()) and after.count(HEADING) == 1
        assert "trained under the policy `recompute`" in after
    card.unlink()
    assert main([str(checkpoint)]) == 0
    assert "C [THOUGHT] T [SOLUTION] S [RETURN] => C [THOUGHT] S [RETURN]" in card.read_text()


def test_what_stands_behind_the_section_stays(checkpoint):
    card = checkpoint / "README.md"
    main([str(checkpoint)])
    card.write_text(card.read_text() + "\n## Licence\n\nours\n")
    main([str(checkpoint)])
    assert card.read_text().endswith("## Licence\n\nours\n") and card.read_text().count(HEADING) == 1


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def other_markup(folder):
    config = json.loads((folder / "config.json").read_text())
    config["hcot"]["markup"] = "memento"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "options", "told"),
    [
        (no_weights, [], "has no weights (*.safetensors)"),
        (no_config, [], "is no folder with a config.json"),
        (other_markup, [], "<|block_start|>"),
        (None, ["--public"], "--public is of an upload; add --to OWNER/NAME"),
        (None, ["--to", "model"], "--to model is no repository of the hub; give OWNER/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_and_nothing_is_written(checkpoint, capsys, spoil, options, told):
    if spoil is not None:
        spoil(checkpoint)
    assert main([str(checkpoint), *options]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (checkpoint / "custom_generate").exists()


def test_an_upload_holds_the_model_and_no_more(checkpoint, monkeypatch, capsys):
    for name in (".cache/x", "checkpoint-5/model.safetensors", "custom_generate/__pycache__/generate.pyc"):
        path = checkpoint / name
        path.parent.mkdir(parents=True)
        path.write_text("x")
    calls = {}

    class Api:
        endpoint = "https://hub"

        def create_repo(self, name, **options):
            calls["made"] = name, options["private"]

        def create_commit(self, name, operations, **options):
            calls["files"] = {operation.path_in_repo for operation in operations}

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main([str(checkpoint), "--to", "someone/model", "--public"]) == 0
    assert calls["made"] == ("someone/model", False)
    kept = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "custom_generate/generate.py"}
    assert kept <= calls["files"] and not any("checkpoint-5" in name or "cache" in name for name in calls["files"])
    assert "https://hub/someone/model" in capsys.readouterr().out


def test_an_upload_that_fails_repeats_no_token(checkpoint, capsys, monkeypatch):
    class Api:
        def create_repo(self, name, **options):
            raise OSError("Bearer hf_secret is not valid")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main([str(checkpoint), "--to", "someone/model"]) == 1
    error = capsys.readouterr().err
    assert "the upload to someone/model failed (OSError, no response); log in with" in error and "secret" not in error
