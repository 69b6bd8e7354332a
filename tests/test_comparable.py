"""What is refused, by its reason, and what is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hcot_lmeval.report.comparable import Incomparable, check_comparable, check_integrity, check_settings, remarks
from hcot_lmeval.report.results import UNBOUND, Budget, Run, read_runs
from tests.result_files import build_run, hash_of

RIGHT = [1, 0, 1, 1]
OFF = {"policy": "off"}
UNNAMED = {"generation_kwargs": {"max_gen_toks": None}}
"""A task that leaves the budget to the model."""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """Builds and reads one run; `name` replaces its label."""

    def make(scores: Any = RIGHT, name: str | None = None, metric_to_read: str | None = None, **settings: Any) -> Run:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        build_run(folder, scores, **settings)
        [found] = read_runs(folder, metric=metric_to_read)
        return found.named(name) if name else found

    return make


def refused(*runs: Run, **options: Any) -> str:
    with pytest.raises(Incomparable) as caught:
        check_comparable(runs, **options)
    return str(caught.value)


def changed(**settings: Any) -> dict[str, Any]:
    """Top-level fields of the results file."""
    return {"change": lambda results, samples: results.update(settings)}


def of_config(**settings: Any) -> dict[str, Any]:
    """Fields of its section ``config``."""
    return {"change": lambda results, samples: results["config"].update(settings)}


def of_task(**settings: Any) -> dict[str, Any]:
    """Fields of the configuration of the task."""
    return {"change": lambda results, samples: results["configs"]["toy"].update(settings)}


def of_sample(number: int, **settings: Any) -> dict[str, Any]:
    return {"change": lambda results, samples: samples[number].update(settings)}


# --- allowed ----------------------------------------------------------------------------------------------------------


def test_what_differs_on_purpose_is_allowed(run):
    runs = [
        run(),
        run(**OFF),
        run(max_context=4096),
        run(**OFF, model="org/other"),
        run(kind="hf", model="org/plain"),
        run(name="model, recompute, 1024, seed 1", totals={"seed": 1}, model_args={"seed": 1, "notes": "x"}),
        run(name="random", model_args={"ablation": "random"}),
    ]
    check_comparable(runs)
    assert remarks(runs) == []
    check_comparable([run(), run([1, 0], task="other", version=7.0)])  # of different tasks
    shuffled = run(**OFF, change=lambda results, samples: random.Random(0).sample(samples, len(samples)))
    check_comparable([runs[0], shuffled])


@pytest.mark.parametrize(
    "name",
    [
        *("a, recompute, 1024", "pruned 1.5B", "Qwen 2, seed 128", "offline", "window 1024"),
        *("tiny-evict, recompute, 1024", "trade-off", "one-off-tuned", "unpruned-base"),  # words within a name
    ],
)
def test_name_that_agrees(run, name):
    check_integrity(run(name=name))


def test_a_target_that_lm_eval_reads_as_a_literal(run):
    def change(results, samples):
        results["configs"]["toy"]["doc_to_target"] = "{{answer}}"
        for sample in samples:
            sample["doc"], sample["target"] = {**sample["doc"], "answer": "[-2,7]"}, "[-2, 7]"
            del sample["doc_hash"], sample["target_hash"]

    check_integrity(run(change=change))


def test_the_hashes_are_those_of_real_files(run):
    """A line as lm-eval 0.4.13 wrote it, with its hashes."""
    line = json.loads(
        '{"doc_id": 0, "doc": {"problem": "g=5-1;j=p-p;h=9-6;p=h*g;f=h+h;j?", "answer": "0", "depth": 3, "blocks": 7}, '
        '"target": "0", "doc_hash": "6822d13c75dd11b2939cedca8da358013584baf8863c34b139e7a90e7bb1051a", '
        '"target_hash": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9"}'
    )
    check_integrity(run([1], change=lambda results, samples: [samples[0] | line]))


# --- a run that contradicts itself ------------------------------------------------------------------------------------


def swap_targets(results: dict, samples: list[dict]) -> None:
    for key in ("target", "target_hash"):
        samples[0][key], samples[1][key] = samples[1][key], samples[0][key]


POLICY = "its results file says policy recompute; the labels were swapped"
WINDOW = "its results file says max_context=1024; the labels were swapped"
OUTSIDE = {"metric_to_read": "completed", **of_sample(0, completed=3)}
CONTRADICTIONS = {
    **{name: ({"name": name}, POLICY) for name in ("model, off, 1024", "unpruned", "evict-1", "OFF")},
    **{
        name: ({"name": name}, WINDOW)
        for name in ("model, recompute, 128", "window 128", "max_context=128", "context 128, x")
    },
    "copied line": ({"change": lambda r, s: [*s, s[2]]}, "document 2 stand in the samples more than once"),
    "cut off": ({"change": lambda r, s: s[:-1]}, "holds 3 documents, the results file was made from 4"),
    "swapped": ({"change": swap_targets}, "the target of 2 documents (0, 1) is not the answer of the document"),
    "document": (of_sample(1, doc={"answer": "7"}, target="7"), "doc_hash of document 1 is not that of the doc beside"),
    "target": (of_sample(1, target="7"), "target_hash of document 1"),
    "score": (of_sample(1, acc=1), "the mean of acc over the samples is 1.0000, its results file says 0.7500"),
    "mean": (of_sample(1, generated_tokens=7), "generated_tokens of document 1 is not the mean over its responses"),
    "no share": (OUTSIDE, "completed of document 0 lies outside 0..1, as in 3"),
}


@pytest.mark.parametrize(("settings", "told"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_run_that_contradicts_itself(run, settings, told):
    assert told in refused(run(**settings))


@pytest.mark.parametrize(
    ("statistics", "settings"),
    [
        ({"prune_events": 4}, OFF),
        ({"pruned_tokens": 60}, OFF),
        ({"generated_tokens": 5000}, {}),
        ({"generated_tokens": 100}, {"totals": {"generated_tokens": 0, "requests": 0}}),
        ({"peak_live_tokens": 700}, {"totals": {"peak_live_tokens": 70}}),
    ],
    ids=str,
)
def test_responses_that_the_settings_do_not_allow(run, statistics, settings):
    """As from lm-eval's cache of responses, which tells no settings apart."""
    [[name, value]] = statistics.items()
    told = refused(run(statistics=lambda doc_id: statistics, **settings))
    assert f"a response has {name}={value}" in told and "another run's, as from a cache" in told


