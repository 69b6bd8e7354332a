"""The task files through lm-eval's own index, loader and evaluator, offline."""

from __future__ import annotations

import json
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from hcot_lmeval.response import Response
from hcot_lmeval.scoring.data import DATA_VARIABLE
from hcot_lmeval.scoring.instructions import default_instructions
from tests.tasks_hub import LANGUAGES, LEVELS, ROWS, Scripted, statistics, write_hub

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tasks"
FAMILIES = {"aime", "math500", "polymath", "synthetic"}
STOCK = Path(lm_eval.__file__).resolve().parent / "tasks" / "aime"
BOXED = ["aime24_boxed", "aime25_boxed", "math500_boxed"]
SAMPLED = [f"{name}_avg" for name in BOXED]
POLYMATH = [f"polymath_{language}" for language in LANGUAGES]
PAIRS = [f"{name}_{level}" for name in POLYMATH for level in LEVELS]
LEAVES = ["aime24", *BOXED, *SAMPLED, *POLYMATH, *(f"{name}_avg" for name in POLYMATH), *PAIRS]
SYNTHETIC = {
    "hcot_arith_depths": [f"hcot_arith_d{depth}" for depth in range(3, 7)],
    "hcot_qbf": [f"hcot_qbf_n{size}" for size in range(3, 11)],
    "hcot_sat": [f"hcot_sat_n{size}" for size in range(3, 11)],
}
"""Group -> its tasks."""
MADE = ["hcot_arith", *(name for names in SYNTHETIC.values() for name in names)]
GROUPS = ["polymath", "polymath_avg", *(f"polymath_{level}" for level in LEVELS)]
STRUCTURE = {"illegal_tokens", "unclosed_blocks", "forced_tokens", "loops"}
MEASURED = {"completed", "generated_tokens", "pruned_share", "peak_live_tokens", "requests", *STRUCTURE}
"""The metrics that only a model with statistics has."""


