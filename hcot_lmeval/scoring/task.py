"""The task classes that the YAML files name (``class: !function hcot_lmeval.scoring.task.BoxedTask``).

A class adds three things to lm-eval's `ConfigurableTask`: the data may come from a local directory, documents get the
columns that the prompt needs, and the list of metrics is written from one table. All else stands in the YAML.

Options through ``--metadata '{…}'`` (`TaskManager(metadata=…)` in Python):

* ``hcot_data``: directory with the data, before `HCOT_LMEVAL_DATA`;
* ``hcot_instructions``: JSON file with other instructions, before `HCOT_LMEVAL_INSTRUCTIONS`;
* ``repeats``: k of the tasks with repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from datasets import DatasetDict
from lm_eval.api.task import ConfigurableTask

from hcot_lmeval.scoring import aggregate, data, process
from hcot_lmeval.scoring.instructions import default_instructions, instruction
from hcot_lmeval.scoring.language import UNSUPPORTED

ALL_LEVELS = "all"
"""``test_split`` of a PolyMath task with the four levels in turn."""

HIGHER_IS_BETTER: dict[str, bool | None] = {
    "acc": True,
    "exact_match": True,
    "unchecked": False,
    "boxed": True,
    "completed": True,
    "generated_tokens": None,
    "pruned_share": None,
    "peak_live_tokens": False,
    "illegal_tokens": False,
    "unclosed_blocks": False,
    "forced_tokens": False,
    "loops": False,
    "requests": None,
    "lang_answer": True,
    "lang_thinking": True,
    "dw_acc": True,
    "dw_acc_stderr": None,
}
AGGREGATION: dict[str, Callable[..., Any]] = {
    "requests": aggregate.count,
    "dw_acc": aggregate.difficulty_weighted,
    "dw_acc_stderr": aggregate.difficulty_weighted_stderr,
}
GENERATION = ("completed", "generated_tokens", "pruned_share", "peak_live_tokens")
STRUCTURE = ("illegal_tokens", "unclosed_blocks", "forced_tokens", "loops")
CHECK = ("unchecked", "boxed")


def metric_list(names: Iterable[str]) -> list[dict[str, Any]]:
    """Returns lm-eval's metric_list for names of `HIGHER_IS_BETTER`, and for avg@k, pass@k, maj@k."""
    return [
        {
            "metric": name,
            "aggregation": AGGREGATION.get(name, "mean"),
            "higher_is_better": True if "@" in name else HIGHER_IS_BETTER[name],
        }
        for name in names
    ]


def check_task(task: Any) -> None:
    """Looks at a task that scores with one of our functions, before anything is generated for it.

    A task of somebody's own may name a function of `process` in its YAML and none of our classes: it gets the
    aggregations that lm-eval does not know.

    Raises:
        ValueError: a document, or what becomes of the responses, is not as the function needs it.
    """
    score = task.config.process_results
    if score not in process.FUNCTIONS:
        return
    task._aggregation_list.update(AGGREGATION)
    steps = [step.get("function") for kept in task.config.filter_list or () for step in kept["filter"]]
    try:
        for doc in task.eval_docs:
            process.gold_of(doc)
        response = [[""] * task.config.repeats] if "take_first_k" in steps else [""]
        score(dict(next(iter(task.eval_docs))), response)
    except (ValueError, KeyError) as error:
        raise ValueError(f"task {task.config.task}: {error} (tasks/README.md has a complete example)") from error


class BoxedTask(ConfigurableTask):
    """Questions in English with an instruction to box the answer, one response each."""

    process: ClassVar[Callable[..., Any]] = staticmethod(process.boxed)

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval hands the whole YAML over, but takes no `class` back
        fields = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config=self.complete(fields))

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        """Returns the configuration with what the YAML leaves to the class."""
        return {
            "output_type": "generate_until",
            "num_fewshot": 0,
            "process_results": type(self).process,
            "metric_list": metric_list(self.metrics(config)),
            **config,
        }

    def metrics(self, config: dict[str, Any]) -> tuple[str, ...]:
        """Returns the names of the metrics, in the order in which they are reported."""
        return ("acc", *CHECK, *GENERATION, *STRUCTURE, "requests")

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests, if the documents are such as can be scored."""
        check_task(self)
        super().build_all_requests(**options)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Loads `dataset_path` from the hub or from a local directory and adds the columns of this class."""
        root = self.option("hcot_data")
        loaded = data.load(self.config.dataset_path, self.config.dataset_name, root=root, **(dataset_kwargs or {}))
        self.dataset = self.prepare(loaded)

    def prepare(self, loaded: DatasetDict) -> DatasetDict:
        """Returns the data as the prompt needs it: here with the column ``instruction``."""
        return self.with_instruction(loaded, "en")

    def with_instruction(self, loaded: DatasetDict, language: str) -> DatasetDict:
        sentence = instruction(language, self.option("hcot_instructions"))
        return DatasetDict({split: data.with_columns(rows, instruction=sentence) for split, rows in loaded.items()})

    def option(self, name: str) -> Any:
        return (self.config.metadata or {}).get(name)


