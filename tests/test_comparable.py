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


def changed(**settings: Any) -> Callable[..., None]:
    """Changes top-level fields of the results file."""
    return lambda results, samples: results.update(settings)


def of_task(**settings: Any) -> Callable[..., None]:
    """Changes the configuration of the task."""
    return lambda results, samples: results["configs"]["toy"].update(settings)


# --- allowed ----------------------------------------------------------------------------------------------------------


def test_what_differs_on_purpose_is_allowed(run):
    runs = [
        run(),
        run(policy="off"),
        run(max_context=4096),
        run(policy="off", model="org/other"),
        run(kind="hf", model="org/plain"),
        run(name="model, recompute, 1024, seed 1", totals={"seed": 1}, model_args={"seed": 1, "notes": "x"}),
        run(name="random", model_args={"ablation": "random"}),
    ]
    check_comparable(runs)
    assert remarks(runs) == []


def test_runs_of_different_tasks_are_not_held_against_each_other(run):
    check_comparable([run(), run([1, 0], task="other", version=7.0)])


def test_order_of_the_lines_does_not_matter(run):
    shuffled = run(policy="off", change=lambda results, samples: random.Random(0).sample(samples, len(samples)))
    check_comparable([run(), shuffled])


# --- which runs -------------------------------------------------------------------------------------------------------


def test_same_run_given_twice(run):
    one = run()
    assert "they are the same run" in refused(one, one.named("again"))


def test_copy_of_a_run(run):
    twin = {"change": changed(date=1.0)}
    assert "they are the same run" in refused(run(**twin), run(name="copy", **twin))


def test_two_runs_of_one_name(run):
    assert "both have this name" in refused(run(), run())


def test_name_of_another_checkpoint(run):
    message = refused(run(name="b, recompute, 1024", model="org/a"), run(name="a, recompute, 1024", model="org/b"))
    assert "'b, recompute, 1024' was made with a, and b is the checkpoint of 'a, recompute, 1024'" in message
    assert "labels were swapped" in message


@pytest.mark.parametrize("name", ["model, off, 1024", "unpruned", "evict-1", "OFF"])
def test_name_that_says_another_policy(run, name):
    assert "its results file says policy recompute; the labels were swapped" in refused(run(name=name))


@pytest.mark.parametrize("name", ["model, recompute, 128", "a window 128", "max_context=128", "context 128, again"])
def test_name_that_says_another_window(run, name):
    assert "its results file says max_context=1024; the labels were swapped" in refused(run(name=name))


@pytest.mark.parametrize("name", ["tiny-evict, recompute, 1024", "trade-off", "one-off-tuned", "unpruned-base"])
def test_a_word_within_the_name_of_a_checkpoint_claims_nothing(run, name):
    check_integrity(run(name=name))


def test_a_target_that_lm_eval_reads_as_a_literal(run):
    def change(results, samples):
        results["configs"]["toy"]["doc_to_target"] = "{{answer}}"
        for sample in samples:
            sample["doc"], sample["target"] = {**sample["doc"], "answer": "[-2,7]"}, "[-2, 7]"
            del sample["doc_hash"], sample["target_hash"]

    check_integrity(run(change=change))


@pytest.mark.parametrize("name", ["a, recompute, 1024", "pruned 1.5B", "Qwen 2, seed 128", "offline", "window 1024"])
def test_name_that_agrees(run, name):
    check_integrity(run(name=name))


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"pruning": "off"}, "pruning=recompute instead of off"),
        ({"max_context": 128}, "max_context=1024 instead of 128"),
        ({"pretrained": "org/other"}, "pretrained=org/model instead of org/other"),
        ({"dtype": "bfloat16"}, "dtype=None instead of bfloat16"),
    ],
)
def test_settings_that_are_not_the_expected_ones(run, expected, reason):
    with pytest.raises(Incomparable, match=reason):
        check_settings(run(), expected)


def test_totals_that_contradict_the_arguments(run):
    with pytest.raises(Incomparable, match="pruning=off instead of recompute"):
        check_settings(run(totals={"pruning": "off"}), {"pruning": "recompute"})