@pytest.fixture(scope="module", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = write_hub(tmp_path_factory.mktemp("hub"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(root))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield root


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(TASKS), include_defaults=False)


@pytest.fixture(scope="module")
def everything(manager: TaskManager) -> dict[str, Any]:
    """Every task, each loaded once."""
    return {name: manager.load([name])["tasks"][name] for name in LEAVES}


def evaluate(model: Any, tasks: list[str], manager: TaskManager, **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=10, **options)


def family(path: Path | None) -> str | None:
    """The folder below tasks/ in which a file stands."""
    return path.relative_to(TASKS).parts[0] if path else None


def numbers(results: dict[str, Any], task: str) -> dict[str, Any]:
    """Metric → value, without standard errors."""
    pairs = results["results"][task].items()
    return {key.removesuffix(",none"): value for key, value in pairs if "," in key and "_stderr" not in key}


# ---- index and files


def test_the_index_holds_all_names_and_no_others(manager: TaskManager) -> None:
    ours = {name: entry for name, entry in manager.task_index.items() if family(entry.yaml_path) in FAMILIES}
    assert sorted(ours) == sorted([*LEAVES, *GROUPS, *MADE, *SYNTHETIC])
    assert not any(entry.tags for entry in ours.values())  # a tag of ours would replace lm-eval's of the same name
    assert len(LEAVES) == 1 + 3 + 3 + 18 + 18 + 72


def test_generated_files_are_up_to_date(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_polymath_tasks.py"))
    files = script["render"]()
    assert script["differences"](files, TASKS / "polymath") == []
    (tmp_path / "polymath_xx.yaml").write_text("task: polymath_xx\n")
    stale = script["differences"](files, tmp_path)
    assert len(stale) == len(files) + 1
    assert len(files) == 18 + 18 + 72 + 6


def test_every_task_loads(everything: dict[str, Any]) -> None:
    for name, task in everything.items():
        expected = ROWS * len(LEVELS) if name.removesuffix("_avg") in POLYMATH else ROWS if name in PAIRS else 4
        assert len(task.eval_docs) == expected, name


def test_every_task_writes_out_its_stop_strings_and_budget(everything: dict[str, Any]) -> None:
    for name, task in everything.items():
        settings = task.config.generation_kwargs
        assert settings["max_gen_toks"] == 32768, name
        if name == "aime24":
            continue
        assert settings["until"] == [], name
        sampling = {key: settings.get(key) for key in ("do_sample", "temperature", "top_p")}
        greedy = {"do_sample": False, "temperature": 0.0, "top_p": None}
        assert sampling == ({"do_sample": True, "temperature": 0.6, "top_p": 0.95} if "_avg" in name else greedy), name
        repeats = {"aime24_boxed_avg": 32, "aime25_boxed_avg": 32}.get(name, 4 if "_avg" in name else 1)
        assert task.config.repeats == repeats, name


def test_groups_hold_every_language_once(manager: TaskManager) -> None:
    loaded = manager.load(["polymath_low", "polymath"])
    assert loaded["group_map"]["polymath"] == POLYMATH
    assert loaded["group_map"]["polymath_low"] == [f"{name}_low" for name in POLYMATH]


# ---- prompts


def test_boxed_prompts_are_question_and_instruction(everything: dict[str, Any]) -> None:
    english = default_instructions()["en"]
    prompts = {name: task.doc_to_text(task.eval_docs[0]) for name, task in everything.items()}
    # braces in a question are text, not a template
    assert prompts["aime24_boxed"] == f"What is $1+1$? {{{{7}}}}\n{english}"
    assert prompts["aime25_boxed"] == f"What is $1+1$?\n{english}"
    assert prompts["math500_boxed_avg"] == f"Halve $1$.\n{english}"
    for language in LANGUAGES:
        sentence = default_instructions()[language]
        assert prompts[f"polymath_{language}"] == f"{language} low $0+1$?\n{sentence}"
        assert prompts[f"polymath_{language}_avg"] == prompts[f"polymath_{language}"]
        assert prompts[f"polymath_{language}_top"] == f"{language} top $0+1$?\n{sentence}"


def test_levels_take_turns(everything: dict[str, Any]) -> None:
    docs = everything["polymath_sw"].eval_docs
    assert docs["level"][:] == [*LEVELS] * ROWS
    assert docs["id"][:5] == ["low-sw-0", "medium-sw-0", "high-sw-0", "top-sw-0", "low-sw-1"]
    assert set(everything["polymath_sw_high"].eval_docs["level"]) == {"high"}


def test_other_instructions_and_data_through_metadata(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_VARIABLE)
    path = tmp_path / "wordings.json"
    path.write_text(json.dumps({"de": "Kasten!"}), encoding="utf-8")
    metadata = {"hcot_data": str(hub), "hcot_instructions": str(path)}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    task = manager.load(["polymath_de"])["tasks"]["polymath_de"]
    assert task.doc_to_text(task.eval_docs[0]) == "de low $0+1$?\nKasten!"
    with pytest.raises(ValueError, match="'en'"):
        manager.load(["polymath_en"])


# ---- synthetic tasks


def made(name: str, **metadata: Any) -> Any:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def test_every_synthetic_task_holds_problems_of_the_size_it_is_named_for() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"size": 8})
    for name in MADE:
        docs = manager.load([name])["tasks"][name].eval_docs
        sizes = docs["depth" if "arith" in name else "variables"][:]
        assert sizes == ([3, 4, 5, 6] * 2 if name == "hcot_arith" else [int(re.findall("[0-9]+$", name)[0])] * 8), name
        if "arith" not in name:
            assert docs["answer"][:] == ["1", "0"] * 4


@pytest.mark.parametrize("name", ["hcot_arith", "hcot_arith_d4", "hcot_qbf_n4", "hcot_sat_n4"])
def test_a_hundred_problems_by_default(name: str) -> None:
    assert len(made(name).eval_docs) == 100


def test_groups_of_synthetic_tasks(manager: TaskManager) -> None:
    # the files alone: to load them all would make two thousand problems
    for group, names in SYNTHETIC.items():
        assert manager.task_index[group].cfg["task"] == names