@pytest.mark.parametrize(
    ("settings", "expected", "reason"),
    [
        ({}, {"pruning": "off"}, "pruning=recompute instead of off"),
        ({}, {"max_context": 128}, "max_context=1024 instead of 128"),
        ({}, {"pretrained": "org/other"}, "pretrained=org/model instead of org/other"),
        ({}, {"dtype": "bfloat16"}, "dtype=None instead of bfloat16"),
        ({"totals": {"pruning": "off"}}, {"pruning": "recompute"}, "pruning=off instead of recompute"),
    ],
)
def test_settings_that_are_not_the_expected_ones(run, settings, expected, reason):
    with pytest.raises(Incomparable, match=reason):
        check_settings(run(**settings), expected)


# --- two runs of one task ---------------------------------------------------------------------------------------------


def test_one_run_twice_and_two_of_one_name(run):
    one, twin = run(), changed(date=1.0)
    assert "they are the same run" in refused(one, one.named("again"))
    assert "they are the same run" in refused(run(**twin), run(name="copy", **twin))
    assert "both have this name" in refused(one, run())
    message = refused(run(name="b, recompute, 1024", model="org/a"), run(name="a, recompute, 1024", model="org/b"))
    assert "'b, recompute, 1024' was made with a, and b is the checkpoint of 'a, recompute, 1024'" in message
    assert "labels were swapped" in message


def templated(sha: str) -> dict[str, Any]:
    def change(results: dict, samples: list[dict]) -> None:
        results["chat_template_sha"] = sha
        for sample in samples:
            sample["prompt_hash"] = hash_of(sha + sample["doc"]["problem"])

    return {"change": change}


def relabelled(results: dict, samples: list[dict]) -> None:
    """The documents agree, the targets do not, and each file agrees with itself."""
    results["configs"]["toy"]["doc_to_target"] = "{{answer}} or so"
    samples[2] |= {"target": "5", "target_hash": hash_of("5")}


SO = of_task(doc_to_target="{{answer}} or so")
SHOTS = changed(**{"n-shot": {"toy": 4}})
SAMPLING = of_task(generation_kwargs={"until": [], "do_sample": True, "temperature": 0.6})
PLAIN = {"kind": "hf", "model": "org/plain"}


def answers(count: int) -> dict[str, Any]:
    return {"metric": "avg@4", "statistics": lambda doc_id: [{}] * count}


