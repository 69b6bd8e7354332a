"""What a grid may say, the cells it has, and what becomes of them when processes fail or are killed."""

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
import yaml

from hcot_lmeval import provenance
from hcot_lmeval.report.folder import CellFolder, arguments, is_complete, with_other_versions, write_json
from hcot_lmeval.report.grid import GridConfig
from hcot_lmeval.report.progress import Progress
from hcot_lmeval.report.reading import Reader
from hcot_lmeval.report.results import ResultsError, read_runs
from hcot_lmeval.report.runner import Failure, run_cells
from hcot_lmeval.settings import describe_settings, parse_settings
from tests.fake_evaluation import arguments_of
from tests.interrupts import heed_interrupts
from tests.result_files import build_run

ROOT = Path(__file__).parents[1]
FAKE = (sys.executable, str(ROOT / "tests" / "fake_evaluation.py"))
QUICK = (sys.executable, str(ROOT / "tests" / "quick_lm_eval.py"))
SMALL: dict[str, Any] = {"models": ["tiny-hcot"], "windows": [64, 128], "tasks": ["toy"]}


def grid(**settings: Any) -> GridConfig:
    return parse_settings(GridConfig, {"models": ["tiny-hcot"], "tasks": ["toy"], **settings})


def folders(out: Path, **settings: Any) -> list[CellFolder]:
    return [CellFolder(out, cell) for cell in grid(**SMALL | settings).cells]


# --- what a grid may say ----------------------------------------------------------------------------------------------


def names(**settings: Any) -> list[str]:
    return [cell.name for cell in grid(**settings).cells]


def test_default_grid_is_off_and_as_trained_at_the_usual_windows():
    windows = (1024, 2048, 4096)  # of 8192 tokens the model has no positions
    assert names() == [f"tiny-hcot, {policy}, {window}" for policy in ("off", "recompute") for window in windows]
    assert names(policies=["off"], windows=[8192]) == ["tiny-hcot, off, 8192"]
    assert names(models=["org/unknown"], policies=["off"])[-1] == "unknown, off, 8192"
    assert names(models=["tiny-evict"], windows=[64]) == ["tiny-evict, off, 64", "tiny-evict, evict, 64"]


def test_flat_model_is_trained_for_off_and_so_has_one_cell():
    assert names(models=["tiny-flat"], windows=[64]) == ["tiny-flat, off, 64"]


