"""What a grid may say, the cells it has, and the folders that they are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hcot_lmeval import provenance
from hcot_lmeval.report.folder import CellFolder, arguments, is_complete
from hcot_lmeval.report.grid import GridConfig
from hcot_lmeval.report.results import ResultsError
from hcot_lmeval.settings import describe_settings, parse_settings
from tests.result_files import build_run

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"models": ["tiny-hcot"], "windows": [64, 128], "tasks": ["toy"]}


def grid(**settings: Any) -> GridConfig:
    return parse_settings(GridConfig, {"models": ["tiny-hcot"], "tasks": ["toy"], **settings})


def folders(out: Path, **settings: Any) -> list[CellFolder]:
    return [CellFolder(out, cell) for cell in grid(**SMALL | settings).cells]


# --- what a grid may say ----------------------------------------------------------------------------------------------


def names(**settings: Any) -> list[str]:
    return [cell.name for cell in grid(**settings).cells]


OWN = {"pretrained": "tiny-hcot", "name": "a", "policies": ["off"], "windows": [32]}
USUAL = [f"tiny-hcot, {policy}, {n}" for policy in ("off", "recompute") for n in (1024, 2048, 4096)]
CELLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "the usual windows that the model has positions for": ({}, USUAL),
    "a window beyond them": ({"windows": [8192], "policies": ["off"]}, ["tiny-hcot, off, 8192"]),
    "as trained": ({"models": ["tiny-evict"], "windows": [64]}, ["tiny-evict, off, 64", "tiny-evict, evict, 64"]),
    "trained for off": ({"models": ["tiny-flat"], "windows": [64]}, ["tiny-flat, off, 64"]),
    "no record": (
        {"models": ["org/nobody"], "policies": ["trained"]},
        [f"nobody, recompute, {n}" for n in (1024, 2048, 4096, 8192)],
    ),
    "one seed": ({"windows": [64], "policies": ["off"], "seeds": [3]}, ["tiny-hcot, off, 64"]),
    "several seeds": (
        {"windows": [64], "policies": ["off"], "seeds": [0, 3]},
        ["tiny-hcot, off, 64, seed 0", "tiny-hcot, off, 64, seed 3"],
    ),
    "a model's own": ({"models": [OWN, "tiny-flat"], "windows": [64]}, ["a, off, 32", "tiny-flat, off, 64"]),
    "repeated values": (
        {"windows": [64, 64], "policies": ["off", "off"], "seeds": [1, 1], "tasks": ["a", "a"]},
        ["tiny-hcot, off, 64, seed 1"],
    ),
    "another model": ({"models": ["base=hf:org/model"]}, ["base"]),
}


@pytest.mark.parametrize(("settings", "cells"), CELLS.values(), ids=CELLS)
def test_cells_of_a_grid(settings, cells, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert names(**settings) == cells


def test_bare_off_of_yaml_is_the_policy():
    assert yaml.safe_load("[off]") == [False]
    assert grid(policies=[False]).policies == ["off"]


def test_model_arguments_of_a_cell():
    windowed = {"name": "base", "model": "vllm", "pretrained": "org/model", "window_argument": "max_model_len"}
    cells = grid(models=[windowed | {"seed_argument": "seed"}], windows=[64, 128], seeds=[5]).cells
    assert [cell.name for cell in cells] == ["base, 64", "base, 128"]
    assert cells[0].model_args == {"pretrained": "org/model", "max_model_len": 64, "seed": 5}
    assert cells[0].seeds == "0,1234,5,1234"
    [bundled] = grid(models=["hf:tiny-flat"]).cells
    assert (bundled.name, Path(bundled.model_args["pretrained"], "config.json").is_file()) == ("tiny-flat", True)
    assert [cell.model_args["seed"] for cell in grid(windows=[64], policies=["off"], seeds=[0, 3]).cells] == [0, 3]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"windows": [1024, 32768]}, None),
        ({"windows": [1024, 65536]}, 65536),
        ({"windows": [65536]} | {"model_args": {"max_gen_toks": 9}}, 9),
    ],
)
def test_windows_beyond_the_usual_budget_share_one_default_limit(settings, limit):
    """Or runs at 1024 and at 65536 live tokens would have different budgets, and could not be compared."""
    assert {cell.model_args.get("max_gen_toks") for cell in grid(**settings).cells} == {limit}


WRONG = {
    "an unknown key": ({"window": [1]}, "window is unknown; did you mean windows? Known here: models, policies"),
    "an unknown key of a model": (
        {"models": [{"pretraind": "a"}]},
        "models.0.pretraind is unknown; did you mean pretrained?",
    ),
    "no models": ({"models": []}, "models: List should have at least 1 item"),
    "no name": ({"models": [{"model": "hf"}]}, "give pretrained, the checkpoint"),
    "a bad word": ({"models": ["a=b=c"]}, "'a=b=c' is not of the form [NAME=][TYPE:]CHECKPOINT"),
    "a bad policy": ({"policies": ["prune"]}, "policies.0: Input should be 'off', 'trained', 'recompute' or 'evict'"),
    "a bad window": ({"windows": [0]}, "windows.0: Input should be greater than 0 (given: 0)"),
    "two models of a name": ({"models": ["a/x", "b/x"]}, "two models are called x; give each a name of its own"),
    "policies of hf": ({"models": [{"model": "hf", "pretrained": "a", "policies": ["off"]}]}, "hf has none"),
    "windows of hf": (
        {"models": [{"model": "hf", "pretrained": "a", "windows": [1]}]},
        "say by window_argument how hf",
    ),
    "a window argument of hcot": ({"models": [{"pretrained": "a", "window_argument": "x"}]}, "hcot takes windows"),
    "an argument of the grid": ({"model_args": {"pruning": "off"}}, "model_args holds pruning"),
    "the same for a model": (
        {"models": [{"pretrained": "a", "model_args": {"seed": 1}}]},
        "model_args of a holds seed",
    ),
    "an option of the runner": ({"lm_eval_args": ["--limit=3"]}, "lm_eval_args holds --limit=3, which the grid's own"),
    "half a document": ({"limit": 1.5}, "limit=1.5 is neither a number of documents nor, below 1, a share"),
    "no folder": ({"include_path": "/none"}, "include_path=/none is no folder"),
}


@pytest.mark.parametrize(("settings", "told"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_named(settings, told):
    with pytest.raises(ValueError) as caught:
        grid(**settings)
    assert told in str(caught.value)


def test_every_key_is_described():
    lines = list(describe_settings(GridConfig))
    assert len(lines) == len(GridConfig.model_fields) - 1 + len(type(grid().models[0]).model_fields)
    assert all(line.split()[1] for line in lines)


def test_shipped_grid_is_a_grid():
    shipped = parse_settings(GridConfig, yaml.safe_load((ROOT / "scripts/configs/compare-demo.yaml").read_text()))
    kinds = ("tiny-flat, off", "tiny-hcot, off", "tiny-hcot, recompute")
    assert [cell.name for cell in shipped.cells] == [
        f"{kind}, {window}" for kind in kinds for window in (128, 256, 768)
    ]


# --- settings and folders ---------------------------------------------------------------------------------------------


def test_folder_is_readable_and_follows_from_the_settings(tmp_path):
    [one, other] = folders(tmp_path, policies=["off"])
    assert one.path == folders(tmp_path, policies=["off"], notes=False)[0].path
    assert one.path.name.startswith("toy--tiny-hcot--off--64--")
    assert one.path == folders(tmp_path, policies=["off"])[0].path
    assert other.path.name.rpartition("--")[2] != one.path.name.rpartition("--")[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"limit": 2},
        {"batch_size": 4},
        {"device": "cpu"},
        {"gen_kwargs": {"temperature": 1}},
        {"model_args": {"dtype": "bfloat16"}},
        {"apply_chat_template": True},
        {"seeds": [1]},
        {"include_path": str(ROOT / "tasks" / "synthetic")},
        {"lm_eval_args": ["--num_fewshot", "4"]},
        {"models": [{"name": "tiny-hcot", "pretrained": "tiny-evict"}], "policies": ["off"]},
    ],
)
def test_what_determines_the_result_is_in_the_settings(tmp_path, settings):
    plain, changed = (folders(tmp_path, **given)[0] for given in ({}, settings))
    assert plain.settings != changed.settings
    assert plain.path != changed.path


def test_versions_code_checkpoint_and_environment_are_in_the_settings(tmp_path, monkeypatch):
    def settings() -> dict[str, Any]:
        return folders(tmp_path, models=[{"name": "m", "pretrained": str(tmp_path / "model")}])[0].settings

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    seen = [settings()]
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    seen.append(settings())
    monkeypatch.setenv("HCOT_LMEVAL_DATA", "/data")
    seen.append(settings())
    monkeypatch.setattr(provenance, "version", lambda name: "9.9")
    seen.append(settings())
    monkeypatch.setattr(provenance, "code_digest", lambda: "other")
    seen.append(settings())
    assert len({json.dumps(one, sort_keys=True) for one in seen}) == 5


def test_code_that_takes_part_counts_and_no_other():
    assert provenance.code_digest() == provenance.code_digest()
    names = {path.relative_to(ROOT).as_posix() for path in provenance.code_files()}
    assert {"hcot_lmeval/trace.py", "hcot_lmeval/engine/engine.py", "tasks/synthetic/hcot_arith.yaml"} <= names
    assert {"hcot_lmeval/scoring/instructions.json", "hcot_lmeval/templates/plain.jinja"} <= names
    assert not any(name.startswith(("hcot_lmeval/report/", "hcot_lmeval/training/", "tests/")) for name in names)


@pytest.mark.parametrize("name", ["HCOT_LMEVAL_DATA", "HCOT_LMEVAL_INSTRUCTIONS"])
def test_data_and_instructions_count_by_content(tmp_path, monkeypatch, name):
    place = tmp_path / "place"
    if name == "HCOT_LMEVAL_DATA":
        place.mkdir()
    file = place / "rows.parquet" if place.is_dir() else place
    file.write_text("one")
    monkeypatch.setenv(name, str(place))
    before = folders(tmp_path)[0].settings
    file.write_text("two")
    assert folders(tmp_path)[0].settings != before


def test_a_checkpoint_that_changes_while_the_grid_runs_is_noticed(tmp_path):
    (tmp_path / "model").mkdir()
    config = tmp_path / "model" / "config.json"
    config.write_text("{}")
    folder = folders(tmp_path, models=[str(tmp_path / "model")])[0]
    assert folder.path
    config.write_text('{"a": 1}')
    with pytest.raises(ResultsError, match="checkpoints changed since the grid was planned; start it again"):
        folder.prepare()


def test_the_adapter_of_the_whole_grid_says_what_it_was_trained_for(tmp_path):
    args = {"models": ["tiny-flat"], "policies": ["trained"]}
    own = {"models": [{"pretrained": "tiny-flat", "model_args": {"peft": "tiny-evict"}}], "policies": ["trained"]}
    for settings in (own, {**args, "model_args": {"peft": "tiny-evict"}}):
        assert {folder.cell.policy for folder in folders(tmp_path, **settings)} == {"evict"}


def test_folder_of_tasks_counts_by_its_files(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.yaml").write_text("task: a")
    before = folders(tmp_path, include_path=str(tmp_path / "t"))[0].settings
    (tmp_path / "t" / "a.yaml").write_text("task: b")
    assert folders(tmp_path, include_path=str(tmp_path / "t"))[0].settings != before


def test_command(tmp_path):
    settings = {"policies": ["off"], "limit": 100, "device": "cpu", "gen_kwargs": {"temperature": 0.6}, "batch_size": 8}
    folder = folders(tmp_path, apply_chat_template=True, lm_eval_args=["--num_fewshot", "2"], **settings)[0]
    command = folder.command(["lm_eval"])
    options = dict(zip(command[1::2], command[2::2], strict=False))
    assert options["--model"] == "hcot"
    assert options["--model_args"].startswith("pretrained=tiny-hcot,pruning=off,max_context=64,seed=0,journal=")
    assert options["--limit"] == "100"
    assert options["--gen_kwargs"] == "temperature=0.6"
    assert options["--output_path"] == str(folder.unfinished)
    assert command[-4:] == ["--apply_chat_template", "--log_samples", "--num_fewshot", "2"]


@pytest.mark.parametrize(
    "values",
    [
        {"pretrained": "/a/b-1.5B", "max_context": 128, "x": 0.5, "flag": True},
        {"name": "1.5", "other": "true"},
        {"path": "a folder, with commas=and"},
        {"chat_template_args": {"reasoning": "low"}, "none": None, "list": ["\n\n"]},
    ],
)
def test_arguments_are_read_back_as_they_were(values):
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    text = arguments(values)
    parsed = try_parse_json(text)
    assert (parsed if isinstance(parsed, dict) else key_val_to_dict(text)) == values


def test_is_complete(tmp_path):
    assert not is_complete(tmp_path)
    results = build_run(tmp_path, [1, 0, 1])
    [samples] = tmp_path.rglob("samples_*")
    lines = samples.read_text()
    assert is_complete(tmp_path)
    for broken in (lines[:-20], lines.partition("\n")[0] + "\n", ""):
        samples.write_text(broken)
        assert not is_complete(tmp_path)
    samples.write_text(lines)
    results.write_text(results.read_text()[:-3])
    assert not is_complete(tmp_path)