LEVELS = {"columns": {"level": ["low"] * 4}}
OTHER_LEVELS = {"columns": {"level": ["low"] * 3 + ["top"]}}
DIFFERENCES = {
    "task version": ({}, {"version": 2.0}, "the versions of the task differ: 1.0 and 2.0; run the older one again"),
    "fewer": (
        {},
        {"scores": [1, 0], **of_config(limit=2)},
        "2 documents (2, 3) of 'model, recompute, 1024' missing in",
    ),
    "limits": ({}, {"scores": [1, 0], **of_config(limit=2)}, "--limit None and 2"),
    "more": ({"scores": RIGHT[:3]}, {}, "document 3 of 'model, off, 1024' missing"),
    "documents": (LEVELS, OTHER_LEVELS, "document 3 with another doc, as in"),
    "label": (SO, {"change": relabelled}, "document 2 with another target, as in 4 and 5; the labels were changed"),
    "metric": ({}, {"metric_to_read": "completed"}, "the metrics differ: acc and completed; name one with --metric"),
    "filter": ({"filter_name": "a"}, {"filter_name": "b"}, "the filters differ: a and b; name one with --filter"),
    "responses": (answers(4), answers(8), "the numbers of responses to a problem differ: 4 and 8"),
    "shots": ({}, SHOTS, "the numbers of few-shot examples differ: 0 and 4"),
    "system": ({}, changed(system_instruction="Think."), "the system instructions differ: None and Think."),
    "text": ({}, of_task(doc_to_text="Q: {{problem}}"), "the settings 'doc_to_text' of the task differ"),
    "data": ({}, of_task(dataset_name="fr"), "the settings 'dataset_name' of the task differ: None and fr"),
    "metadata": (
        {},
        of_task(metadata={"version": 1.0, "problem_seed": 3}),
        "the settings 'metadata' of the task",
    ),
    "sampling": ({}, SAMPLING, "'generation_kwargs'"),
    "prompts": ({}, of_sample(1, prompt_hash="other"), "the prompts of document 1 differ"),
    "its prompts": ({}, PLAIN | of_sample(1, prompt_hash="other"), "the prompts of document 1 differ"),
    "template": ({}, templated("a"), "the uses of a chat template differ"),
    "our template": ({}, {"totals": {"chat_template": True}}, "the uses of a chat template differ"),
    "templates": (templated("a"), templated("b"), "the chat templates differ: a and b"),
    "commits": (of_config(model_sha="a"), of_config(model_sha="b"), "the commits of org/model differ: a and b"),
    "budgets": ({}, {"generation_kwargs": {"max_gen_toks": 512}}, "differ: 4096 and 512; give both the same limit"),
    "unknown budget": (UNNAMED, UNNAMED | PLAIN, "32768 and not recorded"),
    "wide": (UNNAMED, UNNAMED | {"max_context": 40000}, "differ: 32768 and 40000 or more"),
}


@pytest.mark.parametrize(("first", "second", "told"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_runs_that_differ(run, first, second, told):
    message = refused(run(**first), run(**OFF | second))
    assert message.startswith("'model, recompute, 1024' and ") and " (toy) cannot be compared: " in message
    assert told in message


def test_chat_template_belongs_to_the_checkpoint(run):
    """Another family has another template: allowed and said."""
    plain, rendered = run(), run(kind="hf", model="org/chatty", **templated("a"))
    check_comparable([plain, rendered, run(kind="hf", model="org/chattier", **templated("b"))])
    assert remarks([plain, rendered]) == [
        "no chat template was applied to the prompts of model, recompute, 1024; it was to the others"
    ]
    check_comparable([run(**of_config(model_sha="a")), run(model="org/other", **of_config(model_sha="b"))])


def timed(time: str, extra: str = "") -> dict[str, Any]:
    """A run whose prompts are those of a chat template that tells the time."""

    def change(results, samples):
        results["config"]["hcot"]["clock"] = time
        results["chat_template_sha"] = "x"
        for sample in samples:
            question = sample["arguments"]["gen_args_0"]["arg_0"]
            prompt = f"Today is {time}. {question} {extra}"
            sample["arguments"]["gen_args_0"]["arg_0"] = prompt
            sample["prompt_hash"] = hash_of(prompt)

    return {"change": change}


def test_prompts_that_differ_in_time_alone(run):
    one, other = (run(name=name, **timed(time)) for name, time in (("a", "2031-01-09"), ("b", "2031-01-10")))
    check_comparable([one, other])
    assert "the chat template told the models different times: 2031-01-09, 2031-01-10" in remarks([one, other])
    for time in ("2031-01-10", "2031-01-09"):
        message = refused(one, run(name="c", **timed(time, "Think.")))
        assert "the prompts of 4 documents (0, 1, 2, 3) differ" in message


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(lm_eval_version="0.5.0"), "the versions of lm-eval differ: 0.4.13 and 0.5.0"),
        (changed(transformers_version="6.0"), "the versions of transformers differ: 5.23.0 and 6.0"),
        (changed(pretty_env_info="PyTorch version: 2.11.0\n"), "the versions of torch differ: 2.13.0+cpu and 2.11.0"),
    ],
)
def test_versions_of_libraries(run, change, reason):
    runs = [run(), run(**OFF, **change)]
    message = refused(*runs)
    assert reason in message and "--allow-versions" in message
    check_comparable(runs, allow_versions=True)
    [remark] = remarks(runs)
    assert remark.startswith("the runs were made with different versions of ")


