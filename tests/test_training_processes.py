"""A global batch has one loss and one gradient, whatever the number of processes and however the model is wrapped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training_process import FAMILIES, WRAPPERS, Result, compute

SCRIPT = Path(__file__).with_name("training_process.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    out = tmp_path_factory.mktemp("two") / "results.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(out)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    return {key: Result(*result) for key, result in torch.load(out).items()}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_process(family: str) -> Result:
    return compute(family, wrapper=None)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_compute_what_one_does(
    family: str, wrapper: str, one_process: Result, two_processes: dict[tuple[str, str], Result]
) -> None:
    found = two_processes[family, wrapper]
    many, few = found.targets
    assert many > 10 * few, "were the targets alike, a wrong denominator would pass"
    assert [many + few] == one_process.targets
    assert found.loss == pytest.approx(one_process.loss, rel=1e-9)
    assert found.gradients.keys() == one_process.gradients.keys()
    for name, expected in one_process.gradients.items():
        assert expected.abs().max() > 0, name
        assert (found.gradients[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
