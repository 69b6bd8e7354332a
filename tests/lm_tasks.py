"""Small tasks for lm-eval that live in memory, and the requests they make."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance

QUESTIONS = tuple(f"What is {n} times {n + 3}?" + " Think carefully." * (n % 3) for n in range(8))


def generation_task(
    name: str = "tiny_generation", docs: int = 5, repeats: int = 1, **generation_kwargs: Any
) -> dict[str, Any]:
    """A task that reports, per document, what `Response` knows about its first answer."""
    return {
        "task": name,
        "custom_dataset": lambda **_: _dataset(docs),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 24, **generation_kwargs},
        "repeats": repeats,
        "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": repeats}]}],
        "process_results": _report,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("generated", "distinct")
        ],
    }


def choice_task(name: str = "tiny_choice", docs: int = 5) -> dict[str, Any]:
    """A multiple-choice task: log-likelihoods alone."""
    return {
        "task": name,
        "custom_dataset": lambda **_: _dataset(docs),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no", " perhaps [THOUGHT]"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def instances(
    questions: tuple[str, ...] = QUESTIONS, repeats: int = 1, task: str = "t", **kwargs: Any
) -> list[Instance]:
    """The requests of a generation task as lm-eval hands them to a model: an instance once per repeat."""
    kwargs = {"until": [], "max_gen_toks": 24, **kwargs}
    made = [
        Instance("generate_until", {"question": text}, (text, dict(kwargs)), 0, (task, number, repeats))
        for number, text in enumerate(questions)
    ]
    return [instance for instance in made for _ in range(repeats)]


def _dataset(docs: int) -> DatasetDict:
    rows = [{"question": question, "answer": str(n)} for n, question in enumerate(QUESTIONS[:docs])]
    return DatasetDict({"test": Dataset.from_list(rows)})


def _report(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    answers = results[0] if isinstance(results[0], list) else results
    return {"generated": answers[0].stats["generated_tokens"], "distinct": len({a.raw for a in answers})}
