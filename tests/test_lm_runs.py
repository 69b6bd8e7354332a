"""Whole runs: killed and started again, resumed with the same and with other arguments, spread over two processes."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hcot_lmeval.lm import HcotLM
from tests.lm_process import evaluate
from tests.lm_tasks import QUESTIONS, instances
from tests.tiny import favour, save_tiny, tiny_model, tiny_tokenizer

SCRIPT = Path(__file__).with_name("lm_process.py")
SAMPLED = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 40}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = favour(tiny_model("qwen2", torch.float64), [3, 4, 5], 5.0)
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "model", model)


def run(checkpoint, out, *arguments, launcher=()):
    """Runs an evaluation in a process of its own and returns (exit status, standard error)."""
    command = [sys.executable, *launcher, str(SCRIPT), checkpoint, str(out), *arguments]
    paths = [str(SCRIPT.parent), str(SCRIPT.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return process.returncode, process.stderr


def scored(result):
    """What was scored, by document; lm-eval hangs the answers of its padding on `resps` as well."""
    return {s["doc_id"]: {k: v for k, v in s.items() if k != "resps"} for s in result["samples"]}


@pytest.fixture(scope="module")
def undisturbed(checkpoint):
    """The results of a run that nothing happens to."""
    return evaluate(checkpoint, journal="off")[1]


def test_a_killed_run_continues_without_loss(checkpoint, undisturbed, tmp_path, caplog):
    out, journal = tmp_path / "out.json", str(tmp_path / "journal")
    status, error = run(checkpoint, out, f"journal={journal}", "die_after=6")
    assert status == -signal.SIGKILL, error
    assert not out.exists()
    with caplog.at_level(logging.INFO, logger="lm_eval"):
        lm, resumed = evaluate(checkpoint, journal=journal)
    assert "5 of 14 requests are already finished" in caplog.text
    assert "journal=off generates anew" in caplog.text
    assert lm.engine.live.requests_done == 9
    assert resumed["samples"] == undisturbed["samples"]
    totals, expected = resumed["hcot"], undisturbed["hcot"]
    assert totals["resumed_requests"] == 5
    for name in ("requests", "generated_tokens", "pruned_tokens", "finish_reasons", "malformed", "peak_live_tokens"):
        assert totals[name] == expected[name]


def test_two_processes_do_each_problem_once(checkpoint, undisturbed, tmp_path):
    """Seven documents on two ranks: uneven, so lm-eval pads the second one."""
    out, journal = tmp_path / "out.json", tmp_path / "journal"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    status, error = run(checkpoint, out, f"journal={journal}", launcher=launcher)
    assert status == 0, error
    ranks = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    assert ranks == [{"world": 2, "generated": 8}, {"world": 2, "generated": 6}]
    result = json.loads(out.read_text())
    assert scored(result) == scored(undisturbed)
    for name in ("requests", "generated_tokens", "prune_events", "finish_reasons", "max_depth"):
        assert result["hcot"][name] == undisturbed["hcot"][name]
    assert result["hcot"]["ranks"] == 2
    (directory,) = journal.iterdir()
    assert sorted(path.name.split("-")[2] for path in directory.iterdir()) == ["rank0", "rank1"]
    _, again = evaluate(checkpoint, journal=str(journal))  # one process finds what two have done
    assert again["hcot"]["resumed_requests"] == 14


@pytest.fixture
def load(checkpoint, tmp_path):
    def make(**changes):
        arguments = {"pretrained": checkpoint, "dtype": "float64", "max_context": 256, "journal": tmp_path / "journal"}
        return HcotLM(device="cpu", **{**arguments, **changes})

    return make


def generated(lm, **kwargs):
    """How many requests of a fixed set the model generates anew."""
    lm.generate_until(instances(QUESTIONS[:3], **{**SAMPLED, **kwargs}), disable_tqdm=True)
    return lm._statistics.requests - lm._statistics.resumed


def test_the_same_arguments_reuse_whatever_the_batch_size(load, caplog):
    assert generated(load(batch_size=1)) == 3
    with caplog.at_level(logging.INFO, logger="hcot_lmeval"):
        assert generated(load(batch_size=4, notes=load().options.journal / "notes")) == 0
    assert "3 of 3 requests are already finished" in caplog.text
    assert "journal=off generates anew" in caplog.text


def test_an_answer_from_the_journal_is_the_answer(load):
    first = load().generate_until(instances(**SAMPLED))
    again = load().generate_until(instances(**SAMPLED))
    assert [vars(answer) for answer in again] == [vars(answer) for answer in first]
    assert again == first


@pytest.mark.parametrize(
    "changes",
    [
        {"pruning": "evict"},
        {"pruning": "off"},
        {"max_context": 255},
        {"dtype": "float32"},
        {"seed": 1},
        {"apply_chat_template": False},
        {"enable_thinking": True},
        {"journal": "off"},
    ],
    ids=str,
)
def test_other_arguments_never_reuse(load, changes):
    assert generated(load()) == 3
    assert generated(load(**changes)) == 3
    assert generated(load()) == 0  # and do not overwrite either


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.9}, {"max_gen_toks": 41}, {"until": ["x"]}, {"seed": 1}], ids=str
)
def test_other_generation_kwargs_never_reuse(load, changes):
    assert generated(load()) == 3
    assert generated(load(), **changes) == 3


def test_greedy_results_do_not_depend_on_the_seed(load):
    assert generated(load(), do_sample=False, temperature=0.0) == 3
    assert generated(load(seed=1), do_sample=False, temperature=0.0) == 0


def test_other_weights_never_reuse(load, checkpoint):
    assert generated(load()) == 3
    other = save_tiny(Path(checkpoint).parent / "other", favour(tiny_model("qwen2", torch.float64, seed=1), [3], 5.0))
    assert generated(load(pretrained=other)) == 3


@pytest.mark.parametrize(
    ("option", "anew"), [({"weights": "plain"}, 0), ({"huge_pages": False}, 0), ({"compute": "torch"}, 3)]
)
def test_options_that_change_no_bit_go_on_with_the_same_journal(tmp_path, option, anew):
    def make(**options):
        model, files = tiny_model("qwen2"), {"journal": tmp_path, "max_context": 256}
        return HcotLM(pretrained=model, tokenizer=tiny_tokenizer(), **files, **options)

    assert generated(make()) == 3
    assert generated(make(**option)) == anew


@pytest.mark.parametrize("seed", [0, 1])
def test_models_in_memory_are_told_apart_by_their_weights(tmp_path, seed):
    def make(seed):
        return HcotLM(
            pretrained=tiny_model("qwen2", seed=seed), tokenizer=tiny_tokenizer(), journal=tmp_path, max_context=256
        )

    assert generated(make(0)) == 3
    assert generated(make(seed)) == (3 if seed else 0)


def test_another_tokenizer_never_reuses(tmp_path):
    def make(**parts):
        return HcotLM(
            pretrained=tiny_model("qwen2"), tokenizer=tiny_tokenizer(**parts), journal=tmp_path, max_context=256
        )

    assert make().run_facts != make(chat=False).run_facts
    assert make().run_facts == make().run_facts


def test_the_journal_lies_in_the_cache_directory_by_default(checkpoint, _own_cache):
    lm = HcotLM(pretrained=checkpoint, device="cpu", max_context=256)
    lm.generate_until(instances(QUESTIONS[:1]))
    assert len(list((_own_cache / "journal").glob("*/*.jsonl"))) == 1
