"""The benchmark: the work is the same for all engines and is checked, and ratios are what they are said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from bench import cli, engines
from bench.cli import Measurement, WrongTokensError, checked_run, measure, table
from bench.engines import Contender, Generate, Setting, Timing, UnavailableError, make_model, prepare
from bench.llama import gguf_name, whole, write_gguf
from bench.work import CLOSE, ENGINES, MARKERS, OPEN, SHAPES, SPLIT, Script, Work, fitted, make_work

from hcot_lmeval.engine import SamplingParams
from hcot_lmeval.trace import LiveContext
from tests.tiny import tiny_model

SCRIPT = Script(tokens=40, prompt=7, thought=9, solution=3, text=2)
VOCABULARY = SHAPES["tiny"]["vocab_size"]
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def quiet(doing: str) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def model():
    return make_model("tiny")


def setting(model, batch: int = 2, *, stagger: bool = False, **fields) -> Setting:
    return Setting(model, make_work(batch, replace(SCRIPT, stagger=stagger), VOCABULARY), **fields)


def ready(name: str, given: Setting):
    try:
        return prepare(name, given)
    except UnavailableError as error:
        pytest.skip(str(error))


# --- the work ---------------------------------------------------------------------------------------------------------


def test_blocks_lie_where_the_script_says():
    trace = make_work(1, SCRIPT, VOCABULARY).traces[0]
    marks = [(i, token) for i, token in enumerate(trace) if token in MARKERS.ids]
    first = [(0, OPEN), (10, SPLIT), (14, CLOSE)]
    assert marks[:6] == first + [(i + SCRIPT.block, token) for i, token in first]
    assert SCRIPT.block == 17 and len(trace) == 40


def test_work_depends_on_its_arguments_alone_and_prompts_begin_differently():
    work = make_work(5, SCRIPT, VOCABULARY)
    assert work == make_work(5, SCRIPT, VOCABULARY)
    assert len(set(work.traces)) == 1 and len({prompt[0] for prompt in work.prompts}) == 5
    assert {len(prompt) for prompt in work.prompts} == {7}


def test_staggered_rows_end_their_blocks_in_different_steps():
    work = make_work(4, replace(SCRIPT, stagger=True), VOCABULARY)
    assert {len(trace) for trace in work.traces} == {40}
    first = [min(i for i, step in enumerate(work.steps(row, "recompute")) if step.is_prune) for row in range(4)]
    assert first == [14 + row * SCRIPT.block // 4 for row in range(4)]


@pytest.mark.parametrize("policy", ["off", "recompute", "evict"])
def test_live_tokens_are_those_of_the_rule(policy):
    work, peaks = make_work(3, replace(SCRIPT, stagger=True), VOCABULARY), []
    for prompt, trace in zip(work.prompts, work.traces, strict=True):
        context = LiveContext(MARKERS, policy)
        for token in prompt:
            context.push_inert(token)
        for token in trace:
            context.push(token)
        peaks.append(context.peak)
    assert work.peak_live(policy) == max(peaks)
    assert (work.peak_live("off") == 47) and (work.peak_live("recompute") < 47)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda name=name: Script(**{name: 0}), f"{name}=0 is not") for name in ("tokens", "prompt", "thought")),
        *((lambda n=n: make_work(n, SCRIPT, VOCABULARY), f"batch={n} ") for n in (0, VOCABULARY)),
    ],
)
def test_work_that_means_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("live", [110, 150, 200])
def test_thoughts_are_as_long_as_the_live_context_allows(live):
    script = replace(SCRIPT, tokens=300)
    thought = fitted(script, live).thought
    longer = (replace(script, thought=n) for n in (thought, thought + 1))
    peaks = [make_work(1, one, VOCABULARY).peak_live("recompute") for one in longer]
    assert peaks[0] <= live < peaks[1]


# --- the engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.6, top_p=0.95, top_k=20)])
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_does_the_same_work(model, name, stagger, params, monkeypatch):
    """Twice, since an engine that keeps something from its first run would be faster in the second."""
    asked, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *given, **more: asked.append(more) or generate(*given, **more))
    given = setting(model, 3, stagger=stagger, params=params)
    contender = ready(name, given)
    for _ in range(2):
        assert checked_run(name, contender).tokens == given.work.traces
    contender.close()
    for more in asked:
        assert more["do_sample"] == bool(params.temperature)
        assert not more["do_sample"] or (more["temperature"], more["top_p"], more["top_k"]) == (0.6, 0.95, 20)


def test_llama_cpp_computes_what_the_model_does_and_samples_as_it_is_told(model):
    given = setting(model, 2, params=SamplingParams(temperature=0.6, top_p=0.95, top_k=20))
    llama = ready("llama.cpp", given)
    logits = llama.decode([whole(prompt) for prompt in given.work.prompts])
    with torch.inference_mode():
        expected = model(torch.tensor(given.work.prompts)).logits[:, -1]
    assert (torch.as_tensor(logits) - expected).abs().max() < 1e-3 * expected.std()
    best = {int(token) for token in logits.argpartition(-20)[:, -20:].ravel()}
    chosen = [tuple(llama.choose(logits)) for _ in range(30)]
    assert len(set(chosen)) > 1 and {token for pair in chosen for token in pair} <= best
    llama.close()


def test_our_engine_samples_as_it_is_told(model):
    contender = prepare("recompute", setting(model, 2, params=SamplingParams(temperature=0.6, top_p=0.95, top_k=20)))
    (params,) = {request.params for request in contender.requests}
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)


def test_our_slots_hold_exactly_the_peak(model):
    """With one token less a row ends early: the peak that is reported is the one that is needed."""
    given = setting(model)
    short = replace(given, options={"max_context": given.work.peak_live("recompute") - 1})
    with pytest.raises(WrongTokensError, match="tokens of the script"):
        checked_run("recompute", prepare("recompute", short))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ((1,) * 40, (1,) * 40)}, "tokens of the script"),
        ({"tokens": ()}, "tokens of the script"),
        ({"peak_live": 46}, "held 46 tokens of a row at most; under policy off it is 47"),
    ],
)
def test_other_work_is_an_error(model, change, message):
    liar = Contender(setting(model))
    honest = Timing(1.0, liar.setting.work.traces, 47)
    liar.run = lambda: honest
    checked_run("liar", liar)
    liar.run = lambda: honest._replace(**change)
    with pytest.raises(WrongTokensError, match=message):
        checked_run("liar", liar)


# --- the file for llama.cpp -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_survive_the_file(tmp_path, dtype, tied):
    gguf = pytest.importorskip("gguf")
    model = tiny_model("qwen2", dtype, tie_word_embeddings=tied)
    write_gguf(model, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    weights = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight" or not tied}
    assert set(written) == {gguf_name(name) for name in weights}
    for name, weight in weights.items():
        tensor = written[gguf_name(name)]
        kept = torch.float32 if weight.dim() == 1 else dtype
        assert tensor.tensor_type.name == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[kept]
        bits = torch.from_numpy(np.array(tensor.data)).contiguous().view(torch.uint8).flatten()
        assert torch.equal(bits.view(kept).view(weight.shape), weight.to(kept))


def test_sizes_survive_the_file_and_other_models_have_none(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tiny_model("qwen2"), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    sizes = {"embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "vocab_size": 320}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    assert {name: fields[f"qwen2.{name}"].contents() for name in sizes} == sizes
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"
    with pytest.raises(ValueError, match="model_type='llama' cannot be written"):
        write_gguf(tiny_model("llama"), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_norm\.weight' has no place"):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


# --- taking turns -----------------------------------------------------------------------------------------------------


def test_an_engine_whose_work_does_not_fit_has_a_reason(model, monkeypatch):
    """At once, or in the middle: then its earlier runs do not count."""
    plain, runs = Generate.run, []

    def run(self):
        runs.append(self)
        if len(runs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return plain(self)

    monkeypatch.setattr(Generate, "run", run)
    found = measure(setting(model), ["generate", "off"], 3, quiet)
    assert found[0].reason == "out of memory: CUDA out of memory." and len(runs) == 3
    assert found[0].speed is None and found[1].speed and found[1].times(found[0]) is None
    assert "generate, batch 2: not run: out of memory" in table(found)


def test_engines_take_turns_and_the_warm_up_does_not_count(model, monkeypatch):
    def llama(name, given):
        if name == "llama.cpp":
            raise UnavailableError("not installed")
        return prepare(name, given)

    monkeypatch.setattr(engines, "prepare", llama)
    done: list[str] = []
    found = measure(setting(model), ["recompute", "llama.cpp", "off"], 2, done.append)
    assert [len(m.timings) for m in found] == [2, 0, 2] and found[1].reason == "not installed"
    assert [text.split(":")[0] for text in done] == ["recompute", "llama.cpp", "off"] * 3


def measured(engine: str, work: Work, *seconds: float) -> Measurement:
    return Measurement(engine, work, [Timing(s, work.traces, 47) for s in seconds])


def test_ratios_are_taken_within_each_repeat():
    """The second repeat ran on a machine half as fast: ratios of medians would be off, medians of ratios are not."""
    work, wide = (make_work(batch, SCRIPT, VOCABULARY) for batch in (2, 4))
    base, fast = measured("generate", work, 4, 8, 4), measured("recompute", work, 2, 4, 1)
    none = Measurement("llama.cpp", work, reason="not installed")
    best = measured("generate", wide, 4, 4, 4)
    assert (base.times(base), fast.times(base), fast.times(none)) == (1, 2, None)
    assert (base.speed, fast.speed, best.speed) == (20, 40, 40)
    lines = table([base, fast, none, best]).splitlines()
    rows = [line.split() for line in lines[2:5]]
    assert rows == [
        ["generate", "2", "40", "47", "20.0", "1.00", "0.50"],
        ["recompute", "2", "40", "47", "40.0", "2.00", "1.00"],
        ["generate", "4", "40", "47", "40.0", "1.00", "1.00"],
    ]
    assert lines[5:] == ["llama.cpp, batch 2: not run: not installed"]
    unpruned = measured("recompute", Work(work.prompts, ((OPEN, 15, 16),) * 2), 1)
    assert "nothing is pruned: no row generates as far as its first return" in table([unpruned])


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_prints_a_table_and_writes_a_file(tmp_path, capsys):
    path = tmp_path / "bench.json"
    line = "--shape tiny --threads 1 --tokens 60 --prompt 7 --live 60 45 --batch 1 2 --repeats 1"
    assert cli.main([*line.split(), "--engines", "generate", "recompute", "--json", str(path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:10]]
    assert [row[0] for row in rows] == ["generate", "recompute"] * 4
    assert [row[1] for row in rows] == [*"11112222"]
    assert all(int(row[3]) <= limit for row, limit in zip(rows[1::2], (60, 45, 60, 45), strict=True))
    assert max((float(row[4]), row[6]) for row in rows[::2])[1] == "1.00"
    told = json.loads(path.read_text())
    assert [result["engine"] for result in told["results"]] == ["generate", "recompute"] * 4
    assert told["versions"]["torch"] == version("torch") and told["machine"]["threads"] == "1"
    assert told["arguments"]["lives"] == [60, 45] and float(told["machine"]["cores used by others"]) >= 0


def test_who_else_used_the_processors_is_said(monkeypatch, capsys):
    """Of 4 seconds in which a core was busy 1.5 were this process's own and its children's."""
    Everyone, Own = namedtuple("Everyone", "user nice system idle steal"), namedtuple("Own", "a b c d iowait")
    clock, own = iter([10.0, 12.0]), iter([Own(1, 0, 0, 0, 9), Own(1.5, 0.5, 0.25, 0.25, 99)])
    readings = iter([Everyone(1, 1, 1, 50, 1), Everyone(3, 1, 2, 80, 2)])
    monkeypatch.setattr(cli.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(readings))
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _: next(own))
    monkeypatch.setattr(cli.os, "cpu_count", lambda: 2)
    load = cli.OtherLoad()
    cli.finish(SimpleNamespace(device="cpu", json=None), 1, {}, load)
    assert capsys.readouterr().err.startswith("warning: others used 1.2 of 2 cores meanwhile")


@pytest.mark.parametrize("line", ["--engines vlllm", "--option backend", "--shape 7B", "fast"])
def test_what_is_unknown_is_refused(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert line.split()[-1] in capsys.readouterr().err


WRONG = {
    "--live 12 --prompt 50": "live=12 is too little",
    "--batch 0": "batch=0",
    "--top-p 0.5": "--top-p and --top-k do nothing at --temperature 0",
    "--temperature nan": "temperature=nan",
    "--option compute=cuda": "compute='cuda' is not allowed",
    "--option foo=1": "foo",
}


@pytest.mark.parametrize("line", WRONG)
def test_numbers_and_options_are_looked_at_before_a_model_is_made(line, capsys, monkeypatch):
    monkeypatch.setattr(engines, "make_model", lambda *_, **__: pytest.fail("a model was made"))
    assert cli.main([*line.split(), "--shape", "tiny"]) == 1
    assert WRONG[line] in capsys.readouterr().err


@pytest.mark.parametrize("script", ["bench.py", "check_gpu.py"])
def test_help_needs_no_heavy_library(script):
    code = f"import runpy, sys\nsys.path.insert(0, {str(SCRIPTS)!r})\nsys.argv = [{script!r}, '--help']\n"
    code += f"try:\n    runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')\nexcept SystemExit:\n    pass\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'tqdm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and done.stdout.strip().endswith("[]")
