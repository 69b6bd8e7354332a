"""What is exported is trained on as it is: the same text, form by form, a few steps, and generation by the engine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hcot_lmeval.files import find_inputs
from hcot_lmeval.markup import PRESETS
from hcot_lmeval.prepare.export import ExportOptions, export, exported, push
from hcot_lmeval.prepare.reading import read_prepared
from hcot_lmeval.prepare.rows import PreparedRow
from tests.prepare_files import flat_row, prepared

FORMATS = ("jsonl", "parquet")


def rows(count: int = 5, response: bool = True) -> list[PreparedRow]:
    records = [flat_row(number) for number in range(count)]
    if not response:
        for record in records:
            record["generated_solution"] = record["generated_solution"].partition("</think>")[0] + "</think>"
    return [prepared(record) for record in records]


def write(path, found, **options):
    ticks = []
    count, unread = export(found, path, ExportOptions(**options), lambda: ticks.append(1))
    assert count == len(found) == len(ticks) and not unread
    return path


@pytest.mark.parametrize("response", [True, False])
@pytest.mark.parametrize("form", ["columns", "chat"])
@pytest.mark.parametrize("format_", FORMATS)
def test_training_reads_every_form_as_the_same_text(tmp_path, format_, form, response):
    from hcot_lmeval.training.config import SourceConfig
    from hcot_lmeval.training.data.sources import load_source
    from hcot_lmeval.training.data.text import TextForm
    from tests.tiny import tiny_tokenizer

    found = rows(response=response)
    path = write(tmp_path / f"train.{format_}", found, form=form)
    text = TextForm(tiny_tokenizer(), PRESETS["hcot"])
    loaded = load_source(SourceConfig(path=str(path)))
    assert len(loaded) == len(found)
    for read, row in zip(loaded, found, strict=True):
        prompt = text.prompt_text(read)
        assert prompt == text.prompt_text({"messages": None, "question": row.source.question})
        end = row.source.response or f"\n\n\\boxed{{{row.source.answer}}}"
        assert text.completion_text(read["trace"], read["answer"], prompt) == f"<think>{row.trace}</think>{end}"
        assert read["answer"] == row.source.answer


def test_extra_columns_lead_back_to_the_row(tmp_path):
    extras = ("original", "outline", "sentences", "made_by", "meta")
    for format_ in FORMATS:
        path = write(tmp_path / f"all.{format_}", rows(), format=format_, extras=extras)
        assert list(read_prepared(find_inputs([path]))) == rows()


def test_parquet_is_written_a_row_group_at_a_time(tmp_path, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setattr("hcot_lmeval.prepare.export.BATCH", 2)
    file = pyarrow.parquet.ParquetFile(write(tmp_path / "a.parquet", rows(5)))
    assert file.num_row_groups == 3
    assert file.read().to_pylist() == [exported(row, ExportOptions()) for row in rows(5)]


def test_an_export_is_whole_or_not_there(tmp_path):
    def torn():
        yield rows(1)[0]
        raise RuntimeError("killed")

    for format_ in FORMATS:
        path = write(tmp_path / f"a.{format_}", rows(2))
        before = path.read_bytes()
        with pytest.raises(RuntimeError):
            export(torn(), path, ExportOptions())
        assert path.read_bytes() == before
        with pytest.raises(ValueError, match="there is no row to export: the files hold none"):
            export([], path, ExportOptions())
    names = ["a.jsonl", "a.jsonl.manifest.json", "a.parquet", "a.parquet.manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("format_", FORMATS)
def test_a_row_that_no_file_can_hold_is_named(tmp_path, format_):
    good, other = rows(2)
    bad = replace(other, source=replace(other.source, question="lone \ud83d half"))
    with pytest.raises(ValueError, match=r"row 2 \(id 'row-1'\) cannot be written: half of a character in question"):
        write(tmp_path / f"a.{format_}", [good, bad])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl.gz", "a.JSONL", "a"])
def test_a_file_is_called_as_what_it_holds(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: let the name of what is exported end with .jsonl or .parquet"):
        write(tmp_path / name, rows(1))
    with pytest.raises(ValueError, match=rf"{name}: let the name of what is exported end with .parquet"):
        write(tmp_path / name, rows(1), format="parquet")


def test_options_name_what_is_allowed():
    with pytest.raises(ValueError, match="Input should be 'original', 'outline'"):
        ExportOptions(extras=("x",))
    with pytest.raises(ValueError, match="Input should be 'jsonl' or 'parquet'"):
        ExportOptions(format="csv")
    for name in ("name", "/name", "a/b/c"):
        with pytest.raises(ValueError, match="is no data set on the hub; give owner/name"):
            ExportOptions(push=name)
    with pytest.raises(ValueError, match="public is of an upload"):
        ExportOptions(public=True)


@pytest.mark.parametrize("public", [False, True])
def test_pushes_the_file_and_a_card_in_one_commit(tmp_path, monkeypatch, public):
    import yaml
    from huggingface_hub import HfApi

    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *names, **options: calls.append((names, options)))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, *given, **options: calls.append((given, options)))
    path = write(tmp_path / "train.parquet", rows(3))
    history = [{"step": "segment", "identity": {"arguments": {}}, "versions": {}, "summary": {}, "state": "done"}]
    told = push(path, 3, ExportOptions(push="me/traces", public=public), history)
    assert told.endswith("/datasets/me/traces")
    (names, made), ((name, operations), committed) = calls
    assert (names, name) == (("me/traces",), "me/traces")
    assert made == {"repo_type": "dataset", "private": not public, "exist_ok": True}
    assert committed["repo_type"] == "dataset"
    files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
    assert files["train.parquet"] == str(path) and files["train.parquet.manifest.json"].endswith(".manifest.json")
    _, head, text = files["README.md"].decode().split("---\n")
    assert yaml.safe_load(head)["configs"][0]["data_files"] == [{"split": "train", "path": "train.parquet"}]
    assert "3 chains of thought" in text and '"segment"' in text and "hierarchical_cot" in text


def test_a_refusal_of_the_hub_tells_no_token(tmp_path, monkeypatch):
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(self, *names, **options):
        request = httpx.Request("POST", "https://hub", headers={"authorization": "Bearer hf_secret"})
        raise HfHubHTTPError("401 hf_secret", response=httpx.Response(401, request=request))

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"to me/traces failed \(HfHubHTTPError, 401\); log in") as caught:
        push(write(tmp_path / "a.jsonl", rows(1)), 1, ExportOptions(push="me/traces"))
    assert "secret" not in str(caught.value)


def test_a_few_steps_of_training_and_generation_by_the_engine(tmp_path):
    """From flat rows to a model that runs: the script of training on the file as it was exported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hcot_lmeval.engine import Engine, Request, SamplingParams
    from hcot_lmeval.record import read_record
    from hcot_lmeval.tokens import encode_prompt
    from hcot_lmeval.training.config import load_config
    from hcot_lmeval.training.sft import train
    from tests.tiny import tiny_model, tiny_tokenizer

    records = [flat_row(number, sentences=15) for number in range(9)]
    paths = [
        write(tmp_path / f"{name}.jsonl", [prepared(record) for record in part])
        for name, part in (("train", records[:6]), ("held-out", records[6:]))
    ]
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    settings = {
        "model": str(tmp_path / "base"),
        "output": str(tmp_path / "run"),
        "data": {
            "train": [{"path": str(paths[0])}],
            "held_out": [{"path": str(paths[1])}],
            "row_length": 2048,
            "too_long": "drop",
        },
        "phases": [{"policy": "recompute", "steps": 3}],
        "evaluation": {"every": 3, "problems": 1, "max_context": 256, "max_gen_toks": 8},
        "trainer": {"per_device_train_batch_size": 1, "logging_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    train(load_config(tmp_path / "config.yaml", []), restart=False, command="test")
    assert (tmp_path / "run" / "rejected.jsonl").read_text() == ""  # every row was trained on
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert read_record(model.config) is not None
    prompt = encode_prompt(tokenizer, "What is 1 + 0?")
    engine = Engine(model, tokenizer, policy="recompute", max_context=256)
    (done,) = engine.stream([Request("1", tuple(prompt), SamplingParams(max_gen_toks=24, temperature=1.0, seed=1))])
    assert 1 <= done.statistics.generated_tokens <= 24
