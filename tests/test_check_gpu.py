"""The check of the path for GPUs, in the form in which a CPU runs it, and what it has to notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import timing
from bench.gpu import cli, identity, probes, steps
from bench.gpu.identity import Identity, compare
from bench.models import make_model

from hcot_lmeval.engine.device import choice
from hcot_lmeval.engine.device.attention import Sdpa
from hcot_lmeval.engine.device.graphs import Runner
from hcot_lmeval.engine.device.state import State

CPU = torch.device("cpu")


def test_on_the_cpu_it_checks_what_it_can_and_names_the_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(identity, "KINDS", ("qwen3",))
    monkeypatch.setitem(steps.READ_BYTES, "cpu", 2**20)
    path = tmp_path / "check.json"
    assert cli.main(["--device", "cpu", "--rows", "3", "--tokens", "50", "--steps", "2", "--json", str(path)]) == 0
    out, told = capsys.readouterr().out, json.loads(path.read_text())
    assert "all checks passed that a CPU can run. Left out, for want of CUDA: the flash kernels" in out
    assert "flash: not run:" in out and "L1, batch 2, live 64: not run: CUDA graphs need CUDA, not cpu" in out
    assert {probe["backend"] for probe in told["probes"] if probe["errors"]} == {"sdpa"}
    assert {(found["policy"], found["prunes"] > 0) for found in told["identity"]} == {
        ("off", False),
        ("recompute", True),
        ("evict", True),
    }
    assert all(found["mismatches"] == 0 and found["tokens"] > 60 for found in told["identity"])
    assert [(found["level"], found["ms"] is None) for found in told["steps"]] == [("L0", False), ("L1", True)]
    assert told["failed"] is False and told["versions"]["torch"]


@pytest.mark.parametrize("policy", ["recompute", "evict"])
def test_a_loop_that_keeps_its_thoughts_is_noticed(policy, monkeypatch):
    """The twin differs as soon as the rows see what they should not."""
    model, plain = identity.make_model("qwen2"), Sdpa.decode
    assert compare(model, Identity("qwen2", policy), rows=3, tokens=50).passed

    def short_sighted(self, query, keys, values, at, scores):
        return plain(self, query, keys, values, at._replace(first=(at.lengths - 4).clamp_min(0)), scores)

    monkeypatch.setattr(Sdpa, "decode", short_sighted)
    monkeypatch.setattr(choice, "wrong", lambda backend, need: "")
    found = compare(model, Identity("qwen2", policy), rows=3, tokens=50)
    assert found.mismatches > 0 and not found.passed


def test_a_kernel_that_is_wrong_or_breaks_fails(monkeypatch, capsys):
    class Wrong(Sdpa):
        def decode(self, query, keys, values, at, scores):
            return super().decode(query, keys, values, at, scores) * 1.1

    class Broken(Sdpa):
        def chunk(self, *given):
            raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(probes, "MAKERS", {"sdpa": Sdpa, "wrong": Wrong, "broken": Broken})
    monkeypatch.setattr(choice, "MAKERS", probes.MAKERS)
    need = probes.layers(CPU)["window of 70, float32"]
    monkeypatch.setattr(probes, "layers", lambda device: {"one": need})
    assert cli.main(["--device", "cpu", "--only", "probes"]) == 1
    out = capsys.readouterr().out
    assert "wrong: WRONG on one" in out and "broken: FAILED: RuntimeError: no kernel image (1 layers)" in out
    assert "something is wrong" in out and "sdpa: " not in out


def test_a_step_that_cannot_be_captured_fails(monkeypatch):
    monkeypatch.setattr(steps, "skipped", lambda level, device: "")
    monkeypatch.setattr(Runner, "record", lambda self, rows: (_ for _ in ()).throw(RuntimeError("a wait")))
    monkeypatch.setitem(steps.READ_BYTES, "cpu", 2**20)
    (l0, l1) = steps.time_levels(make_model("tiny"), ["L0", "L1"], [2], [20], steps=2)
    assert l0.ms and l0.of_floor and not l0.failed
    assert l1.failed and "could not be captured" in l1.reason


def test_rows_that_do_not_make_every_step_are_noticed(monkeypatch):
    monkeypatch.setitem(steps.READ_BYTES, "cpu", 2**20)
    monkeypatch.setattr(State, "begin", lambda self, slot, request, ends: None)
    (found,) = steps.time_levels(make_model("tiny"), ["L0"], [2], [20], steps=2)
    assert found.failed and "rows made [0] steps, not 5" in found.reason


def test_weights_that_are_read_twice_count_once():
    model = make_model("tiny")
    expected = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    assert steps.weight_bytes(model) == expected


def test_the_clock_runs_the_work_and_graphs_are_for_cuda():
    done: list[int] = []
    assert timing.seconds(lambda: done.append(1), CPU, runs=5) >= 0 and len(done) == 5
    work = done.clear
    assert timing.as_graph(work, CPU) == work


def test_help_is_instant():
    script = Path(__file__).resolve().parents[1] / "scripts" / "check_gpu.py"
    code = "import os, runpy, sys\nsys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
    code += "try:\n    runpy.run_path(sys.argv[1], run_name='__main__')\nexcept SystemExit:\n    pass\n"
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(script), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "probes" in ran.stdout and "--levels L0 L1 L2" in ran.stdout
