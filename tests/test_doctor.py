"""``hcot doctor``: every form of this machine in a table, a report without paths, and a status that tells."""

from __future__ import annotations

import json

import pytest

from hcot_lmeval import command, doctor
from hcot_lmeval.engine import Engine
from hcot_lmeval.engine.decoder import Decoder


def run(capsys, *words: str) -> tuple[int, str, str]:
    status = command.run("doctor", list(words))
    told = capsys.readouterr()
    return status, told.out, told.err


def test_the_forms_of_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "WIDTHS", (32,))
    status, told, _ = run(capsys, "--device", "cpu", "--out", str(tmp_path / "report.json"))
    assert status == 0 and "wrong" not in told
    report = json.loads((tmp_path / "report.json").read_text())
    forms = {each["form"]: each for each in report["forms"]}
    assert set(doctor.forms("cpu")) < set(forms) and "compiled, vectors of 32 bytes" in forms
    assert forms["default"]["used"] and forms["default"]["state"] == "right"
    assert forms["device's loop"]["state"] == "right" and forms["device's loop"]["difference"] < 1e-3
    assert forms["PyTorch, host's loop"]["difference"] == 0
    assert report["versions"]["torch"] and report["machine"]["cpu"] and report["model"]["model_type"] == "qwen2"


def test_a_report_names_no_folder():
    model = Engine.from_pretrained("tiny-hcot").decoder.model
    found = doctor.Finding(
        "compiled", {}, False, "not here", reason="nvcc: /data/somebody/kernel.cu:3: error, see '/tmp/x/log'"
    )
    [told] = doctor.report([found], model, "cpu")["forms"]
    assert told["reason"] == "nvcc: ...:3: error, see '...'"


def test_a_default_that_is_wrong_ends_with_status_1(capsys, monkeypatch):
    plain = Decoder.forward

    def shifted(self, *rest):
        logits = plain(self, *rest)
        return logits.roll(1, -1) if self.options.compute == "auto" else logits

    monkeypatch.setattr(Decoder, "forward", shifted)
    status, told, wrong = run(capsys, "--device", "cpu", "--only", "default", "PyTorch")
    assert status == 1 and "used, and not right: default (wrong)" in wrong and "off by" in told


def test_forms_that_are_not_here_say_why(capsys):
    status, told, _ = run(capsys, "--device", "cpu", "--only", "compiled", "--dtype", "float64")
    assert status == 0 and "not here" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "cuda graphs"], "--only cuda graphs: there are 'default', 'PyTorch, host's loop'"),
        (["--device", "cuda:9"], "device='cuda:9' is not in this machine"),
        (["--model", "/nope"], "could not be loaded"),
        (["--model", "tiny-hcott"], "did you mean tiny-hcot?"),
        (["--out", "/proc/nowhere/report.json"], "No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(capsys, words, told):
    status, _, error = run(capsys, *words)
    assert status == 1 and told.replace("'", "") in error.replace("'", "").replace('"', "")