class Aime24Task(BoxedTask):
    """lm-eval's own aime24 with more metrics: its documents, prompt and exact_match stay as they are."""

    process = staticmethod(process.aime24)

    def metrics(self, config: dict[str, Any]) -> tuple[str, ...]:
        return ("exact_match", *super().metrics(config))

    def prepare(self, loaded: DatasetDict) -> DatasetDict:
        return loaded


class SampledTask(BoxedTask):
    """k responses to each question: avg@k, pass@k, maj@k."""

    process = staticmethod(process.sampled)

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        config = config | {"repeats": repeats_of(config)}
        # without a filter of its own a task keeps the first response and drops the others
        keep = [{"function": "take_first_k", "k": config["repeats"]}]
        return super().complete(config) | {"filter_list": [{"name": "none", "filter": keep}]}

    def metrics(self, config: dict[str, Any]) -> tuple[str, ...]:
        k = config["repeats"]
        passes = (f"pass@{j}" for j in aggregate.pass_ks(k))
        return (f"avg@{k}", *passes, f"maj@{k}", *(name for name in super().metrics(config) if name != "acc"))


class _PolyMath(BoxedTask):
    """One language of PolyMath (``dataset_name``), one level (``test_split``) or all of them in turn."""

    process_mixed: ClassVar[Callable[..., Any]]

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        check_polymath(config)
        mixed = {"process_results": type(self).process_mixed} if config["test_split"] == ALL_LEVELS else {}
        return super().complete(mixed | config)

    def metrics(self, config: dict[str, Any]) -> tuple[str, ...]:
        language = () if config["dataset_name"] in UNSUPPORTED else ("lang_answer", "lang_thinking")
        weighted = ("dw_acc", "dw_acc_stderr") if config["test_split"] == ALL_LEVELS else ()
        return (*super().metrics(config), *language, *weighted)

    def prepare(self, loaded: DatasetDict) -> DatasetDict:
        language = self.config.dataset_name
        loaded = self.with_instruction(loaded, language)
        levels = {name: data.with_columns(loaded[name], language=language, level=name) for name in aggregate.LEVELS}
        return DatasetDict({**levels, ALL_LEVELS: data.interleave(list(levels.values()))})


class PolyMathTask(_PolyMath):
    """PolyMath, one response to each question."""

    process_mixed = staticmethod(process.polymath)


class SampledPolyMathTask(_PolyMath, SampledTask):
    """PolyMath, k responses to each question."""

    process_mixed = staticmethod(process.sampled_polymath)


def repeats_of(config: dict[str, Any]) -> int:
    """Returns k: ``repeats`` of the metadata, else of the YAML.

    Raises:
        ValueError: it is not a positive integer.
    """
    k = (config.get("metadata") or {}).get("repeats", config.get("repeats"))
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"repeats={k!r} of task {config.get('task')}: a positive integer is needed")
    return k


def check_polymath(config: dict[str, Any]) -> None:
    """Raises ValueError if the language or the level of a PolyMath task is not one of the benchmark."""
    language, level = config.get("dataset_name"), config.get("test_split")
    if language not in default_instructions():
        raise ValueError(f"dataset_name={language!r} is no language of PolyMath: {', '.join(default_instructions())}")
    if level not in (ALL_LEVELS, *aggregate.LEVELS):
        raise ValueError(f"test_split={level!r} is no level of PolyMath: {', '.join((ALL_LEVELS, *aggregate.LEVELS))}")