def test_checkpoint_without_a_record_is_taken_for_recompute(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert names(models=[str(tmp_path)], windows=[64], policies=["trained"]) == [f"{tmp_path.name}, recompute, 64"]


def test_seeds_are_named_where_there_are_several():
    assert names(windows=[64], policies=["off"], seeds=[3]) == ["tiny-hcot, off, 64"]
    assert names(windows=[64], policies=["off"], seeds=[0, 3])[1] == "tiny-hcot, off, 64, seed 3"
    assert [cell.model_args["seed"] for cell in grid(windows=[64], policies=["off"], seeds=[0, 3]).cells] == [0, 3]


def test_model_of_its_own_policies_and_windows():
    restricted = {"pretrained": "tiny-hcot", "name": "a", "policies": ["off"], "windows": [32]}
    assert names(models=[restricted, "tiny-flat"], windows=[64]) == ["a, off, 32", "tiny-flat, off, 64"]


def test_repeated_values_give_one_cell():
    assert names(windows=[64, 64], policies=["off", "off"], seeds=[1, 1], tasks=["a", "a"]) == [
        "tiny-hcot, off, 64, seed 1"
    ]


def test_bare_off_of_yaml_is_the_policy():
    assert yaml.safe_load("[off]") == [False]
    assert grid(policies=[False]).policies == ["off"]


def test_other_model_is_one_cell_unless_it_says_how_it_takes_a_window():
    assert names(models=["base=hf:org/model"]) == ["base"]
    windowed = {"name": "base", "model": "vllm", "pretrained": "org/model", "window_argument": "max_model_len"}
    cells = grid(models=[windowed | {"seed_argument": "seed"}], windows=[64, 128], seeds=[5]).cells
    assert [cell.name for cell in cells] == ["base, 64", "base, 128"]
    assert cells[0].model_args == {"pretrained": "org/model", "max_model_len": 64, "seed": 5}
    assert cells[0].seeds == "0,1234,5,1234"


def test_bundled_checkpoint_for_another_model_is_given_as_a_folder():
    [cell] = grid(models=["hf:tiny-flat"]).cells
    assert (cell.name, Path(cell.model_args["pretrained"], "config.json").is_file()) == ("tiny-flat", True)


def test_windows_beyond_the_usual_budget_share_one_default_limit():
    """Or runs at 1024 and at 65536 live tokens would have different budgets, and could not be compared."""
    usual, large = grid(windows=[1024, 32768]).cells, grid(windows=[1024, 65536]).cells
    assert {cell.model_args.get("max_gen_toks") for cell in usual} == {None}
    assert {cell.model_args.get("max_gen_toks") for cell in large} == {65536}
    named = grid(windows=[65536], model_args={"max_gen_toks": 9}).cells
    assert {cell.model_args["max_gen_toks"] for cell in named} == {9}


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


def test_notes_do_not_determine_the_result(tmp_path):
    assert folders(tmp_path)[0].path == folders(tmp_path, notes=False)[0].path


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


def test_many_processes_may_write_one_file(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_json(tmp_path / "grid.json", {"n": n}), range(200)))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]


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


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """The model arguments of every start of the fake lm_eval."""
    path = tmp_path / "starts"
    path.touch()
    monkeypatch.setenv("FAKE_STARTS", str(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return lambda: [arguments_of(line) for line in path.read_text().splitlines()]


def run(cells: list[CellFolder]) -> list[Failure]:
    return run_cells(cells, Progress(cells), lm_eval=FAKE)


def test_cells_are_run_once(tmp_path, starts, capsys):
    cells = folders(tmp_path / "out")
    assert run(cells) == []
    assert all(cell.is_done for cell in cells)
    wanted = [(policy, window) for policy in ("off", "recompute") for window in (64, 128)]
    assert [(args["pruning"], args["max_context"]) for args in starts()] == wanted
    assert run(folders(tmp_path / "out")) == []
    assert len(starts()) == 4
    told = capsys.readouterr().out
    assert "[1/4] tiny-hcot, off, 64 (toy): done in 12 s; about 38 s left" in told
    assert "[4/4] tiny-hcot, recompute, 128 (toy): done in 12 s\n" in told


def test_other_settings_are_run_in_other_folders(tmp_path, starts):
    run(folders(tmp_path / "out"))
    run(folders(tmp_path / "out", limit=2))
    assert len(starts()) == 8
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 8


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
        from tests.test_grid import folders, Progress, run_cells
        cells = folders(Path({str(out)!r}), **{settings!r})
        run_cells(cells, Progress(cells), lm_eval={command!r})
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
        preexec_fn=heed_interrupts,
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert run(folders(tmp_path / "out")) == []


def test_estimate_of_the_time_left(tmp_path):
    """Cells of one model and policy are the measure of each other; a new policy is measured by its model."""
    cells = folders(tmp_path, windows=[1, 2, 3], models=["tiny-hcot", "tiny-flat"])
    seconds = {"off": 10.0, "recompute": 40.0}
    for cell in cells[:2] + cells[3:4]:
        build_run(
            cell.results,
            [1],
            change=lambda r, s, c=cell: r.update(total_evaluation_time_seconds=str(seconds[c.cell.policy])),
        )
    progress = Progress(cells)
    assert progress.seconds_left() == 10 + 2 * 40 + 3 * 20
    assert Progress(folders(tmp_path / "new")).seconds_left() is None


# --- for real ---------------------------------------------------------------------------------------------------------


def test_killed_within_a_cell_it_goes_on_with_the_journal(tmp_path, monkeypatch):
    """lm_eval itself with a bundled model; both processes are killed while the second request is written down."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = {
        "tasks": ["hcot_arith"],
        "policies": ["trained"],
        "windows": [128],
        "limit": 2,
        "device": "cpu",
        "batch_size": 2,
    }
    settings |= {"include_path": str(ROOT / "tasks" / "synthetic")}
    [cell] = folders(tmp_path, **settings)
    died = subprocess.run(driver(tmp_path, QUICK, **settings), env=os.environ | {"DIE_AFTER": "2"}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not cell.is_done
    assert run_cells([cell], Progress([cell]), lm_eval=QUICK) == []
    [found] = Reader().cell(cell.path)
    assert found.name == "tiny-hcot, recompute, 128"
    assert found.totals is not None and (found.totals["requests"], found.totals["resumed_requests"]) == (2, 1)
    new = found.totals["tokens_per_second"] * found.totals["wall_seconds"]
    assert 0 < new < found.totals["generated_tokens"]  # the speed is that of the request that was generated now
    assert len(read_runs(tmp_path)) == 1
    assert list((cell.path / "notes").glob("*.jsonl"))
