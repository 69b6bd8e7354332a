"""What the demonstration says in the end. The parts that it is made of have tests of their own."""

from __future__ import annotations

import sys
from pathlib import Path

from hcot_lmeval.report.comparison import compare
from hcot_lmeval.report.results import read_runs
from tests.result_files import build_run

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import demo


def test_the_headline_is_the_accuracy_over_all_problems(tmp_path: Path) -> None:
    for window, scores in ((128, [1, 0, 0, 0]), (256, [1, 1, 1, 0])):
        build_run(tmp_path / "runs", scores, max_context=window, columns={"depth": [3, 4, 5, 6]})
    compare(read_runs(tmp_path / "runs")).write(tmp_path, plots=False)
    assert demo.headline(tmp_path).splitlines()[1:] == [
        "accuracy, %, at a window of    128   256",
        "model, recompute                25    75",
    ]
