"""Where the data comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from hcot_lmeval.scoring import data
from tests.tasks_hub import ROWS, write_hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)


def test_names_of_the_hub_and_short_names(hub: Path, tmp_path: Path) -> None:
    for name, short in data.SHORT_NAMES.items():
        assert data.local_folder(name, hub) == hub / name
        (tmp_path / short).mkdir()
        assert data.local_folder(name, tmp_path) == tmp_path / short


def test_a_local_directory_without_the_data_set_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked for the hub"))
    with pytest.raises(FileNotFoundError, match=r"math-ai/aime25 or aime25.*HCOT_LMEVAL_DATA"):
        data.load("math-ai/aime25")


def test_both_sources_give_the_same_rows(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # load_dataset takes a folder of that name in the working directory for the hub's data set
    monkeypatch.chdir(hub)
    from_hub = data.load("Qwen/PolyMath", "de")
    local = data.load("Qwen/PolyMath", "de", root=hub)
    assert {split: rows.to_list() for split, rows in from_hub.items()} == {s: r.to_list() for s, r in local.items()}
    assert {split: len(rows) for split, rows in local.items()} == dict.fromkeys(("low", "medium", "high", "top"), ROWS)


def test_the_environment_variable_names_the_directory(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(hub))
    assert data.load("math-ai/aime25")["test"][0]["answer"] == "2"


def test_no_source_within_reach_names_the_variable(tmp_path: Path) -> None:
    """In a process of its own, for the hub's client reads its settings once."""
    code = "from hcot_lmeval.scoring.data import load; load('Qwen/PolyMath', 'en')"
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert last.startswith("ConnectionError: cannot load Qwen/PolyMath from the Hugging Face hub")
    assert "set HCOT_LMEVAL_DATA to a directory that holds Qwen/PolyMath or polymath" in last


def test_rows_take_turns() -> None:
    rows = (["a0", "a1", "a2"], ["b0"], ["c0", "c1"])
    parts = [datasets.Dataset.from_dict({"x": x}) for x in rows]
    assert data.interleave(parts)["x"][:] == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_columns_have_one_value_for_all_rows() -> None:
    rows = data.with_columns(datasets.Dataset.from_dict({"x": [1, 2]}), language="de", level="low")
    assert rows.to_list() == [{"x": x, "language": "de", "level": "low"} for x in (1, 2)]
