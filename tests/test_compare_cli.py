"""The command line: help, grids from files and options, reading folders, and errors of one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hcot_lmeval.__main__ import main as package
from hcot_lmeval.report import folder, preflight
from hcot_lmeval.report.cli import main, make_parser
from hcot_lmeval.report.results import Run
from tests.result_files import build_run
from tests.test_runner import FAKE, ROOT

GRID = """
models: [{pretrained: tiny-flat, policies: [off]}, {pretrained: tiny-hcot, policies: [off, recompute]}]
windows: [64, 128]
tasks: [toy]
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """Folders that are made by default are made there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def compared(monkeypatch) -> list[SimpleNamespace]:
    """What reached `compare`, which is tested elsewhere."""
    calls: list[SimpleNamespace] = []

    def compare(runs: list[Run], **options: Any) -> Any:
        def write(directory: Path, plots: bool = True) -> list[Path]:
            calls[-1].out, calls[-1].plots = directory, plots
            return [directory / "comparison.md"]

        calls.append(SimpleNamespace(runs=runs, names=[run.name for run in runs], **options))
        return SimpleNamespace(text=lambda: "the table", write=write)

    module = ModuleType("hcot_lmeval.report.comparison")
    module.compare = compare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Callable[[], int]:
    """Puts the fake lm_eval in the place of the command, and counts its starts."""
    monkeypatch.setattr(folder, "LM_EVAL", FAKE)
    monkeypatch.setattr("hcot_lmeval.report.runner.run_cells.__defaults__", (lambda folder: None, FAKE))
    monkeypatch.setattr(preflight, "known_tasks", lambda folders, usual: {"toy"})
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "starts").touch()
    (tmp_path / "grid.yaml").write_text(GRID)
    return lambda: len((tmp_path / "starts").read_text().splitlines())


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command line that fails with one line and returns it."""
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["scripts/compare.py"], ["-m", "hcot_lmeval", "compare"]])
def test_help_needs_no_heavy_library(command):
    """Read off the modules that the help has imported."""
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "have examples" in shown.stdout.replace("\n", " ")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "argparse" in imported
    assert imported & {"torch", "numpy", "scipy", "matplotlib", "lm_eval", "transformers"} == set()


@pytest.mark.parametrize("kind", ["run", "read"])
def test_every_option_has_a_meaning_and_examples_parse(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    with pytest.raises(SystemExit):
        main([kind, "--help"])
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(f"compare.py {kind}")]
    assert len(examples) >= 3
    for line in examples:
        words = line.partition("   ")[0].split()[1:]
        assert make_parser().parse_args(words).action