@pytest.mark.parametrize("name, room", [("hcot_arith_d3", 4096), ("hcot_qbf_n10", 131072), ("hcot_sat_n10", 65536)])
def test_synthetic_tasks_are_greedy_with_room_for_long_traces(name: str, room: int) -> None:
    task = made(name, size=4)
    settings = task.config.generation_kwargs
    assert {key: settings[key] for key in ("until", "do_sample", "temperature")} == {
        "until": [],
        "do_sample": False,
        "temperature": 0.0,
    }
    assert settings["max_gen_toks"] == room
    assert task.doc_to_text(task.eval_docs[0]) == task.eval_docs["problem"][0]


def test_synthetic_problems_through_metadata() -> None:
    first, other = (made("hcot_qbf_n3", size=6, problem_seed=seed, pretrained="x") for seed in (0, 1))
    assert len(first.eval_docs) == len(other.eval_docs) == 6
    assert first.eval_docs["problem"][:] != other.eval_docs["problem"][:]
    assert made("hcot_arith", depths=[2], size=3).eval_docs["depth"][:] == [2, 2, 2]


def test_the_size_in_a_name_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="sizes"):
        made("hcot_qbf_n3", sizes=[4])


def test_a_synthetic_task_is_scored_and_aggregated() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"size": 4})
    right = Scripted(lambda doc, _: Response(rf"\boxed{{{doc['answer']}}}", stats=statistics()))
    constant = Scripted(lambda doc, _: Response(r"\boxed{1}", stats=statistics()))
    assert numbers(evaluate(right, ["hcot_qbf"], manager), "hcot_qbf")["acc"] == 1.0
    results = evaluate(constant, ["hcot_sat", "hcot_arith_depths"], manager)
    assert numbers(results, "hcot_sat")["acc"] == numbers(results, "hcot_sat_n5")["acc"] == 0.5  # half of them are true
    assert numbers(results, "hcot_arith_depths").keys() >= {"acc", *MEASURED} - {"requests"}


# ---- aime24 is lm-eval's