# --- one run contradicts itself ---------------------------------------------------------------------------------------


def test_duplicate_document(run):
    twice = run(change=lambda results, samples: [*samples, samples[2]])
    assert "document 2 stand in the samples more than once" in refused(twice)


def test_samples_cut_off(run):
    cut = run(change=lambda results, samples: samples[:-1])
    assert "holds 3 documents, the results file was made from 4" in refused(cut)


def test_labels_swapped_without_a_trace_in_the_hashes(run):
    def swap(results: dict, samples: list[dict]) -> None:
        for key in ("target", "target_hash"):
            samples[0][key], samples[1][key] = samples[1][key], samples[0][key]

    assert "the target of 2 documents (0, 1) is not the answer of the document" in refused(run(change=swap))


def test_document_changed_after_the_run(run):
    def edit(results: dict, samples: list[dict]) -> None:
        samples[1]["doc"]["answer"] = samples[1]["target"] = "7"

    assert "doc_hash of document 1 is not that of the doc beside it" in refused(run(change=edit))


def test_target_changed_after_the_run(run):
    def edit(results: dict, samples: list[dict]) -> None:
        samples[1]["target"] = "7"

    assert "target_hash of document 1" in refused(run(change=edit))


def test_scores_that_are_not_of_the_results_file(run):
    def flip(results: dict, samples: list[dict]) -> None:
        samples[1]["acc"] = 1

    assert "the mean of acc over the samples is 1.0000, its results file says 0.7500" in refused(run(change=flip))


def test_score_that_is_no_share(run):
    assert "completed of document 0 lies outside 0..1, as in 3" in refused(
        run(metric_to_read="completed", change=lambda results, samples: samples[0].update(completed=3))
    )


# --- two runs of one task ---------------------------------------------------------------------------------------------


def test_task_version(run):
    message = refused(run(), run(policy="off", version=2.0))
    assert message.startswith("'model, recompute, 1024' and 'model, off, 1024' (toy) cannot be compared: ")
    assert "the versions of the task differ: 1.0 and 2.0; run the older one again" in message


def test_missing_documents(run):
    message = refused(run(), run([1, 0], policy="off", change=lambda r, s: r["config"].update(limit=2)))
    assert "2 documents (2, 3) of 'model, recompute, 1024' missing in 'model, off, 1024'" in message
    assert "--limit None and 2" in message


def test_missing_documents_of_the_first(run):
    assert "document 3 of 'model, off, 1024' missing" in refused(run(RIGHT[:3]), run(policy="off"))


def test_other_documents_under_the_same_ids(run):
    one, other = run(columns={"level": ["low"] * 4}), run(policy="off", columns={"level": ["low"] * 3 + ["top"]})
    assert "document 3 with another doc, as in" in refused(one, other)


def test_changed_label(run):
    """The documents agree, the targets do not, and each file agrees with itself."""

    def relabel(results: dict, samples: list[dict]) -> None:
        results["configs"]["toy"]["doc_to_target"] = "{{answer}} or so"
        samples[2]["target"] = "5"
        samples[2]["target_hash"] = hash_of("5")

    plain = run(change=of_task(doc_to_target="{{answer}} or so"))
    message = refused(plain, run(policy="off", change=relabel))
    assert "document 2 with another target, as in 4 and 5; the labels were changed" in message


def test_metric(run):
    one, other = run(), run(policy="off", metric_to_read="completed")
    assert "the metrics differ: acc and completed; name one with --metric" in refused(one, other)


def test_filter(run):
    one, other = run(filter_name="strict"), run(policy="off", filter_name="flexible")
    assert "the filters differ: strict and flexible; name one with --filter" in refused(one, other)


