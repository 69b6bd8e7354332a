"""Diagnosis: scores against the engine, each verdict from figures made for it, and the bundled model from outside."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hcot_lmeval.diagnosis import cli, subject
from hcot_lmeval.diagnosis.findings import Code, Kind, find_all, trained_policy
from hcot_lmeval.diagnosis.measure import prompt_nats, score_traces
from hcot_lmeval.diagnosis.measurements import AS_RENDERED, FirstFault, FreeWriting, Measurements, Scored
from hcot_lmeval.diagnosis.report import as_dict, table, verdict
from hcot_lmeval.diagnosis.subject import Problem
from hcot_lmeval.engine import Engine, Request, SamplingParams
from hcot_lmeval.trace import Policy
from hcot_lmeval.training.data.documents import Example
from hcot_lmeval.vocabulary import leaves_open
from tests.random_traces import nested
from tests.reference import CLOSE, EOS, MARKERS, OPEN, SPLIT
from tests.test_grammar import GRAMMARS, THINK_END
from tests.tiny import tiny_model

GRAMMAR = GRAMMARS["hcot"]
NAMES = {OPEN: "[THOUGHT]", SPLIT: "[SOLUTION]", CLOSE: "[RETURN]", EOS: "<eos>", THINK_END: "</think>"}


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def model(request: pytest.FixtureRequest):
    return tiny_model(request.param, torch.float64, vocab_size=64)


def gold(count: int) -> list[Example]:
    rng = random.Random(3)
    return [Example((10, 11, 12), (*nested(rng, MARKERS["hcot"], 30), EOS)) for _ in range(count)]


@pytest.mark.parametrize("policy", Policy)
def test_scores_are_the_engines_log_probabilities(model, policy: Policy) -> None:
    """The engine reads the same traces token by token, in the contexts that it prunes itself."""
    examples = gold(4)
    engine = Engine(model, markers=MARKERS["hcot"], policy=policy, eos_ids=(EOS,), self_check=False)
    requests = [
        Request(
            str(n), e.prompt_ids, SamplingParams(max_gen_toks=99, logprobs=True), forced_ids=e.completion_ids
        )
        for n, e in enumerate(examples)
    ]  # fmt: skip
    pruned = 0
    for scored, done in zip(
        score_traces(model, examples, GRAMMAR, policy, 999), engine.generate(requests), strict=True
    ):
        assert scored.ids == done.token_ids
        assert scored.logprobs == pytest.approx(done.logprobs, abs=1e-9)
        for token, values in scored.controls.items():
            assert [values[i] for i, t in enumerate(scored.ids) if t == token] == scored.where_due(token)
        pruned += done.statistics.prune_events
    assert pruned > 0 or policy is Policy.OFF


def test_control_probabilities_are_those_of_a_plain_forward(model) -> None:
    [example, *_] = gold(1)
    [scored] = score_traces(model, [example], GRAMMAR, Policy.OFF, 999)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    for token, values in scored.controls.items():
        expected = logits[2:-1, token]
        assert torch.tensor(values, dtype=torch.float64) == pytest.approx(expected.numpy(), abs=1e-9)


def test_the_loss_of_prompts(model) -> None:
    prompts = [(10, 11, 12, 13), (20, 21), (9,)]
    expected = []
    for ids in prompts[:2]:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected += [-logprobs[i, token].item() for i, token in enumerate(ids[1:])]
    assert prompt_nats(model, prompts, GRAMMAR) == pytest.approx(sum(expected) / 4, abs=1e-9)
    assert math.isnan(prompt_nats(model, [], GRAMMAR))


def test_a_trace_that_fits_nowhere_is_passed_over(model) -> None:
    assert list(score_traces(model, gold(2), GRAMMAR, Policy.RECOMPUTE, 3)) == []


# --- verdicts ---------------------------------------------------------------------------------------------------------


def trace(nats: float, **due: float) -> Scored:
    """A trace of a given loss in which every control token comes once, with a given probability."""
    controls = {"open": OPEN, "split": SPLIT, "close": CLOSE, "end": THINK_END, "eos": EOS}
    logprobs = [math.log(due.get(name, 0.99)) for name in controls]
    rest = -nats * 10 - sum(logprobs)
    return Scored((*controls.values(), *range(20, 25)), (*logprobs, *[rest / 5] * 5), {})


def traces(nats: float, spread: float = 0.01, **due: float) -> list[Scored]:
    return [trace(nats + spread * (n % 3 - 1), **due) for n in range(12)]


def beginnings(**losses: float) -> dict[str, list[Scored]]:
    return {
        name.replace("_", " "): [Scored((20,), (-x,), {}) for x in (nats, nats + 0.01)] for name, nats in losses.items()
    }


def writing(right: int = 20, faults: Sequence[FirstFault] = (), looped: int = 0, cut: int = 0) -> FreeWriting:
    ends = Counter({"eos": 20 - cut, "length": cut})
    return FreeWriting(ends, right, looped, [*faults, *[None] * (20 - len(faults))], [100] * 20)


def measured(**changes: Any) -> Measurements:
    """A model without fault, trained with recompute."""
    facts: dict[str, Any] = {
        "intended": Policy.RECOMPUTE,
        "recorded": Policy.RECOMPUTE,
        "scores": {Policy.OFF: traces(1.5), Policy.RECOMPUTE: traces(0.1), Policy.EVICT: traces(1.2)},
        "writing": {policy: writing() for policy in Policy},
        "prompts": 9.0,
        "unigram": 3.0,
        "beginnings": beginnings(as_rendered=0.1, one_more_newline=0.2),
        "names": NAMES,
        "grammar": GRAMMAR,
    }
    return Measurements(**facts | changes)


def codes(found: Measurements, kind: Kind | None = None) -> list[str]:
    return [finding.code.value for finding in find_all(found) if kind in (None, finding.kind)]


def scores(off: float, recompute: float, evict: float, **due: float) -> dict[Policy, list[Scored]]:
    return dict(zip(Policy, (traces(nats, **due) for nats in (off, recompute, evict)), strict=True))


NEAR = scores(0.11, 0.1, 0.12)
NOISY = scores(1.0, 0.35, 2.0) | {Policy.OFF: [trace(0.4 + 0.3 * (-1) ** n) for n in range(12)]}
OPEN_ENDED = scores(1.5, 0.1, 1.2) | {Policy.OFF: traces(1.5, end=0.001)}
TEMPLATES = beginnings(as_rendered=0.5, one_more_newline=0.1, one_newline_less=0.4)
MARKERS_TOLD = {"open": "[THOUGHT]", "split": "[SOLUTION]", "close": "[RETURN]", "end": "</think>"}
VERDICTS: dict[str, tuple[dict[str, Any], list[Code], str]] = {
    "no fault": ({}, [], ""),
    "policy": ({"intended": Policy.EVICT}, [Code.WRONG_POLICY], "Run it with pruning=recompute"),
    "record": (
        {"intended": Policy.EVICT, "recorded": Policy.EVICT},
        [Code.WRONG_POLICY, Code.WRONG_RECORD],
        "Correct the entry hcot",
    ),
    "small difference": ({"intended": Policy.OFF, "recorded": None, "scores": NEAR}, [], ""),
    "uncertain difference": ({"intended": Policy.OFF, "recorded": None, "scores": NOISY}, [], ""),
    **{
        name: (
            {"scores": scores(1.5, 1.2, 2.0, **{name: 1e-5})},
            [Code.NEVER_LEARNED],
            f"{text} has probability 1.0e-05",
        )
        for name, text in MARKERS_TOLD.items()
    },
    "opening is a choice": ({"scores": scores(1.5, 0.6, 2.0, open=0.01)}, [], ""),
    "end": ({"scores": scores(2.5, 1.5, 3.0, eos=1e-6)}, [Code.END_NEVER_LEARNED], "<eos>"),
    "end in context": ({"scores": OPEN_ENDED}, [Code.END_NEEDS_CONTEXT], "With pruning=off the model goes on"),
    "prompts": ({"prompts": 1.5}, [Code.PROMPT_IN_LOSS], "mask the prompts"),
    "no prompts": ({"prompts": math.nan}, [], ""),
    "template": ({"beginnings": TEMPLATES}, [Code.TEMPLATE], "with one more newline (0.105 nats per token)"),
    "one template": ({"beginnings": beginnings(as_rendered=0.5)}, [], ""),
}


@pytest.mark.parametrize(("changes", "expected", "text"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(changes: dict[str, Any], expected: list[Code], text: str) -> None:
    found = find_all(measured(**changes))
    causes_alone = Code.WRONG_POLICY in expected  # which brings symptoms
    assert [one.code for one in found if one.kind is Kind.CAUSE or not causes_alone] == expected
    assert text in " ".join(finding.text for finding in found)


def test_the_same_finding_is_a_note_or_a_symptom() -> None:
    found = measured(scores=OPEN_ENDED)
    assert codes(found, Kind.NOTE) == [Code.END_NEEDS_CONTEXT] and verdict(find_all(found)).startswith("Nothing is")
    assert codes(measured(scores=OPEN_ENDED, intended=Policy.OFF), Kind.SYMPTOM) == [Code.END_NEEDS_CONTEXT]
    assert trained_policy(measured(intended=Policy.OFF, scores=NEAR)) is Policy.OFF
    assert verdict([]).startswith("Nothing is wrong")


def test_a_marker_that_the_wrong_template_suppresses_was_learned() -> None:
    behind = {AS_RENDERED: [trace(1, split=0.001)] * 3, "one more newline": [trace(0.9, split=0.9)] * 3}
    assert codes(measured(scores=scores(1.5, 1.2, 2.0, split=0.001), beginnings=behind)) == [Code.TEMPLATE]


def test_symptoms() -> None:
    faults = [FirstFault(30 + n, SPLIT, "outside") for n in range(5)] + [FirstFault(7, CLOSE, "thought")]
    found = measured(writing={policy: writing(3, faults, looped=4, cut=8) for policy in Policy})
    assert codes(found, Kind.SYMPTOM) == [Code.ILLEGAL, Code.LOOPS, Code.CUT]
    assert "first by [SOLUTION] in state outside (5 of 6), at generated token 32" in find_all(found)[0].text.replace(
        "31 in", "32 in"
    )
    rare = {policy: writing(18, faults[:1], looped=1, cut=1) for policy in Policy}
    assert codes(measured(writing=rare)) == []


def test_causes_come_before_symptoms_and_all_is_told() -> None:
    found = measured(prompts=1.0, writing={policy: writing(cut=20) for policy in Policy})
    assert [f.kind for f in find_all(found)] == [Kind.CAUSE, Kind.SYMPTOM]
    told = as_dict(found, find_all(found))
    assert json.loads(json.dumps(told))["policies"]["recompute"]["due"]["<eos>"] == pytest.approx(0.99)
    assert "due [THOUGHT]" in table(found) and "recompute" in table(found)


# --- from outside -----------------------------------------------------------------------------------------------------


def diagnose(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main([*arguments, "--quiet"])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_bundled_model_is_sound(capsys, tmp_path: Path) -> None:
    code, out, _ = diagnose(capsys, "tiny-hcot", "--problems", "6", "--out", str(tmp_path))
    assert code == 0
    assert "Nothing is wrong" in out and "With pruning=off the model goes on" in out
    found = json.loads((tmp_path / "diagnosis.json").read_text())
    assert found["policies"]["recompute"]["written"]["accuracy"] == 1


def test_the_wrong_policy_is_named(capsys) -> None:
    """Malformed traces under the mask: the model was trained with renumbered contexts."""
    _, out, _ = diagnose(capsys, "tiny-hcot", "--problems", "6", "--pruning", "evict", "--max-gen-toks", "200")
    assert "the model was trained with it, and not with evict" in " ".join(out.split())
    assert "break the notation" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no gold traces are known for no-such-model; name some with --data"),
        (["tiny-hcot", "--problems", "1"], "--problems 1 is too few"),
        (["tiny-hcot", "--data", "no-such.jsonl"], "no-such.jsonl"),
        (["tiny-hcot", "--data", "{path: synthetic:arith, splitt: test}"], "splitt is unknown; did you mean split"),
        (["no-such-model", "--data", "synthetic:arith"], "no-such-model"),
    ],
)
def test_wrong_input(capsys, arguments: list[str], message: str) -> None:
    code, _, err = diagnose(capsys, *arguments)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ") and message in err


def test_the_folder_of_a_training_run_is_told_from_its_model(capsys, tmp_path: Path) -> None:
    def told(place: Path) -> str:
        code, _, err = diagnose(capsys, str(place), "--data", "synthetic:arith")
        assert code == 1
        return err

    (tmp_path / "run.json").write_text("{}")
    for place in (tmp_path, tmp_path / "model"):
        assert "is not finished; it has no checkpoint yet; go on with it by the same command" in told(place)
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert f"give its last checkpoint, {tmp_path / 'checkpoints' / 'checkpoint-3'}, or go on" in told(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert f"is the folder of a training run; give its model, {tmp_path / 'model'}" in told(tmp_path)


def test_the_held_out_data_of_the_training_run_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {held_out: [{path: 'synthetic:qbf', split: validation}]}\n")
    for place in ("model", "checkpoints/checkpoint-7"):
        assert subject.source_of(str(tmp_path / place), None).path == "synthetic:qbf"


def test_questions_are_asked_once() -> None:
    examined = subject.load("tiny-hcot", policy=None, markup=None, device="cpu", dtype="auto")
    source = subject.source_of("tiny-hcot", "{path: 'synthetic:arith', options: {size: 30, depths: [1]}}")
    problems = subject.problems_of(examined, source, 100)
    assert len({p.prompt for p in problems}) == len(problems) > 5
    assert all(isinstance(p, Problem) for p in problems)


def test_a_prompt_that_opens_the_thinking() -> None:
    think = ("<think>", "</think>")
    assert leaves_open("question\n<think>\n", think)
    assert not leaves_open("<think> question", think)
    assert not leaves_open("question<think>", None)