@pytest.fixture(scope="module")
def both(hub: Path) -> dict[str, Any]:
    """The task aime24 of lm-eval and ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hub)  # where load_dataset finds the names of the hub
        managers = {"stock": STOCK, "ours": TASKS}
        return {
            key: TaskManager(include_path=str(path), include_defaults=False).load(["aime24"])["tasks"]["aime24"]
            for key, path in managers.items()
        }


def test_aime24_has_the_documents_and_prompts_of_lm_eval(both: dict[str, Any]) -> None:
    stock, ours = both["stock"], both["ours"]
    assert list(ours.eval_docs) == list(stock.eval_docs)
    for doc in stock.eval_docs:
        assert ours.doc_to_text(doc) == stock.doc_to_text(doc)
        assert ours.doc_to_target(doc) == stock.doc_to_target(doc)
        assert ours.fewshot_context(doc, 0) == stock.fewshot_context(doc, 0)


def test_aime24_has_the_settings_of_lm_eval(both: dict[str, Any]) -> None:
    stock, ours = (both[key].dump_config() for key in ("stock", "ours"))
    differing = {key for key in stock.keys() | ours.keys() if stock.get(key) != ours.get(key)}
    assert differing == {"metadata", "metric_list", "process_results"}
    assert ours["metadata"]["version"] == stock["metadata"]["version"]
    assert ours["metric_list"][0] == stock["metric_list"][0]


def test_aime24_overrides_lm_eval_and_keeps_its_tags() -> None:
    # the order in which lm-eval reads its own directory and an --include_path
    manager = TaskManager(include_path=[str(STOCK), str(TASKS)], include_defaults=False)
    assert manager.task_index["aime24"].yaml_path == TASKS / "aime" / "aime24.yaml"
    assert manager.task_index["math_word_problems"].tags == {"aime", "aime24", "aime25"}
    assert manager.task_index["aime25"].yaml_path == STOCK / "aime25.yaml"


def test_aime24_scores_as_lm_eval(both: dict[str, Any], manager: TaskManager) -> None:
    answers = {2: r"\boxed{2}", 4: "$4$", 6: r"\boxed{06}", 8: "no idea"}
    results = {}
    for key, task in both.items():
        model = Scripted(lambda doc, _: answers[doc["Answer"]])
        results[key] = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=10)
    stock, ours = (results[key]["results"]["aime24"] for key in ("stock", "ours"))
    for key in ("exact_match,none", "exact_match_stderr,none"):
        assert ours[key] == stock[key]
    assert ours["exact_match,none"] == 0.5
    assert ours["acc,none"] == 0.5  # one box is right as it is, one with its leading zero
    assert ours["boxed,none"] == 0.5


# ---- evaluation


def test_a_model_without_statistics(manager: TaskManager) -> None:
    results = evaluate("dummy", ["aime24", *BOXED, "polymath"], manager)
    for name in ("aime24", *BOXED):
        assert not MEASURED & numbers(results, name).keys()
        assert numbers(results, name)["acc"] == 0.0
    group = numbers(results, "polymath")
    assert {"acc", "dw_acc", "unchecked", "boxed", "lang_answer"} == group.keys()
    assert group["lang_answer"] == 1.0  # "lol" is too short to tell
    for language in LANGUAGES:
        assert results["n-samples"][f"polymath_{language}"]["effective"] == ROWS * len(LEVELS)
    make_table(results)
    make_table(results, "groups")


def right(doc: dict[str, Any], _: int) -> Response:
    """Right on low and medium problems, wrong on high ones; a top problem exhausts its budget."""
    level, language = doc["level"], doc["language"]
    answer = {"low": doc["answer"], "medium": doc["answer"], "high": "0"}.get(level)
    text = f"{default_instructions()[language].replace('boxed{}', '')} \\boxed{{{answer}}}" if answer else ""
    reason = "length" if answer is None else "eos"
    return Response(text, stats=statistics(finish_reason=reason), thinking="I think this thought is in English.")


def test_a_model_with_statistics(manager: TaskManager) -> None:
    results = evaluate(Scripted(right), ["polymath"], manager, log_samples=True)
    german = numbers(results, "polymath_de")
    expected = {"acc": 0.5, "unchecked": 0.0, "boxed": 0.75, "completed": 0.75, "generated_tokens": 100.0}
    expected |= {
        "pruned_share": 0.4,
        "peak_live_tokens": 80.0,
        **dict.fromkeys(STRUCTURE, 0.0),
        "requests": 8,
        "lang_answer": 1.0,
        "lang_thinking": 0.0,
    }
    assert german == pytest.approx(expected | {"dw_acc": 3 / 15})
    assert results["results"]["polymath_de"]["dw_acc_stderr,none"] == 0.0  # no spread within a level
    assert numbers(results, "polymath_en")["lang_thinking"] == 1.0
    assert not {"lang_answer", "lang_thinking"} & numbers(results, "polymath_ms").keys()

    group = numbers(results, "polymath")
    assert group["lang_thinking"] == pytest.approx(1 / 17)
    assert group["dw_acc"] == pytest.approx(3 / 15)
    assert group.keys() == expected.keys() - {"requests"} | {"dw_acc"}

    sample = results["samples"]["polymath_de"][3]
    assert sample["requests"] == [statistics(finish_reason="length")]
    json.dumps(sample["requests"])


def test_the_standard_error_of_dw_acc_is_in_its_column(manager: TaskManager) -> None:
    model = Scripted(lambda doc, _: r"\boxed{1}")  # right on the first problem of each level
    results = evaluate(model, ["polymath_fr"], manager)
    values = results["results"]["polymath_fr"]
    spread = (1 / 2) / 2  # sample variance of (1, 0), over two problems
    stderr = (sum(w * w for w in (1, 2, 4, 8)) * spread) ** 0.5 / 15
    assert values["dw_acc,none"] == 0.5
    assert values["dw_acc_stderr,none"] == pytest.approx(stderr)
    (row,) = [line for line in make_table(results).splitlines() if "|dw_acc" in line]
    assert [cell.strip() for cell in row.split("|")][-4:-1] == ["0.5", "±", f"{stderr:.4f}"]


def test_a_low_limit_leaves_dw_acc_undefined(manager: TaskManager) -> None:
    values = evaluate("dummy", ["polymath_fr"], manager, limit=5)["results"]["polymath_fr"]
    assert (values["dw_acc,none"], values["dw_acc_stderr,none"]) == (0.0, "N/A")
    values = evaluate("dummy", ["polymath_fr"], manager, limit=3)["results"]["polymath_fr"]
    assert values["dw_acc,none"] != values["dw_acc,none"]


def test_repeats(manager: TaskManager) -> None:
    def every_other(doc: dict[str, Any], n: int) -> Response:
        answer = doc["answer"] if n % 2 else str(n + 7)
        return Response(rf"\boxed{{{answer}}}", stats=statistics(generated_tokens=100 + n))

    model = Scripted(every_other)
    results = evaluate(model, ["math500_boxed_avg"], manager, log_samples=True)
    assert len(model.asked) == 4 * 4
    values = numbers(results, "math500_boxed_avg")
    # two right ones of four, which agree; the wrong ones, 7 and 9, do not
    assert values["avg@4"] == 0.5
    assert values["pass@2"] == pytest.approx(1 - 1 / 6)
    assert values["pass@4"] == 1.0
    assert values["maj@4"] == 1.0
    assert values["generated_tokens"] == 101.5
    assert values["requests"] == 16
    assert "acc" not in values
    assert [len(sample["requests"]) for sample in results["samples"]["math500_boxed_avg"]] == [4] * 4


def test_repeats_of_a_group(manager: TaskManager) -> None:
    group = numbers(evaluate(Scripted(right), ["polymath_avg"], manager), "polymath_avg")
    assert {key for key in group if "@" in key} == {"avg@4", "pass@2", "pass@4", "maj@4"}
    assert group["avg@4"] == group["maj@4"] == 0.5
    assert group["dw_acc"] == pytest.approx(3 / 15)


def test_repeats_through_metadata() -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"repeats": 3})
    model = Scripted(lambda doc, n: rf"\boxed{{{doc['answer'] if n == 2 else 0}}}")
    results = evaluate(model, ["aime25_boxed_avg"], manager)
    assert {key for key in numbers(results, "aime25_boxed_avg") if "@" in key} == {"avg@3", "pass@2", "pass@3", "maj@3"}
    assert numbers(results, "aime25_boxed_avg")["avg@3"] == pytest.approx(1 / 3)
    assert len(model.asked) == 4 * 3


@pytest.mark.parametrize("repeats", [0, -1, "4", True, 2.0])
def test_repeats_must_be_a_positive_integer(repeats: Any) -> None:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"repeats": repeats})
    with pytest.raises(ValueError, match="a positive integer is needed"):
        manager.load(["aime25_boxed_avg"])


@pytest.mark.parametrize("override", [{"dataset_name": "xx"}, {"test_split": "hard"}])
def test_an_unknown_language_or_level_is_an_error(manager: TaskManager, override: dict[str, str]) -> None:
    entry = manager.task_index["polymath_en"]
    with pytest.raises(ValueError, match=repr(next(iter(override.values())))):
        manager._factory.build(entry, overrides=override, registry=manager.task_index)


def test_outputs_without_metrics(manager: TaskManager) -> None:
    """``--predict_only`` asks for no metric at all."""
    results = evaluate("dummy", ["aime24", "polymath_en", "math500_boxed_avg"], manager, predict_only=True)
    for name in ("aime24", "polymath_en", "math500_boxed_avg"):
        assert numbers(results, name).keys() == {"bypass"}


# ---- the real data


@pytest.mark.skipif("HCOT_LMEVAL_TEST_DATA" not in os.environ, reason="HCOT_LMEVAL_TEST_DATA names no copy of the data")
def test_real_data(monkeypatch: pytest.MonkeyPatch, manager: TaskManager) -> None:
    monkeypatch.setenv(DATA_VARIABLE, os.environ["HCOT_LMEVAL_TEST_DATA"])
    sizes = {name: len(manager.load([name])["tasks"][name].eval_docs) for name in ("aime24", *BOXED, *POLYMATH, *PAIRS)}
    assert sizes == {
        "aime24": 30,
        "aime24_boxed": 30,
        "aime25_boxed": 30,
        "math500_boxed": 500,
        **dict.fromkeys(POLYMATH, 500),
        **dict.fromkeys(PAIRS, 125),
    }