def test_number_of_responses(run):
    four = {"metric": "avg@4", "statistics": lambda doc_id: [{}] * 4}
    eight = {"metric": "avg@4", "statistics": lambda doc_id: [{}] * 8}
    assert "the numbers of responses to a problem differ: 4 and 8" in refused(run(**four), run(policy="off", **eight))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(**{"n-shot": {"toy": 4}}), "the numbers of few-shot examples differ: 0 and 4"),
        (changed(system_instruction="Think."), "the system instructions differ: None and Think."),
        (of_task(doc_to_text="Q: {{problem}}"), "the settings 'doc_to_text' of the task differ"),
        (of_task(dataset_name="fr"), "the settings 'dataset_name' of the task differ: None and fr"),
        (of_task(metadata={"version": 1.0, "problem_seed": 3}), "the settings 'metadata' of the task differ"),
        (of_task(generation_kwargs={"until": [], "do_sample": True, "temperature": 0.6}), "'generation_kwargs'"),
    ],
)
def test_settings_of_the_prompt_and_of_sampling(run, change, reason):
    assert reason in refused(run(), run(policy="off", change=change))


def test_prompts(run):
    def reword(results: dict, samples: list[dict]) -> None:
        samples[1]["prompt_hash"] = "other"

    assert "the prompts of document 1 differ" in refused(run(), run(policy="off", change=reword))
    assert "the prompts of document 1 differ" in refused(run(), run(kind="hf", model="org/plain", change=reword))


def templated(sha: str) -> Callable[..., None]:
    def change(results: dict, samples: list[dict]) -> None:
        results["chat_template_sha"] = sha
        for sample in samples:
            sample["prompt_hash"] = hash_of(sha + sample["doc"]["problem"])

    return change


def test_chat_template_belongs_to_the_checkpoint(run):
    """Another family has another template: allowed and said. The same checkpoint with and without: refused."""
    plain, rendered = run(), run(kind="hf", model="org/chatty", change=templated("a"))
    check_comparable([plain, rendered, run(kind="hf", model="org/chattier", change=templated("b"))])
    assert remarks([plain, rendered]) == [
        "no chat template was applied to the prompts of model, recompute, 1024; it was to the others"
    ]
    assert "the uses of a chat template differ" in refused(plain, run(policy="off", change=templated("a")))
    assert "the uses of a chat template differ" in refused(plain, run(policy="off", totals={"chat_template": True}))
    one, other = run(change=templated("a")), run(policy="off", change=templated("b"))
    assert "the chat templates differ: a and b" in refused(one, other)


def test_two_commits_of_one_checkpoint(run):
    def at(sha: str) -> Callable[..., None]:
        return lambda results, samples: results["config"].update(model_sha=sha)

    assert "the commits of org/model differ: abc and def" in refused(
        run(change=at("abc")), run(policy="off", change=at("def"))
    )
    check_comparable([run(change=at("abc")), run(model="org/other", change=at("def"))])


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
    runs = [run(), run(policy="off", change=change)]
    assert reason in refused(*runs)
    assert "--allow-versions" in refused(*runs)
    check_comparable(runs, allow_versions=True)
    [remark] = remarks(runs)
    assert remark.startswith("the runs were made with different versions of ")


def test_code_of_a_task_counts_as_a_version(run):
    one = run(change=of_task(process_results="def boxed(doc): return 1"))
    other = run(policy="off", change=of_task(process_results="def boxed(doc): return 2"))
    assert "the code of the task's 'process_results' differs" in refused(one, other)
    check_comparable([one, other], allow_versions=True)
    assert "'process_results'" in refused(
        one, run(name="x", change=of_task(process_results="no code")), allow_versions=True
    )


# --- budgets ----------------------------------------------------------------------------------------------------------

UNNAMED = {"generation_kwargs": {"max_gen_toks": None}}
"""A task that leaves the budget to the model."""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Budget(4096, 4096)),
        ({"generation_kwargs": {"max_gen_toks": None, "max_tokens": 99}}, Budget(99, 99)),
        (UNNAMED, Budget(32768, 32768)),
        (UNNAMED | {"max_context": 65536}, Budget(65536, 65536)),
        (UNNAMED | {"policy": "off"}, Budget(1024, UNBOUND)),
        (UNNAMED | {"policy": "off", "totals": {"max_gen_toks": 1000}}, Budget(1000, 1000)),
        ({"policy": "off"}, Budget(1024, UNBOUND)),
        ({"policy": "off", "max_context": 8192}, Budget(4096, 4096)),
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


