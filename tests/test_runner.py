"""What becomes of the cells of a grid when they are run, fail, are interrupted or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from hcot_lmeval import provenance
from hcot_lmeval.report.folder import CellFolder, with_other_versions
from hcot_lmeval.report.reading import Reader
from hcot_lmeval.report.results import read_runs
from hcot_lmeval.report.runner import Failure, run_cells
from tests.fake_evaluation import arguments_of
from tests.interrupts import accept_interrupts
from tests.test_grid import ROOT, folders

FAKE = (sys.executable, str(ROOT / "tests" / "fake_evaluation.py"))
QUICK = (sys.executable, str(ROOT / "tests" / "quick_lm_eval.py"))


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """The model arguments of every start of the fake lm_eval."""
    path = tmp_path / "starts"
    path.touch()
    monkeypatch.setenv("FAKE_STARTS", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda: [arguments_of(line) for line in path.read_text().splitlines()]


def run(cells: list[CellFolder]) -> list[Failure]:
    return run_cells(cells, lm_eval=FAKE)


def test_cells_are_run_once(tmp_path, starts, capsys):
    cells = folders(tmp_path / "out")
    assert run(cells) == []
    assert all(cell.is_done for cell in cells)
    wanted = [(policy, window) for policy in ("off", "recompute") for window in (64, 128)]
    assert [(args["pruning"], args["max_context"]) for args in starts()] == wanted
    assert run(folders(tmp_path / "out")) == []
    assert len(starts()) == 4
    run(folders(tmp_path / "out", limit=2, windows=[64], policies=["off"]))  # other settings, in another folder
    assert len(starts()) == len(list((tmp_path / "out" / "cells").iterdir())) == 5
    told = capsys.readouterr().out
    assert "[1/4] tiny-hcot, off, 64 (toy): done\n" in told and "4 of 4 cells are done\n" in told
    assert "[4/4] tiny-hcot, recompute, 128 (toy): done\n" in told


def test_other_versions_are_run_again_unless_they_are_allowed(tmp_path, starts, monkeypatch):
    cells = folders(tmp_path, windows=[64], policies=["off"])
    run(cells)
    monkeypatch.setattr(provenance, "version", lambda name: "9.9")
    later = folders(tmp_path, windows=[64, 128], policies=["off"])
    assert [cell.is_done for cell in later] == [False, False]
    allowed = [with_other_versions(cell) for cell in later]
    assert [cell.path for cell in allowed] == [cells[0].path, later[1].path]
    run(allowed)
    assert len(starts()) == 2


def test_crash_loses_one_cell(tmp_path, starts, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off,max_context=128": "crash"}))
    cells = folders(tmp_path)
    [failure] = run(cells)
    assert failure.folder is cells[1]
    assert failure.reason == "lm_eval ended with status 3"
    assert failure.log.splitlines() == ["loading", "working: 90%", "CUDA error: no kernel image"]
    assert [cell.is_done for cell in cells] == [True, False, True, True]
    monkeypatch.delenv("FAKE_FAULTS")
    assert run(folders(tmp_path)) == []
    assert len(starts()) == 5


def test_end_without_results_is_a_failure(tmp_path, starts, monkeypatch):
    """lm-eval logs that it could not save, and ends with status 0."""
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"": "silent"}))
    [failure] = run(folders(tmp_path, windows=[64], policies=["off"]))
    assert failure.reason == "lm_eval ended with status 0 and without complete results"


def test_results_of_other_settings_are_refused(tmp_path, starts, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"": "wrong"}))
    [cell] = folders(tmp_path, windows=[64], policies=["off"])
    run([cell])
    with pytest.raises(ValueError, match="max_context=7 instead of 64"):
        Reader().cell(cell.path)


def driver(out: Path, command: tuple[str, ...] = FAKE, **settings: Any) -> list[str]:
    """A process that runs a grid."""
    source = f"""
        from pathlib import Path
        from tests.test_runner import folders, run_cells
        cells = folders(Path({str(out)!r}), **{settings!r})
        run_cells(cells, lm_eval={command!r})
        """
    return [sys.executable, "-c", textwrap.dedent(source)]


@pytest.mark.parametrize("point", ["start", "torn results", "torn samples", "end"])
def test_killed_at_any_point_it_goes_on(tmp_path, starts, monkeypatch, point):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off,max_context=128": point}))
    cells = folders(tmp_path / "out")
    assert subprocess.run(driver(tmp_path / "out"), check=False).returncode == -signal.SIGKILL
    assert [cell.is_done for cell in cells] == [True, False, False, False]
    monkeypatch.delenv("FAKE_FAULTS")
    assert run(cells) == []
    assert all(cell.is_done for cell in cells)
    assert len(starts()) == (4 if point == "end" else 5)  # what was complete is not done again
    for cell in cells:
        [found] = Reader().cell(cell.path)
        assert found.scores == {0: 1, 1: found.policy == "recompute", 2: found.policy == "recompute", 3: 0}


def test_no_second_lm_eval_beside_one_that_outlived_its_parent(tmp_path, starts, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off,max_context=64": "orphan"}))
    subprocess.run(driver(tmp_path / "out"), check=False)
    monkeypatch.delenv("FAKE_FAULTS")
    assert run(folders(tmp_path / "out")) == []
    order = [(args["pruning"], args["max_context"]) for args in starts()]
    assert order == [("off", 64), ("off", 128), ("recompute", 64), ("recompute", 128)]
    told = capsys.readouterr().out.splitlines()
    assert "tiny-hcot, off, 64 (toy): another process has it in work; waiting for its end" in told
    assert told[-1].startswith("[4/4] tiny-hcot, off, 64 (toy): done")


def test_two_processes_share_the_cells(tmp_path, starts):
    sharing = [subprocess.Popen(driver(tmp_path / "out", windows=[8, 16, 32, 64])) for _ in range(2)]
    assert [process.wait() for process in sharing] == [0, 0]
    assert len(starts()) == len({json.dumps(args) for args in starts()}) == 8


def test_interrupt_ends_lm_eval_too(tmp_path, starts, monkeypatch):
    """Ctrl-C reaches us; a command that would run for ever is ended, and the cell is free again."""
    forever = tmp_path / "forever.py"
    forever.write_text(
        "import os, time, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        driver(tmp_path / "out", (sys.executable, str(forever))),
        stderr=subprocess.DEVNULL,
        preexec_fn=accept_interrupts,
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert run(folders(tmp_path / "out")) == []


# --- for real ---------------------------------------------------------------------------------------------------------


def test_killed_within_a_cell_it_goes_on_with_the_journal(tmp_path, monkeypatch):
    """lm_eval itself with a bundled model; both processes are killed while the second request is written down."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = {"tasks": ["hcot_arith"], "policies": ["trained"], "windows": [128], "limit": 2, "device": "cpu"}
    settings |= {"batch_size": 2, "include_path": str(ROOT / "tasks" / "synthetic")}
    [cell] = folders(tmp_path, **settings)
    died = subprocess.run(driver(tmp_path, QUICK, **settings), env=os.environ | {"DIE_AFTER": "2"}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not cell.is_done
    assert run_cells([cell], lm_eval=QUICK) == []
    [found] = Reader().cell(cell.path)
    assert found.name == "tiny-hcot, recompute, 128"
    assert found.totals is not None and (found.totals["requests"], found.totals["resumed_requests"]) == (2, 1)
    new = found.totals["tokens_per_second"] * found.totals["wall_seconds"]
    assert 0 < new < found.totals["generated_tokens"]  # the speed is that of the request that was generated now
    assert len(read_runs(tmp_path)) == 1
    assert list((cell.path / "notes").glob("*.jsonl"))