def test_commands_of_the_package(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # which the command changes
    assert package(["compair"]) == 2
    shown = capsys.readouterr().err
    assert "  compare " in shown and "  view " in shown and "error: there is no command 'compair'" in shown
    assert package(["compare", "run", "--keys"]) == 0
    assert "windows " in capsys.readouterr().out


# --- run --------------------------------------------------------------------------------------------------------------


def test_grid_of_a_file_is_run_once(fake, compared, capsys, monkeypatch):
    assert main(["run", "grid.yaml", "--out", "out", "--windows", "64", "--no-plots"]) == 0
    assert (fake(), compared[0].plots) == (3, False)
    assert "cells are done" not in capsys.readouterr().out
    assert main(["run", "grid.yaml", "--out", "out", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    states = [line.partition("  ")[0] for line in lines if line.startswith(("done", "to do"))]
    assert states == ["done", "to do"] * 3
    commands = [line.split() for line in lines if line.startswith("       lm_eval")]
    assert len(commands) == 3 and all("max_context=128" in command[4] for command in commands)
    assert (fake(), len(compared)) == (3, 1)
    assert main(["run", "grid.yaml", "--out", "out", "--baseline", "tiny-flat, off, 64", "--by", "depth"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "3 of 6 cells are done"
    assert "the table" in shown and "written to out: comparison.md" in shown
    call = compared[1]
    kinds = ("tiny-flat, off", "tiny-hcot, off", "tiny-hcot, recompute")
    assert call.names == [f"{kind}, {n}" for kind in kinds for n in (64, 128)]
    assert (call.baseline, call.by, call.out, call.plots) == ("tiny-flat, off, 64", "depth", Path("out"), True)
    monkeypatch.setattr(preflight, "known_tasks", lambda folders, usual: set())  # what is done is not checked again
    assert main(["run", "grid.yaml", "--out", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "6 of 6 cells are done"
    assert fake() == 6 and [run.path for run in compared[2].runs] == [run.path for run in call.runs]


def test_options_take_precedence_over_the_file(fake, compared):
    main(["run", "grid.yaml", "--windows", "32", "--limit", "2", "--policies", "off", "--batch-size", "4"])
    assert compared[0].names == ["tiny-flat, off, 32", "tiny-hcot, off, 32", "tiny-hcot, recompute, 32"]
    assert {len(run.samples) for run in compared[0].runs} == {2}
    assert compared[0].out == Path("comparison")


def test_options_alone(fake, compared):
    argv = "run --models a=tiny-hcot hf:tiny-flat --tasks toy --windows 64 --device cpu --model-args dtype=float32"
    assert main([*argv.split(), "--gen-kwargs", "max_gen_toks=99", "--no-notes"]) == 0
    assert compared[0].names == ["a, off, 64", "a, recompute, 64", "tiny-flat"]
    assert compared[0].runs[0].config["model_args"]["dtype"] == "float32"
    assert "notes" not in compared[0].runs[0].config["model_args"]


def test_failing_cell(fake, compared, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off,max_context=128": "crash"}))
    assert main(["run", "grid.yaml", "--out", "out", "--models", "tiny-hcot"]) == 1
    out, err = capsys.readouterr()
    assert "tiny-hcot, off, 128 (toy) failed: lm_eval ended with status 3; out/cells/toy--tiny-hcot--off--128--" in err
    assert "\n    CUDA error: no kernel image\n" in err
    assert "1 of 4 cells failed and are not in the tables: tiny-hcot, off, 128 (toy)" in err
    assert "the table" in out
    assert len(compared[0].names) == 3


def test_failures_are_told_by_their_message_and_once(fake, compared, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off": "traceback"}))
    assert main(["run", "grid.yaml", "--out", "out", "--models", "tiny-hcot", "--windows", "32", "64"]) == 1
    first, message, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("tiny-hcot, off, 32 (toy) failed: lm_eval ended with status 1; out/cells/toy--")
    assert message == "    ValueError: something is wrong"
    assert second.startswith("tiny-hcot, off, 64 (toy) failed like tiny-hcot, off, 32 (toy); out/cells/toy--")


def test_a_grid_that_cannot_run_starts_no_cell(fake, compared, capsys):
    argv = ["run", "--models", "tiny-hcot", "--policies", "evict", "--tasks", "toi", "--out", "out"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: the grid cannot be run:\n  tiny-hcot: policies=evict, but")
    assert "no task toi; did you mean toy?" in err
    assert (out, fake(), Path("out").exists()) == ("", 0, False)
    assert main([*argv, "--dry-run"]) == 1
    assert capsys.readouterr() == ("", err)


def test_cell_that_cannot_be_compared_is_told_when_it_ends(fake, compared, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off,max_context=128": "version"}))
    assert main(["run", "grid.yaml", "--out", "out", "--models", "tiny-hcot"]) == 1
    out, err = capsys.readouterr()
    warning, error = err.splitlines()
    assert warning.startswith(
        "warning: 'tiny-hcot, off, 64' and 'tiny-hcot, off, 128' (toy) cannot be compared: the versions"
    )
    assert error.partition(": ")[2] == warning.partition(": ")[2]
    assert "[4/4]" in out  # the others go on
    assert compared == []


def test_no_cell_finished(fake, compared, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"": "crash"}))
    assert main(["run", "grid.yaml", "--out", "out"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no cell is finished; the logs are in out/cells"
    assert compared == []


def test_swapped_results_of_cells_are_refused(fake, compared, capsys):
    main(["run", "grid.yaml", "--out", "out", "--models", "tiny-hcot", "--windows", "64"])
    one, other = (cell / "results" for cell in sorted(Path("out/cells").iterdir()))
    shutil.move(one, "aside")
    shutil.move(other, one)
    shutil.move("aside", other)
    capsys.readouterr()
    assert "labels were swapped" in fails(capsys, "read", "out")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("run nowhere.yaml", "nowhere.yaml is no file; give the path of a YAML file"),
        ("run .", ". is no file; give the path of a YAML file with keys and values such as `models: [tiny-hcot]`"),
        ("run --models a", "the grid of the command line cannot be used: tasks: Field required"),
        ("run --models a --tasks b --windows x", "windows.0: Input should be a valid integer"),
        ("run --models a --tasks b --policies prune", "Input should be 'off', 'trained', 'recompute' or 'evict'"),
        ("run --models a --tasks b --gen-kwargs x", "gen_kwargs: expected KEY=VALUE, not x"),
        ("run --models a --tasks b grid.yaml", "grid.yaml stands among the values of --tasks; name the grid first"),
        ("read nowhere", "nowhere is no folder; give the --output_path"),
        ("read a=nowhere", "nowhere is no folder"),
        ("read .", "no run below ."),
        ("read . --out /dev/null/x", "--out /dev/null/x cannot be written to (Not a directory); name another folder"),
        ("run --model a --tasks b --windows x", "windows.0: Input should be a valid integer"),
    ],
)
def test_errors_are_one_line(capsys, argv, told):
    error = fails(capsys, *argv.split())
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "read"])
def test_unknown_option_is_told_with_the_usage_of_its_command(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "x", "--bogus"])
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert f" {command} [-h]" in usage
    assert error.endswith(f"{command}: error: unrecognized arguments: --bogus")


def test_unknown_key_names_the_nearest(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text("models: [tiny-hcot]\ntasks: [a]\nwindow: [1]\n")
    assert f"{path} cannot be used: window is unknown; did you mean windows?" in fails(capsys, "run", str(path))
    path.write_text("models: [")
    assert "is not YAML" in fails(capsys, "run", str(path))
    path.write_text("- a")
    assert "holds list; expected keys and values such as `models: [tiny-hcot]`" in fails(capsys, "run", str(path))


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Words for two folders of results, one unpruned."""
    build_run(tmp_path / "a", [1, 0], policy="off")
    build_run(tmp_path / "b", [1, 1])
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_folders_and_names(tmp_path, two, compared):
    build_run(tmp_path / "lr=1", [1, 0], max_context=128)  # a name of a folder, not a name and a folder
    assert main(["read", *two, str(tmp_path / "lr=1"), "--out", str(tmp_path / "tables")]) == 0
    assert compared[0].names == ["model, off, 1024", "model, recompute, 1024", "model, recompute, 128"]
    assert compared[0].out == tmp_path / "tables"
    build_run(tmp_path / "b", [1, 1], max_context=128)
    assert main(["read", f"flat={two[0]}", f"hcot={two[1]}"]) == 0
    assert compared[1].names == ["flat", "hcot, recompute, 1024", "hcot, recompute, 128"]


@pytest.mark.parametrize(
    ("other", "argv", "told"),
    [
        ({"version": 2.0}, [], "the versions of the task differ: 1.0 and 2.0"),
        ({"change": lambda results, samples: results.update(lm_eval_version="0.5")}, [], "--allow-versions"),
        ({}, ["--baseline", "nobody"], "baseline='nobody' is not a run here"),
        ({}, ["--by", "nothing"], "have no column 'nothing'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, other, argv, told):
    build_run(tmp_path / "a", [1, 0], policy="off")
    build_run(tmp_path / "b", [1, 0], **other)
    error = fails(capsys, "read", str(tmp_path / "a"), str(tmp_path / "b"), *argv)
    assert told in error and error.count("\n") == 1


def test_other_versions_may_be_allowed(tmp_path, two, compared, capsys):
    build_run(tmp_path / "c", [1, 0], model="c", change=lambda results, samples: results.update(lm_eval_version="0.5"))
    assert main(["read", *two, str(tmp_path / "c"), "--allow-versions"]) == 0
    assert "note: the runs were made with different versions of lm-eval: 0.4.13, 0.5" in capsys.readouterr().out


def test_name_for_several_models_is_refused(tmp_path, capsys):
    for model in ("org/a", "org/b"):
        build_run(tmp_path, [1, 0], model=model)
    assert "holds runs of several models" in fails(capsys, "read", f"x={tmp_path}")


def test_newest_of_several_runs_is_taken_and_said(tmp_path, compared, capsys):
    build_run(tmp_path, [0, 0])
    newest = build_run(tmp_path, [1, 1])
    assert main(["read", str(tmp_path)]) == 0
    assert [run.path for run in compared[0].runs] == [newest]
    told = capsys.readouterr().err
    assert f"holds several runs of 'model, recompute, 1024' (toy); the newest is taken, {newest.name}" in told


def test_seeds_of_one_folder_are_pooled(tmp_path, capsys):
    for seed, scores in enumerate(([1, 0, 1, 0], [1, 1, 0, 0])):
        build_run(tmp_path / "out", scores, totals={"seed": seed})
    assert main(["read", str(tmp_path / "out"), "--out", str(tmp_path / "tables"), "--no-plots"]) == 0
    [task] = json.loads((tmp_path / "tables" / "comparison.json").read_text())["tasks"].values()
    assert len(task["runs"]) == 2
    [row] = task["tables"]["accuracy"]["rows"]
    assert row["1024"]["value"] == 0.5 and row["1024"]["problems"] == 4


def test_choice_of_task_metric_and_filter(tmp_path, compared):
    build_run(tmp_path, [1, 0])
    build_run(tmp_path, [1, 0], task="other", filter_name="strict")
    argv = ["--tasks", "other", "--metric", "completed", "--filter", "strict"]
    assert main(["read", str(tmp_path), *argv]) == 0
    assert [(run.task, run.metric) for run in compared[0].runs] == [("other", "completed")]


def test_folder_of_a_grid_is_read_by_its_cells(fake, compared, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_FAULTS", json.dumps({"pruning=off,max_context=128": "crash"}))
    main(["run", "grid.yaml", "--out", "out"])
    main(["run", "grid.yaml", "--out", "out", "--limit", "2", "--windows", "64"])  # another grid, in the same folder
    main(["run", "grid.yaml", "--out", "out"])
    capsys.readouterr()
    assert main(["read", "out"]) == 0
    assert compared[-1].names == compared[0].names
    assert "note: 2 of 6 cells in out are not finished" in capsys.readouterr().err
    assert "whose cells have names" in fails(capsys, "read", "x=out")


def test_from_two_folders_to_tables(tmp_path, capsys):
    """Nothing replaced: what a new user does first."""
    build_run(tmp_path / "a", [0, 0, 1, 0, 0, 0] * 5, policy="off", columns={"depth": [3, 4] * 15})
    build_run(tmp_path / "b", [1, 0, 1, 1, 1, 1] * 5, columns={"depth": [3, 4] * 15})
    out = tmp_path / "tables"
    assert main(["read", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--no-plots"]) == 0
    shown = capsys.readouterr().out
    assert "16.7" in shown and "83.3" in shown  # 5 and 25 of 30
    assert {"comparison.md", "comparison.json"} <= {path.name for path in out.iterdir()}
    assert shown.splitlines()[-1] == f"written to {out}: comparison.json, comparison.md, comparison.tex, 6 .csv"


def test_reader_that_has_seen_enough_is_no_error():
    """As in ``compare.py read ... | head -1``."""
    tasks, seeds = ["hcot_arith", "hcot_qbf", "hcot_sat"], map(str, range(20))
    command = [sys.executable, "scripts/compare.py", "run", "--models", "tiny-hcot", "--tasks", *tasks, "--dry-run"]
    command += ["--windows", "64", "--seeds", *seeds]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout is not None and shown.stderr is not None
        assert shown.stdout.readline().startswith("to do  tiny-hcot, off, 64, seed 0 (hcot_arith)")
        shown.stdout.close()
        assert (shown.stderr.read(), shown.wait()) == ("", 0)
