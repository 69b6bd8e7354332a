"""Training as a user runs it: the command, from settings to a checkpoint; killed, resumed, in two processes.

Where nothing is killed it runs in this process, which saves the imports.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.record import read_record
from hcot_lmeval.training.config import parse_config
from hcot_lmeval.training.curves import read_records
from hcot_lmeval.training.run import RunDirectory
from tests.full import FULL, only_in_full
from tests.training_runs import SCRIPT, refused, run, start, wait_for, weights

STEPS, EVERY = 9, 4
LOSS_KEYS = ("loss", "cross_entropy", "cross_entropy_marker", "structure", "eval_loss", "eval_loss_markers")


def settings(output: Path, **changes) -> dict:
    source = {"path": "synthetic:arith", "options": {"size": 40, "depths": [1, 2], "seed": 5}}
    return {
        "model": "tiny",
        "tiny": {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "head_dim": 16},
        "output": str(output),
        "data": {
            "train": [source],
            "held_out": [{**source, "split": "validation", "options": {"size": 4, "depths": [2]}}],
            "row_length": 128,
        },
        "phases": [{"policy": "off", "steps": 3}, {"policy": "recompute", "steps": STEPS - 3}],
        "evaluation": {"every": EVERY, "problems": 3, "max_context": 96, "max_gen_toks": 30},
        "trainer": {"per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1, "warmup_steps": 0},
        **changes,
    }


def losses(output: Path) -> list[tuple]:
    records = read_records(output / "curves.jsonl")
    return [(r["step"], key, r[key]) for r in records for key in LOSS_KEYS if key in r]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", run(folder, settings(folder / "run"))


def test_leaves_model_card_curves_and_samples(finished) -> None:
    output, printed = finished
    assert "packed rows" in printed and "too few evaluations to tell" in printed
    assert "missing keys" not in printed and "positions" not in printed
    card = (output / "model" / "README.md").read_text()
    assert "train.py sft" in card and "recompute" in card and "seed: 5" in card and "| loss | " in card
    assert (output / "curves.png").stat().st_size > 10_000
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4] * 3 + [8] * 3 + [9] * 3
    assert {step for step, key, _ in losses(output) if key == "loss"} == set(range(1, STEPS + 1))
    assert not list((output / "model").glob("*.bin"))


def test_loss_falls_and_its_parts_are_told_apart(finished) -> None:
    found = {(step, key): value for step, key, value in losses(finished[0])}
    assert found[STEPS, "eval_loss"] < found[EVERY, "eval_loss"] < 4.5
    assert found[1, "structure"] > 0
    assert found[1, "loss"] == pytest.approx(found[1, "cross_entropy"] + found[1, "structure"], rel=1e-3)


def test_checkpoint_knows_how_it_was_trained(finished) -> None:
    model_dir = finished[0] / "model"
    record = read_record(model_dir)
    assert (record.policy, record.markup, record.steps) == ("recompute", "hcot", STEPS)
    assert [phase["policy"] for phase in record.curriculum] == ["off", "recompute"]
    assert record.data_hash and record.structure_loss["structure"] == "mass" and "train.py" in record.command
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    with pytest.raises(ValueError, match="trained under policy recompute"):
        Engine(model, tokenizer, policy="evict")
    engine = Engine(model, tokenizer)
    assert engine.policy == "recompute"
    [done] = engine.generate([Request("1", tuple(tokenizer.encode("a=1+2;a?")), SamplingParams(max_gen_toks=5))])
    assert done.token_ids


def test_killed_and_resumed_it_ends_the_same(finished, tmp_path) -> None:
    """SIGTERM and Ctrl-C save a checkpoint of the step, SIGKILL nothing."""
    config, checkpoints = settings(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    process = start(tmp_path, config)
    wait_for(process, checkpoints / f"checkpoint-{EVERY}" / "config.json")  # it is being written
    for _ in range(2):  # as torchrun does
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143
    told = re.fullmatch(
        r"stopped at step (\d); the same command goes on from step \1 \(checkpoint-\1\)", output.splitlines()[-1]
    )
    assert told and EVERY <= int(told[1]) < STEPS and "Traceback" not in output

    if FULL:
        process = start(tmp_path, config)
        assert any("going on from" in line for line in process.stdout)
        time.sleep(0.2)
        process.kill()
        process.wait()
    assert not (tmp_path / "run" / "model").exists()
    assert run(tmp_path, config).startswith("going on from checkpoint-")
    assert losses(tmp_path / "run") == losses(finished[0])
    ours, theirs = weights(tmp_path / "run"), weights(finished[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_is_one_line_that_says_where_it_goes_on(finished, tmp_path) -> None:
    process = start(tmp_path, settings(tmp_path / "run"))
    wait_for(process, tmp_path / "run" / "checkpoints" / f"checkpoint-{EVERY}" / "trainer_state.json")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert re.fullmatch(
        r"stopped at step (\d); the same command goes on from step \1 \(checkpoint-\1\)", output.splitlines()[-1]
    )
    assert "Traceback" not in output and "KeyboardInterrupt" not in output
    run(tmp_path, settings(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(finished[0])


def test_two_processes_train_as_one(finished, tmp_path) -> None:
    """Each takes one of the two rows of a step; rows differ in how many targets they have."""
    config = settings(tmp_path / "run")
    config["trainer"] = {**config["trainer"], "per_device_train_batch_size": 1}
    process = start(tmp_path, config, processes=2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    found, expected = losses(tmp_path / "run"), losses(finished[0])
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-4, abs=1e-6)


# --- without evaluations ----------------------------------------------------------------------------------------------


def short(output: Path, steps: int = 2, **trainer) -> dict:
    given = settings(output, phases=[{"policy": "recompute", "steps": steps}])
    return {**given, "evaluation": {"every": 10, "problems": 0}, "trainer": {**given["trainer"], **trainer}}


def test_a_run_can_be_made_longer_and_be_shown_elsewhere(tmp_path) -> None:
    first = run(tmp_path, short(tmp_path / "run", 3))
    assert "too few evaluations to tell: 1, and 5 are needed" in first
    longer = short(tmp_path / "run", 6, save_steps=1, save_total_limit=5, logging_steps=2)
    second = run(tmp_path, longer)
    assert second.startswith("going on from checkpoint-3\n") and "it has 6 steps now, in place of 3" in second
    records = read_records(tmp_path / "run" / "curves.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 6]
    assert [r["step"] for r in records if "eval_loss" in r] == [3, 6]
    assert read_record(tmp_path / "run" / "model").steps in (3, 6)
    before, after = (
        load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{n}" / "model.safetensors") for n in (3, 4)
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)  # the old schedule had ended at rate 0
    assert "phases.0.steps: 6 there, 5 now" in refused(tmp_path, short(tmp_path / "run", 5))


def test_checkpoints_come_between_evaluations(tmp_path) -> None:
    run(tmp_path, short(tmp_path / "run", 5, save_steps=2, save_total_limit=9))
    found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert found == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}


def test_the_training_loss_is_logged_with_each_evaluation(tmp_path) -> None:
    assert "too few evaluations to tell: 1," in run(tmp_path, short(tmp_path / "run", 5, logging_steps=10))


@only_in_full
def test_compiled_it_learns_the_same(tmp_path) -> None:
    run(tmp_path, short(tmp_path / "plain"))
    run(tmp_path, short(tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager"))
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert [row[2] for row in compiled] == pytest.approx([row[2] for row in plain], rel=1e-4, abs=1e-6)


REFUSED = {
    "trainer.learning_rat is unknown; did you mean learning_rate?": {"learning_rat": 1},
    "trainer.use_liger_kernel cannot be set here: it replaces the forward": {"use_liger_kernel": True},
    "trainer.enable_jit_checkpoint cannot be set here: SIGTERM saves": {"enable_jit_checkpoint": True},
    "trainer.label_smoothing_factor cannot be set here: the loss": {"label_smoothing_factor": 0.1},
    "trainer.hub_token cannot be set here: nothing is uploaded": {"hub_token": "x", "push_to_hub": True},
    "trainer.push_to_hub cannot be set here: .*hcot push OUTPUT/model --to OWNER/NAME": {"push_to_hub": True},
    "trainer.report_to=dvclive cannot be used: .*pip install dvclive": {"report_to": "dvclive"},
    "trainer.report_to=tensorbord cannot be used: tensorbord is not supported": {"report_to": "tensorbord"},
    "trainer.fsdp shards a model over several processes with a GPU each; here are 1 on cpu": {"fsdp": "full_shard"},
    "section trainer needs what is not installed: .*deepspeed": {"deepspeed": "none.json"},
    "section trainer needs what is not installed: .*galore": {"optim": "galore_adamw"},
    "trainer.accelerator_config.split_batches cannot be set": {"accelerator_config": {"split_batches": True}},
    "trainer.save_steps=0.5 is not allowed": {"save_steps": 0.5},
}


@pytest.mark.parametrize("told", REFUSED)
def test_mistakes_are_one_line_before_anything_is_made(tmp_path, told) -> None:
    message = refused(tmp_path, short(tmp_path / "run", **REFUSED[told]))
    assert re.search(f"^error: {told}", message), message
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_told_at_the_start(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        told = f"error: output={output} cannot be written: {tmp_path / 'file'} is no folder"
        assert refused(tmp_path, short(output)).startswith(told)


def test_a_folder_without_a_checkpoint_holds_no_run(tmp_path) -> None:
    config = short(tmp_path / "run")
    RunDirectory(tmp_path / "run").claim(parse_config(short(tmp_path / "run", 7, learning_rate=1)))
    run(tmp_path, config)
    assert "holds a run with other settings" in refused(tmp_path, short(tmp_path / "run", learning_rate=1))


def test_a_window_that_no_prompt_fits_into_is_refused(tmp_path) -> None:
    config = short(tmp_path / "run")
    config["evaluation"] |= {"problems": 4, "max_context": 3}
    told = refused(tmp_path, config)
    assert re.search(r"evaluation.max_context=3 has no room behind 4 of 4 prompts; the longest has \d+ tokens", told)


def test_traces_longer_than_the_model_knows_positions_are_a_warning(tmp_path) -> None:
    config = short(tmp_path / "run", 1)
    config["tiny"]["positions"] = 24
    needed = int(re.search(r"the traces need (\d+) positions, the model's config has 24", run(tmp_path, config))[1])
    assert 24 < needed <= 128


def test_help_is_instant_and_teaches() -> None:
    """Nothing heavy is imported for it."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "sft", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "--override" in done.stdout
    assert "argparse" in done.stderr and "torch" not in done.stderr and "pydantic" not in done.stderr