def test_code_of_a_task_counts_as_a_version(run):
    one = run(**of_task(process_results="def boxed(doc): return 1"))
    other = run(**OFF, **of_task(process_results="def boxed(doc): return 2"))
    assert "the code of the task's 'process_results' differs" in refused(one, other)
    check_comparable([one, other], allow_versions=True)
    third = run(name="x", **of_task(process_results="no code"))
    assert "'process_results'" in refused(one, third, allow_versions=True)


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Budget(4096, 4096)),
        ({"generation_kwargs": {"max_gen_toks": None, "max_tokens": 99}}, Budget(99, 99)),
        (UNNAMED, Budget(32768, 32768)),
        (UNNAMED | {"max_context": 65536}, Budget(65536, 65536)),
        (UNNAMED | OFF, Budget(1024, UNBOUND)),
        (UNNAMED | OFF | {"totals": {"max_gen_toks": 1000}}, Budget(1000, 1000)),
        (OFF, Budget(1024, UNBOUND)),
        (OFF | {"max_context": 8192}, Budget(4096, 4096)),
        (UNNAMED | {"kind": "hf"}, None),
        (UNNAMED | {"kind": "vllm", "model_args": {"max_gen_toks": 500}}, Budget(500, 500)),
    ],
)
def test_budget_in_force(run, settings, expected):
    assert run(**settings).budget == expected


def test_budgets_agree_if_one_limit_would_do_for_both():
    """Against trying every limit."""
    draw = random.Random(0)
    for _ in range(300):
        one, other = (Budget(low, low + draw.randrange(4)) for low in draw.choices(range(8), k=2))
        some = any(one.low <= n <= one.high and other.low <= n <= other.high for n in range(12))
        assert one.agrees_with(other) == other.agrees_with(one) == some


def test_an_unpruned_window_below_the_budget_binds_nobody(run):
    """It is the fair baseline of every budget, and does not make two budgets one."""
    check_comparable([run(**UNNAMED), run(**OFF, **UNNAMED), run(**OFF, max_context=32768, **UNNAMED)])
    runs = [run(**OFF, **UNNAMED)]
    runs += [run(name=str(n), generation_kwargs={"max_gen_toks": n}) for n in (2000, 3000)]
    assert "'2000' and '3000' (toy) cannot be compared: the budgets" in refused(*runs)


# --- remarks ----------------------------------------------------------------------------------------------------------


def test_prompts_that_leave_no_room_are_told(run):
    full = {"finish_reason": "context", "generated_tokens": 0, "prompt_tokens": 68}
    cut = {"finish_reason": "context", "generated_tokens": 5, "prompt_tokens": 99}
    found = remarks([run([1, 0, 0], max_context=64, statistics=lambda i: [{}, cut, full][i])])
    assert found == [
        "1 of 3 prompts of 'model, recompute, 64' (toy) left no room in its window, so that their responses are empty; "
        "the longest has 68 tokens: choose a window well above that"
    ]


def test_remarks_on_what_a_reader_should_know(run):
    runs = [run(), run(**OFF, model_args={"dtype": "bfloat16"}, **of_config(device="cuda"))]
    check_comparable(runs)
    assert remarks(runs) == [
        "device differs (cpu, cuda), so speeds are not comparable",
        "runs of org/model differ in dtype: bfloat16, its default",
    ]
