"""The benchmark's command line: tables, files, and words that it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from bench import choosing, cli, floor, machine, models

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def quiet(doing: str) -> None:
    """Nobody watches."""


def test_live_contexts_are_asked_for_and_compared_with_the_best_batch(capsys, monkeypatch):
    monkeypatch.setattr(floor, "STEPS", 1)
    line = "--shape tiny --threads 1 --tokens 60 --prompt 7 --live 60 45 --batch 1 2 --repeats 1"
    assert cli.main([*line.split(), "--engines", "generate", "recompute"]) == 0
    table = capsys.readouterr().out.split("beside the best batch of generate, ")[1].splitlines()
    best = table[0].removesuffix(" tokens/s").split(" at ")[1]
    rows = [line.split() for line in table[2:10]]
    assert [row[0] for row in rows] == ["generate", "recompute"] * 4
    assert [row[1] for row in rows] == [*"11112222"]
    assert [int(row[2]) <= limit for row, limit in zip(rows[1::2], (60, 45, 60, 45), strict=True)] == [True] * 4
    assert [row[0] for row in rows if row[3:] == [best, "1.00"]] == ["generate"]
    assert cli.main([*line.replace("60 45", "12").split(), "--engines", "generate"]) == 1
    assert "live=12 is too little" in capsys.readouterr().err


def test_the_command_line_prints_a_table_and_writes_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(floor, "STEPS", 1)
    path = tmp_path / "bench.json"
    line = "--shape tiny --threads 1 --tokens 40 --prompt 7 --thought 9 --batch 1 2 --repeats 1 --check"
    engines = ["generate", "recompute", "vllm"]
    assert cli.main([*line.split(), "--engines", *engines, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "recompute:" in out and "standard deviations" in out
    assert "batch 2: 40 tokens a row after a prompt of 7" in out and "vllm: not run: not installed" in out
    told = json.loads(path.read_text())
    assert [result["batch"] for result in told["results"]] == [1, 2]
    assert [engine["engine"] for engine in told["results"][0]["engines"]] == engines
    assert told["versions"]["torch"] == version("torch") and told["machine"]["threads"] == "1"
    assert told["arguments"]["thought"] == 9 and float(told["machine"]["cores used by others"]) >= 0
    assert len(told["results"][0]["engines"][0]["runs"]) == len(told["results"][0]["floors"]) == 1


def test_weights_can_have_the_values_of_a_checkpoint_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(floor, "STEPS", 1)
    made, make_model = [], models.make_model
    monkeypatch.setattr(models, "make_model", lambda *a, **k: made.append(make_model(*a, **k)) or made[-1])
    line = ["--shape", "tiny", "--tokens", "40", "--prompt", "7", "--thought", "9", "--repeats", "1", "--batch", "1"]
    for given in ([], ["--rounded"]):
        path = tmp_path / "bench.json"
        options = ["--option", "weights=packed", "--engines", "recompute", "--json", str(path)]
        assert cli.main([*line, *given, *options]) == 0
        assert json.loads(path.read_text())["arguments"]["rounded"] is bool(given)
    as_made, rounded = (model.lm_head.weight for model in made)
    assert as_made.dtype == rounded.dtype == torch.float32
    assert torch.equal(rounded, as_made.bfloat16().float()) and not torch.equal(rounded, as_made)


def test_other_measurements_have_commands(capsys, monkeypatch):
    monkeypatch.setattr(floor, "STEPS", 1)
    tiny = ["--shape", "tiny", "--threads", "1", "--repeats", "1"]
    assert cli.main(["prune", *tiny, "--solution", "3", "--context", "20", "--thought", "9", "30"]) == 0
    assert "ratio: median" in capsys.readouterr().out
    assert cli.main(["long", *tiny, "--tokens", "90", "--thought", "20", "--prompt", "9", "--batch", "1"]) == 0
    assert "x off" in capsys.readouterr().out
    assert cli.main(["long", *tiny, "--tokens", "90", "--max-live", "50", "--batch", "1"]) == 1
    assert "error: the pruned trace has" in capsys.readouterr().err


def test_ways_to_choose_a_token_take_turns(capsys, tmp_path):
    assert cli.main(["sampling", "--batch", "1", "3", "--vocabulary", "400", "--repeats", "2",
                     "--json", str(tmp_path / "file.json")]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "transformers" in printed and "native" in printed and "triton: not run: on CUDA only" in printed
    results = json.loads((tmp_path / "file.json").read_text())["results"]
    assert len(results) == 2 * 3 * 4
    assert all(len(r["seconds"]) == 2 and min(r["seconds"]) > 0 for r in results if not r["reason"])


def test_a_way_that_chooses_other_tokens_is_an_error(monkeypatch):
    monkeypatch.setattr(choosing, "sampler_for", lambda dtype: lambda logits, draws: [0] * len(draws))
    with pytest.raises(AssertionError, match="native chose other tokens"):
        choosing.time_choices([4], 300, torch.device("cpu"), 1, quiet)


def test_who_else_used_the_processors_is_said(monkeypatch):
    """Of 4 seconds in which a core was busy 1.5 were this process's own and its children's."""
    Everyone, Own = namedtuple("Everyone", "user nice system idle steal"), namedtuple("Own", "a b c d iowait")
    clock = iter([10.0, 12.0, 12.0])
    readings = iter([Everyone(1, 1, 1, 50, 1), Everyone(3, 1, 2, 80, 2), Everyone(3, 1, 2, 80, 2)])
    own = iter([Own(1, 0, 0, 0, 9), Own(1.5, 0.5, 0.25, 0.25, 99), Own(1.5, 0.5, 0.25, 0.25, 99)])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: next(readings))
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.psutil.Process, "cpu_times", lambda _: next(own))
    found = machine.OtherLoad()
    assert found.cores() == 2.5 / 2
    assert found.warning().startswith("warning: others used 1.2 of 2 cores meanwhile")


@pytest.mark.parametrize("line", ["--engines vlllm", "--option backend", "--shape 7B", "fast"])
def test_what_is_unknown_is_refused(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert line.split()[-1] in capsys.readouterr().err


WRONG = {
    "sampling --vocabulary 0": "vocabulary=0",
    "sampling --batch 4 0": "batch=0",
    "--temperature nan --shape tiny": "temperature=nan",
    "--option compute=cuda --shape tiny": "compute='cuda' is unknown",
    "--option foo=1 --shape tiny": "foo",
}


@pytest.mark.parametrize("line", WRONG)
def test_numbers_and_options_are_looked_at_before_a_model_is_made(line, capsys, monkeypatch):
    monkeypatch.setattr(models, "make_model", lambda *_, **__: pytest.fail("a model was made"))
    assert cli.main(line.split()) == 1
    assert WRONG[line] in capsys.readouterr().err


def test_examples_in_the_help_are_commands_that_work(capsys):
    for line in (["--help"], ["engines", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(line)
        printed = capsys.readouterr().out
        assert "engines prune" not in printed and " prune --context" in printed


def test_help_needs_no_heavy_library():
    code = f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nfrom bench.cli import main\n"
    code += "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'tqdm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "of floor" in done.stdout and done.stdout.strip().endswith("[]")
