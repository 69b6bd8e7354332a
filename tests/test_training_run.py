"""The directory of a run: it resumes its own run, refuses another, and never trusts half a checkpoint."""

from __future__ import annotations

import json

import pytest

from hcot_lmeval.training.config import SftConfig, load_config
from hcot_lmeval.training.data.dataset import Finding
from hcot_lmeval.training.run import RunDirectory
from tests.test_training_config import MINIMAL


def config(**changes) -> SftConfig:
    return SftConfig.model_validate({**MINIMAL, **changes})


def checkpoint(run: RunDirectory, step: int, *, whole: bool = True) -> None:
    path = run.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        (path / "trainer_state.json").write_text("{}")


def test_resumes_from_the_newest_whole_checkpoint(tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.claim(config()) is None
    for step in (90, 100):
        checkpoint(run, step)
    checkpoint(run, 110, whole=False)
    assert run.claim(config()).name == "checkpoint-100"


def test_who_stops_it_is_told_where_it_goes_on(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    assert run.stopped_at(3) == "stopped at step 3, before the first checkpoint; the same command starts anew"
    checkpoint(run, 250)
    assert run.stopped_at(490) == "stopped at step 490; the same command goes on from step 250 (checkpoint-250)"


def test_settings_are_written_so_that_they_can_be_read_again(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(config(output=tmp_path))
    assert load_config(tmp_path / "config.yaml") == config(output=tmp_path)


def test_another_run_is_refused_unless_told(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(config())
    checkpoint(run, 5)
    other = config(phases=[{"policy": "evict", "steps": 10}])
    with pytest.raises(ValueError, match=r"(?s)phases\.0\.policy: 'recompute' there, 'evict' now.*--restart"):
        run.claim(other)
    assert run.last_checkpoint() is not None
    assert run.claim(other, restart=True) is None


def test_settings_that_change_nothing_may_change(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(config())
    checkpoint(run, 5)
    moved = config(output="elsewhere", data={**MINIMAL["data"], "workers": 3}, evaluation={"batch_size": 2})
    assert run.claim(moved).name == "checkpoint-5"
    shown = {"report_to": "tensorboard", "save_total_limit": 9, "save_steps": 5, "logging_steps": 3}
    assert run.claim(config(trainer=shown)).name == "checkpoint-5"


def test_the_last_phase_alone_may_become_longer(tmp_path) -> None:
    def phases(*steps: int) -> SftConfig:
        return config(phases=[{"policy": "recompute", "steps": number} for number in steps])

    run = RunDirectory(tmp_path)
    run.claim(phases(5, 5))
    checkpoint(run, 10)
    assert run.claim(phases(5, 9)).name == "checkpoint-10"
    for other in (phases(5, 5), phases(6, 9), phases(5, 9, 1), phases(14)):
        with pytest.raises(ValueError, match="It may be made longer: phases"):
            run.claim(other)


def test_what_came_to_no_checkpoint_is_no_run(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    run.claim(config())
    run.add_samples([{"step": 3}])
    assert run.claim(config(phases=[{"policy": "evict", "steps": 10}])) is None
    assert not run.samples.exists()


def test_findings_are_written_once(tmp_path) -> None:
    one, other = (Finding("a.jsonl", row, ("no_trace",), kept=False) for row in (1, 2))
    run = RunDirectory(tmp_path)
    run.write_findings([one, other, one])
    assert [json.loads(line)["row"] for line in run.rejected.read_text().splitlines()] == [1, 2]


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path):
    run = RunDirectory(tmp_path / "run")
    settings = config(output=tmp_path / "run")
    run.claim(settings, ["a", "b"])
    run.claim(settings, ["a", "c"])  # nothing was trained on the first
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    (run.checkpoints / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert run.claim(settings, ["a", "c"]) is not None
    with pytest.raises(ValueError, match="holds a run on other data: the files, or what becomes of their rows"):
        run.claim(settings, ["a", "b"])
    assert run.claim(settings, ["a", "b"], restart=True) is None
