"""What lm-eval calls for each document: (document, filtered responses) → metrics.

The responses come as one string, or as the list of k strings in a task with repeats. Besides the numbers of
`records.py` a document gets:

================= ==========================================================================================
exact_match       aime24 only: lm-eval's own string match, unchanged
requests          the full statistics of each response; aggregated to their number
avg@k             share of the k responses that are right
pass@j            `aggregate.pass_at_k` for j = 2, 4, 8, … and k
maj@k             `aggregate.majority` over the k responses
lang_answer       PolyMath: the answer is in the language of the question (`language.py`)
lang_thinking     PolyMath: so is the thinking
dw_acc            PolyMath: (level, accuracy of this problem); aggregated by `aggregate.difficulty_weighted`
dw_acc_stderr     the same, aggregated to the standard error; stands behind dw_acc, whose column it fills
================= ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hcot_lmeval import answers
from hcot_lmeval.scoring.aggregate import majority, pass_at_k, pass_ks
from hcot_lmeval.scoring.language import consistency
from hcot_lmeval.scoring.records import gold_of, judgement, mean_record, statistics, stats_of

NO_LIST = (
    "process.sampled scores the k responses to a question together: it needs `repeats: k` and the filter "
    "`take_first_k`, as the class SampledTask writes them"
)
Doc = Mapping[str, Any]
Metrics = dict[str, Any]


def boxed(doc: Doc, results: Sequence[str]) -> Metrics:
    """One response per document."""
    return _record(doc, results[0]) | _requests(results[:1])


def aime24(doc: Doc, results: Sequence[str]) -> Metrics:
    """lm-eval's own exact_match, then ours. Upstream's function is called, so its number stays what it is."""
    from lm_eval.tasks.aime.utils import process_results

    return process_results(dict(doc), list(results)) | boxed(doc, results)


def polymath(doc: Doc, results: Sequence[str]) -> Metrics:
    """One response per document, all levels in one task."""
    metrics = boxed(doc, results)
    return metrics | _weighted(doc, metrics["acc"])


def sampled(doc: Doc, results: Sequence[Sequence[str]]) -> Metrics:
    """Several responses per document: avg@k, pass@j, maj@k; every other number is the mean over them.

    Raises:
        ValueError: there is one response and no list of them.
    """
    responses = results[0]  # what take_first_k left
    if isinstance(responses, str):
        raise ValueError(NO_LIST)
    grades = [answers.grade(response, gold_of(doc)) for response in responses]
    record = mean_record([_record(doc, response, grade) for response, grade in zip(responses, grades, strict=True)])
    return _repeats(grades) | {key: value for key, value in record.items() if key != "acc"} | _requests(responses)


def sampled_polymath(doc: Doc, results: Sequence[Sequence[str]]) -> Metrics:
    """Several responses per document, all levels in one task; dw_acc weighs avg@k."""
    metrics = sampled(doc, results)
    return metrics | _weighted(doc, metrics[f"avg@{len(results[0])}"])


FUNCTIONS = (boxed, aime24, polymath, sampled, sampled_polymath)
"""What the ``process_results`` of a task may be."""


def _record(doc: Doc, response: str, grade: answers.Grade | None = None) -> dict[str, float]:
    grade = grade or answers.grade(response, gold_of(doc))
    language = consistency(response, doc["language"]) if "language" in doc else {}
    return judgement(grade) | statistics(response) | language


def _repeats(grades: Sequence[answers.Grade]) -> dict[str, float]:
    right = [grade.correct is True for grade in grades]
    k, c = len(right), sum(right)
    vote = majority([grade.answer for grade in grades], right, _same)
    passes = {f"pass@{j}": pass_at_k(k, c, j) for j in pass_ks(k)}
    return {f"avg@{k}": c / k, **passes, f"maj@{k}": vote}


def _same(answer: str, other: str) -> bool:
    return answers.is_equivalent(answer, other).correct is True


def _requests(responses: Sequence[str]) -> Metrics:
    stats = [stats_of(response) for response in responses]
    return {"requests": stats} if all(stats) else {}


def _weighted(doc: Doc, accuracy: float) -> Metrics:
    return {"dw_acc": (doc["level"], accuracy), "dw_acc_stderr": (doc["level"], accuracy)}
