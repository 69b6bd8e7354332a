"""``hcot train grpo`` as a user runs it: from settings to a model; killed, resumed, in two processes; mistakes."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hcot_lmeval.assets import resolve
from hcot_lmeval.engine import Engine
from hcot_lmeval.record import read_record
from hcot_lmeval.training.curves import read_records
from tests.training_runs import refused, run, start, wait_for, weights

pytest.importorskip("trl")
SGD = {"optim": "sgd", "learning_rate": 0.3}
"""Updates that are smooth in the gradient, unlike the first ones of Adam."""
COMPARED = ("loss", "reward", "rollout/blocks", "completions/mean_length", "eval_accuracy", "eval_generated_tokens")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """tiny-hcot, made so unsure that its samples differ."""
    folder = tmp_path_factory.mktemp("start")
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny-hcot"), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny-hcot")).save_pretrained(folder)
    return folder


def settings(output: Path, checkpoint: Path | str, **changes) -> dict:
    source = {"path": "synthetic:arith", "options": {"size": 30, "depths": [1, 2], "seed": 5}}
    given = {
        "model": str(checkpoint),
        "output": str(output),
        "steps": 4,
        "data": {
            "train": [source],
            "held_out": [{**source, "split": "validation", "options": {"size": 6, "depths": [2]}}],
        },
        "rollout": {"max_context": 96, "max_gen_toks": 60, "batch_size": 8},
        "evaluation": {"every": 2, "problems": 4, "max_gen_toks": 60},
        "trainer": {"per_device_train_batch_size": 8, "num_generations": 4, "beta": 0.02, **SGD},
    }
    for name, value in changes.items():
        given[name] = {**given[name], **value} if isinstance(given.get(name), dict) else value
    return given


def numbers(output: Path) -> list[tuple]:
    records = read_records(output / "curves.jsonl")
    return [(record["step"], key, record[key]) for record in records for key in COMPARED if key in record]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", run(folder, settings(folder / "run", checkpoint), kind="grpo")


def test_leaves_a_model_that_knows_how_it_was_trained(finished, checkpoint):
    output, told = finished
    assert "30 of 30 rows have a question and an answer" in told and f"{output / 'model'} holds the model" in told
    record = read_record(output / "model")
    assert record.policy == "recompute" and record.curriculum[-1]["rewards"]["correctness"] == 1.0
    assert len(record.curriculum) == 1 + len(read_record(checkpoint).curriculum)
    assert Engine.from_pretrained(str(output / "model")).policy == "recompute"
    assert not list(output.rglob("model/training_args.bin"))
    assert (output / "curves.png").stat().st_size > 10_000
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {2, 4}


def test_every_step_says_what_it_saw(finished):
    records = [r for r in read_records(finished[0] / "curves.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["sampling/logp_difference/max"] < 1e-3  # one update a generation: always on its own weights
        assert {"kl", "entropy/text", "entropy/marker", "entropy/solution", "kl/solution"} <= record.keys()
        assert {f"rewards/{name}" for name in ("correctness", "structure", "compression")} <= record.keys()
        assert record["rollout/blocks"] > 0


def test_killed_and_resumed_it_ends_the_same(finished, checkpoint, tmp_path):
    output = tmp_path / "run"
    process = start(tmp_path, settings(output, checkpoint), kind="grpo")
    wait_for(process, output / "checkpoints" / "checkpoint-2" / "trainer_state.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = run(tmp_path, settings(output, checkpoint), kind="grpo")
    assert "going on from checkpoint-" in told
    for (step, key, one), (other_step, other_key, other) in zip(numbers(output), numbers(finished[0]), strict=True):
        assert (step, key) == (other_step, other_key) and one == pytest.approx(other, rel=1e-4, abs=1e-6), (step, key)
    after, before = weights(output), weights(finished[0])
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_two_processes_train_as_one(finished, checkpoint, tmp_path):
    output = tmp_path / "run"
    halves = settings(output, checkpoint, trainer={"per_device_train_batch_size": 4})
    process = start(tmp_path, halves, processes=2, kind="grpo")
    told = process.communicate()[0]
    assert process.returncode == 0, told
    for (step, key, one), (_, _, other) in zip(numbers(output), numbers(finished[0]), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4), (step, key)
    after, before = weights(output), weights(finished[0])
    assert all(torch.allclose(after[name], before[name], atol=2e-4) for name in before)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 4}},
        {"policy": "evict", "rollout": {"constraints": "grammar", "max_depth": 2, "force_answer": 8}},
        {"policy": "off", "rollout": {"temperature": 0.7, "max_context": None}, "trainer": {"loss_type": "dr_grpo"}},
        {"trainer": {"num_iterations": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}},
    ],
    ids=["lora", "evict", "off", "several updates"],
)
def test_other_ways_to_train(tmp_path, checkpoint, changes):
    config = settings(tmp_path / "run", checkpoint, steps=2, **changes)
    run(tmp_path, config, kind="grpo")
    records = [r for r in read_records(tmp_path / "run" / "curves.jsonl") if "loss" in r]
    assert records[0]["sampling/logp_difference/max"] < 1e-3
    assert (tmp_path / "run" / "adapter").exists() == ("lora" in changes)


def test_a_trainer_of_another_policy_is_noticed_at_the_first_step(tmp_path, checkpoint, monkeypatch):
    from hcot_lmeval.training import grpo_trainer

    plain = grpo_trainer.pack_traces
    monkeypatch.setattr(
        grpo_trainer, "pack_traces", lambda traces, grammar, policy, **more: plain(traces, grammar, "off")
    )
    told = run(tmp_path, settings(tmp_path / "run", checkpoint), status=1, kind="grpo")
    assert re.search(
        r"error: the engine and the trainer disagree on the same weights by up to [\d.]+ nats a token", told
    )


MISTAKES = {
    "rewards.corectness is unknown; did you mean correctness": {"rewards": {"corectness": 1.0}},
    "rewards.mine:reward cannot be imported": {"rewards": {"mine:reward": 1.0}},
    "rewards.other:raises raised KeyError: 'x'": {"rewards": {"other:raises": 1.0}},
    "rewards.other:short returned": {"rewards": {"other:short": 1.0}},
    "trainer.use_vllm cannot be set here: completions are written by the pruning engine": {
        "trainer": {"use_vllm": True}
    },
    "trainer.vllm_mode cannot be set here": {"trainer": {"vllm_mode": "server"}},
    "trainer.top_p cannot be set here: the loss is that of the whole distribution": {"trainer": {"top_p": 0.9}},
    "trainer.temperature cannot be set here; set rollout.temperature": {"trainer": {"temperature": 0.9}},
    "trainer.betta is unknown; did you mean beta?": {"trainer": {"betta": 0.9}},
    "rollout.temperature": {"rollout": {"temperature": 0}},
    "has no column 'question' and no column 'expected_answer'": {"data": {"train": [{"path": "rows.jsonl"}]}},
    "none of 1 rows has a question and an answer": {"data": {"train": [{"path": "empty.jsonl"}]}},
    "does not know the markers": {"tokens": {"markup": "pencil"}},
    "has no room behind 4 of 4 prompts": {"evaluation": {"max_context": 3}},
    "rollout.max_context=3 has no room behind 30 of 30 prompts": {"rollout": {"max_context": 3}},
    "force_answer=60 keeps all of max_gen_toks=60": {"rollout": {"force_answer": 60}},
    "generation_batch_size": {"trainer": {"num_generations": 3}},
    "trainer.loss_type='gspo' is not allowed; choose one of grpo, bnpo": {"trainer": {"loss_type": "gspo"}},
    "trainer.num_iterations=0 is not allowed": {"trainer": {"num_iterations": 0}},
    "trainer.beta=-1.0 is not allowed": {"trainer": {"beta": -1}},
    "trainer.scale_rewards='std' is not allowed": {"trainer": {"scale_rewards": "std"}},
    "evaluation.problems: Input should be greater than or equal to 1": {"evaluation": {"problems": 0}},
}


@pytest.mark.parametrize("told", MISTAKES)
def test_mistakes_are_one_line_before_the_first_step(tmp_path, checkpoint, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text("def raises(**columns): return {}['x']\ndef short(**columns): return []\n")
    (tmp_path / "rows.jsonl").write_text('{"problem": "q", "solution": "s"}\n')
    (tmp_path / "empty.jsonl").write_text('{"question": "q", "expected_answer": null}\n')
    message = refused(tmp_path, settings(tmp_path / "run", checkpoint, **MISTAKES[told]), kind="grpo")
    assert told in message and "Traceback" not in message
    assert not (tmp_path / "run" / "curves.jsonl").exists()
