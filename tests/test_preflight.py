"""What is said of a grid before its first cell runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hcot_lmeval.provenance import tasks_folder
from hcot_lmeval.report import preflight
from hcot_lmeval.report.grid import GridConfig
from hcot_lmeval.report.preflight import check_cells, known_tasks
from hcot_lmeval.settings import parse_settings


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Ours are indexed in truth; lm-eval's own, which take seconds, are one. Yields whether they were asked for."""
    calls: list[bool] = []

    def known(folders: list[Path], *, usual: bool) -> set[str]:
        calls.append(usual)
        return known_tasks(folders, usual=False) | ({"arc_easy"} if usual else set())

    monkeypatch.setattr(preflight, "known_tasks", known)
    return calls


def faults(**settings: Any) -> str:
    grid = {"models": ["tiny-hcot"], "windows": [64], "tasks": ["hcot_arith"], **settings}
    try:
        check_cells(parse_settings(GridConfig, grid).cells)
    except ValueError as error:
        return str(error)
    return ""


def test_nothing_is_said_of_a_grid_that_can_run(asked: list[bool], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert (
        faults(models=["tiny-hcot", "hf:tiny-flat", str(tmp_path)], tasks=["hcot_arith", "polymath,polymath_en"]) == ""
    )
    assert asked == [False]
    assert faults(tasks=["arc_easy", "polymath_*", str(tmp_path)]) == ""
    assert asked == [False, False, True]
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\n")
    assert faults(tasks=["mine"], include_path=str(tmp_path)) == ""


@pytest.mark.parametrize("name", ["tiny-hcott", "hf:tiny-hcott", "/nowhere/tiny-hcott", "org/tiny-hcott", "."])
def test_checkpoint_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = faults(models=[name], policies=["off", "trained"])
    start = (
        f"the grid cannot be run: {name.removeprefix('hf:')} is neither a directory with a config.json, nor a bundled"
    )
    assert said.startswith(start)
    assert said.endswith("did you mean tiny-hcot?") == ("tiny" in name)


def test_models_that_need_no_config_are_left_to_their_cells() -> None:
    gguf = {"name": "g", "pretrained": "org/g", "model_args": {"gguf_file": "g.gguf"}}
    assert faults(models=[gguf, "vllm:org/m", {"name": "api", "model": "local-completions"}]) == ""


def test_policy_that_the_model_was_not_trained_for() -> None:
    said = faults(policies=["off", "evict"])
    assert "tiny-hcot: policies=evict, but the model was trained under policy recompute" in said
    assert "\n" not in said
    assert faults(policies=["evict"], model_args={"any_policy": True}) == ""
    assert "the notation hcot" in faults(policies=["recompute"], model_args={"markup": "pencil"})


def test_model_that_lm_eval_does_not_have() -> None:
    assert "lm-eval has no model vlm; did you mean vllm?" in faults(models=["vlm:org/m"])
    assert "lm-eval has no model xyzzy; it has anthropic" in faults(models=["xyzzy:org/m"])


@pytest.mark.parametrize("kwargs", [{"temprature": 1.0}, {"top_k": 1.5}, {"do_sample": True, "temperature": 0}])
def test_generation_kwargs_are_read_as_the_run_reads_them(kwargs: dict[str, Any]) -> None:
    assert "gen_kwargs: " in faults(gen_kwargs=kwargs)
    assert faults(gen_kwargs=kwargs, models=["hf:tiny-flat"]) == ""
    assert faults(gen_kwargs={"max_gen_toks": 99, "top_p": 0.9}) == ""


def test_adapter_brings_its_own_policy(tmp_path: Path) -> None:
    record = {"policy": "evict", "markup": "hcot"}
    (tmp_path / "hcot_training.json").write_text(json.dumps(record))
    assert faults(policies=["evict"], model_args={"peft": str(tmp_path)}) == ""
    assert "trained under policy evict" in faults(policies=["recompute"], model_args={"peft": str(tmp_path)})


def test_every_fault_is_said_once() -> None:
    settings: dict[str, Any] = {"windows": [64, 128], "seeds": [0, 1], "policies": ["off", "evict"]}
    lines = faults(models=["tiny-hcot", "nobody"], tasks=["hcot_aritth", "xyzzy"], **settings).splitlines()
    assert lines[0] == "the grid cannot be run:"
    assert [line.split()[0] for line in lines[1:]] == ["nobody", "tiny-hcot:", "there", "there"]
    assert lines[3] == "  there is no task hcot_aritth; did you mean hcot_arith?"
    assert lines[4] == "  there is no task xyzzy; `lm_eval ls tasks` lists them"


def test_our_tasks_lie_where_they_are_looked_for() -> None:
    folder = tasks_folder()
    assert folder is not None and {"aime24", "polymath", "hcot_qbf"} <= known_tasks([folder], usual=False)
    assert logging.getLogger("lm_eval").level != logging.ERROR  # as it was
