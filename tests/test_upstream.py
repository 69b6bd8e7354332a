"""The patch for lm-eval applies to the installed release, and its tasks load and grade."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import lm_eval.tasks
import pytest

from hcot_lmeval.scoring.instructions import default_instructions

PATCH = Path(__file__).resolve().parents[1] / "docs" / "upstream" / "lm-eval-0.4.13.patch"
PROBLEMS = {"low": "1+1?", "medium": "2+2?", "high": "3+3?", "top": "4+4?"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of tasks with the patch."""
    if version("lm_eval") != "0.4.13":
        pytest.skip("needs lm-eval 0.4.13, for which the patch is")
    root = tmp_path_factory.mktemp("upstream")
    shutil.copytree(Path(lm_eval.tasks.__file__).parent / "aime", root / "lm_eval" / "tasks" / "aime")
    subprocess.run(["git", "apply", str(PATCH)], cwd=root, check=True)
    return root / "lm_eval" / "tasks"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"patched_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tasks_are_found_under_their_names(tasks):
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    names = {f"polymath_{language}" for language in default_instructions()} | {"polymath"}
    assert names | {"aime24_boxed", "aime25_boxed"} <= set(manager.all_tasks)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"<think>\boxed{7}</think> so \boxed{\frac{84}{2}}", 1),
        (r"<think>\boxed{42}</think> I do not know", 0),
        (r"\boxed{1} and then \boxed{42}", 1),
        (r"\boxed{42} and \boxed{4", 1),
        ("42", 0),
    ],
)
def test_the_last_box_behind_the_thinking_counts(tasks, response, right):
    boxed = load(tasks / "aime" / "utils_boxed.py")
    assert boxed.process_results({"Problem": "6*7?", "Answer": 42}, [response]) == {"acc": right}


def test_levels_take_turns_and_weigh_as_in_the_paper(tasks, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks.aime.utils_boxed", load(tasks / "aime" / "utils_boxed.py"))
    polymath = load(tasks / "polymath" / "utils.py")
    rows = {level: [{"question": text, "answer": "2"}] * 2 for level, text in PROBLEMS.items()}
    monkeypatch.setattr(polymath.datasets, "load_dataset", lambda path, language: rows)
    found = polymath.load_levels("de")["test"]
    assert found["level"] == [*PROBLEMS, *PROBLEMS]
    assert set(found["instruction"]) == {default_instructions()["de"]}
    assert polymath.process_results(found[3], [r"\boxed{2}"]) == {"acc": 1, "dw_acc": ("top", 1)}
    scores = [("low", 1), ("medium", 0), ("high", 1), ("high", 0), ("top", 1)]
    assert polymath.dw_acc(scores) == pytest.approx((1 + 0 + 4 * 0.5 + 8) / 15)
