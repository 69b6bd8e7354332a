"""The check of the path for GPUs, in the form in which a CPU runs it, and what it has to notice."""

from __future__ import annotations

import json

import check_gpu
import pytest
import torch
from bench import gpu
from bench.gpu import Identity, compare

from hcot_lmeval.engine.device import choice
from hcot_lmeval.engine.device.attention import Sdpa

CPU = torch.device("cpu")


def test_on_the_cpu_it_checks_what_it_can_and_names_the_rest(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "KINDS", ("qwen3",))
    path = tmp_path / "check.json"
    assert check_gpu.main(["--device", "cpu", "--rows", "3", "--tokens", "50", "--json", str(path)]) == 0
    out, told = capsys.readouterr().out, json.loads(path.read_text())
    assert "all checks passed that a CPU can run. Left out, for want of CUDA: the flash kernels" in out
    assert "flash: not run:" in out
    assert {probe["backend"] for probe in told["probes"] if probe["errors"]} == {"sdpa"}
    assert {(found["policy"], found["prunes"] > 0) for found in told["identity"]} == {
        ("off", False),
        ("recompute", True),
        ("evict", True),
    }
    assert all(found["mismatches"] == 0 and found["tokens"] > 60 for found in told["identity"])
    assert told["failed"] is False and told["versions"]["torch"]


@pytest.mark.parametrize("policy", ["recompute", "evict"])
def test_a_loop_that_keeps_its_thoughts_is_noticed(policy, monkeypatch):
    """The twin differs as soon as the rows see what they should not."""
    model, plain = gpu.small_model("qwen2"), Sdpa.decode
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

    monkeypatch.setattr(gpu, "MAKERS", {"sdpa": Sdpa, "wrong": Wrong, "broken": Broken})
    monkeypatch.setattr(choice, "MAKERS", gpu.MAKERS)
    need = gpu.layers(CPU)["window of 70, float32"]
    monkeypatch.setattr(gpu, "layers", lambda device: {"one": need})
    assert check_gpu.main(["--device", "cpu", "--only", "probes"]) == 1
    out = capsys.readouterr().out
    assert "wrong: WRONG on one" in out and "broken: FAILED: RuntimeError: no kernel image (1 layers)" in out
    assert "something is wrong" in out and "sdpa: " not in out