def test_unpruned_window_below_the_pruned_budget_is_the_fair_baseline(run):
    check_comparable([run(**UNNAMED), run(policy="off", **UNNAMED), run(policy="off", max_context=32768, **UNNAMED)])


def test_different_budgets(run):
    named = {"generation_kwargs": {"max_gen_toks": 512}}
    message = refused(run(), run(policy="off", **named))
    assert "the budgets of generated tokens differ: 4096 and 512; give both the same limit" in message
    assert "differ: 32768 and 65536" in refused(run(**UNNAMED), run(max_context=65536, **UNNAMED))
    wide = run(policy="off", max_context=40000, **UNNAMED)
    assert "differ: 32768 and 40000 or more" in refused(run(**UNNAMED), wide)


def test_unknown_budget_is_not_taken_for_any(run):
    assert "32768 and not recorded" in refused(run(**UNNAMED), run(kind="hf", model="org/plain", **UNNAMED))


def test_budgets_of_two_later_runs(run):
    """The first one's budget binds nobody, so it agrees with both; they do not agree with each other."""
    runs = [run(policy="off", **UNNAMED)]
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
    slow = run(policy="off", model_args={"dtype": "bfloat16"}, change=lambda r, s: r["config"].update(device="cuda"))
    runs = [run(), slow]
    check_comparable(runs)
    assert remarks(runs) == [
        "device differs (cpu, cuda), so speeds are not comparable",
        "runs of org/model differ in dtype: bfloat16, its default",
    ]


def test_the_hashes_are_those_of_real_files(run):
    """A line as lm-eval 0.4.13 wrote it, with its hashes."""
    line = json.loads(
        '{"doc_id": 0, "doc": {"problem": "g=5-1;j=p-p;h=9-6;p=h*g;f=h+h;j?", "answer": "0", "depth": 3, "blocks": 7}, '
        '"target": "0", "doc_hash": "6822d13c75dd11b2939cedca8da358013584baf8863c34b139e7a90e7bb1051a", '
        '"target_hash": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9"}'
    )
    check_integrity(run([1], change=lambda results, samples: [samples[0] | line]))


@pytest.mark.parametrize(
    ("statistics", "settings"),
    [
        ({"prune_events": 4}, {"policy": "off"}),
        ({"pruned_tokens": 60}, {"policy": "off"}),
        ({"generated_tokens": 5000}, {}),
        ({"generated_tokens": 100}, {"totals": {"generated_tokens": 0, "requests": 0}}),
        ({"peak_live_tokens": 700}, {"totals": {"peak_live_tokens": 70}}),
    ],
    ids=str,
)
def test_responses_that_the_settings_do_not_allow(run, statistics, settings):
    """As from lm-eval's cache of responses, which tells no settings apart."""
    [name] = statistics
    other = run(statistics=lambda doc_id: statistics, **settings)
    with pytest.raises(
        Incomparable, match=rf"a response has {name}={statistics[name]}.*another run's, as from a cache"
    ):
        check_comparable([other])


def timed(time, extra=""):
    """Makes a run's prompts those of a chat template that tells the time."""

    def change(results, samples):
        results["config"]["hcot"]["clock"] = time
        results["chat_template_sha"] = "x"
        for sample in samples:
            question = sample["arguments"]["gen_args_0"]["arg_0"]
            prompt = f"Today is {time}. {question} {extra}"
            sample["arguments"]["gen_args_0"]["arg_0"] = prompt
            sample["prompt_hash"] = hash_of(prompt)

    return change


def test_prompts_that_differ_in_time_alone(run):
    one, other = (run(name=name, change=timed(time)) for name, time in (("a", "2031-01-09"), ("b", "2031-01-10")))
    check_comparable([one, other])
    assert "the chat template told the models different times: 2031-01-09, 2031-01-10" in remarks([one, other])
    with pytest.raises(Incomparable, match=r"the prompts of .* differ"):
        check_comparable([one, run(name="c", change=timed("2031-01-10", "Think."))])
    with pytest.raises(Incomparable, match=r"the prompts of .* differ"):
        check_comparable([one, run(name="d", change=timed("2031-01-09", "Think."))])
