"""Training as a user runs it: the script, from settings to a checkpoint; killed, resumed, in two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.record import read_record
from hcot_lmeval.training.monitor.curves import read_records
from tests.interrupts import heed_interrupts

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "train.py"
STEPS, EVERY = 9, 4
LOSS_KEYS = ("loss", "cross_entropy", "cross_entropy_marker", "structure", "eval_loss", "eval_loss_markers")


def settings(output: Path, **changes) -> dict:
    source = {"path": "synthetic:arith", "options": {"size": 60, "depths": [1, 2, 3], "seed": 5}}
    return {
        "model": "tiny",
        "tiny": {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "head_dim": 16},
        "output": str(output),
        "data": {
            "train": [source],
            "held_out": [{**source, "split": "validation", "options": {"size": 8, "depths": [2]}}],
            "row_length": 160,
        },
        "phases": [{"policy": "off", "steps": 3}, {"policy": "recompute", "steps": STEPS - 3}],
        "evaluation": {"every": EVERY, "problems": 3, "max_context": 96, "max_gen_toks": 60},
        "trainer": {"per_device_train_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1, "warmup_steps": 0},
        **changes,
    }


def start(folder: Path, config: dict, processes: int = 1) -> subprocess.Popen:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launch, str(SCRIPT), "sft", str(file)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_interrupts,
    )


def run(folder: Path, config: dict, processes: int = 1) -> str:
    process = start(folder, config, processes)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def losses(output: Path) -> list[tuple]:
    records = read_records(output / "curves.jsonl")
    return [(r["step"], key, r[key]) for r in records for key in LOSS_KEYS if key in r]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", run(folder, settings(folder / "run"))


def test_leaves_model_card_curves_and_samples(finished) -> None:
    output, printed = finished
    assert "packed rows" in printed and "too few points" in printed
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
    config = settings(tmp_path / "run")
    process = start(tmp_path, config)
    state = tmp_path / "run" / "checkpoints" / f"checkpoint-{EVERY}" / "trainer_state.json"
    while not state.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "model").exists()
    assert run(tmp_path, config).startswith("going on from checkpoint-")
    assert losses(tmp_path / "run") == losses(finished[0])
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (tmp_path / "run", finished[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ctrl_c_is_one_line_that_says_where_it_goes_on(tmp_path) -> None:
    process = start(tmp_path, settings(tmp_path / "run"))
    while not (tmp_path / "run" / "checkpoints" / f"checkpoint-{EVERY}" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130
    assert re.fullmatch(
        r"stopped at step \d; the same command goes on from step \d \(checkpoint-\d\)", output.splitlines()[-1]
    )
    assert "Traceback" not in output and "KeyboardInterrupt" not in output


def test_two_processes_train_as_one(finished, tmp_path) -> None:
    """Each takes one of the two rows of a step; rows differ in how many targets they have."""
    config = settings(tmp_path / "run")
    config["trainer"] = {**config["trainer"], "per_device_train_batch_size": 1}
    run(tmp_path, config, processes=2)
    found, expected = losses(tmp_path / "run"), losses(finished[0])
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-4, abs=1e-6)


def test_traces_longer_than_the_model_knows_positions_are_a_warning(tmp_path) -> None:
    config = settings(tmp_path / "run", phases=[{"policy": "off", "steps": 1}])
    config["tiny"]["positions"] = 24
    printed = run(tmp_path, {**config, "evaluation": {"every": 1, "problems": 0}})
    needed = int(re.search(r"the traces need (\d+) positions, the model's config has 24", printed)[1])
    assert 24 < needed <= 160


def test_mistakes_are_one_line(tmp_path) -> None:
    config = settings(tmp_path / "run")
    config["trainer"]["learning_rat"] = 1
    process = start(tmp_path, config)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: trainer.learning_rat is unknown; did you mean learning_rate?" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_help_is_instant_and_teaches() -> None:
    """Nothing heavy is imported for it."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "sft", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--override" in done.stdout
    assert "argparse" in done.stderr and "torch" not in done.stderr and "pydantic" not in done.stderr
