"""What lm-eval calls for each document: (document, filtered responses) → metrics.

The responses come as one string, or as the list of k strings in a task with repeats; then each number is the mean over
them. The names and their meaning:

================= ==========================================================================================
acc               1 if the last boxed answer is right, else 0 (also when it could not be checked)
unchecked         1 if there is an answer that the checker could not judge (time or memory limit, unparsable)
boxed             1 if the answer part contains a complete boxed answer
completed         1 if the model ended by itself (end token or stop string) and not at a budget
generated_tokens  tokens generated, pruned ones included
pruned_share      pruned tokens / generated tokens
peak_live_tokens  the most tokens the model saw at once, prompt included
illegal_tokens    tokens that the grammar of the notation forbids at their place
unclosed_blocks   blocks still open at the end
forced_tokens     tokens that constraints, caps or a forced answer changed
loops             1 if the response was found to repeat itself (only looked for with loop_tokens)
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

Those from ``completed`` to ``loops``, and ``requests``, come from the statistics that a `hcot_lmeval.response.Response`
carries. A model of another kind returns plain strings: they are then absent, for every document alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hcot_lmeval import answers
from hcot_lmeval.events import COMPLETE
from hcot_lmeval.scoring.aggregate import majority, pass_at_k, pass_ks
from hcot_lmeval.scoring.language import consistency

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
    records = [_record(doc, response, grade) for response, grade in zip(responses, grades, strict=True)]
    means = {key: fmean(record[key] for record in records) for key in records[0] if key != "acc"}
    return _repeats(grades) | means | _requests(responses)


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


def gold_of(doc: Mapping[str, Any]) -> str:
    """Returns the reference answer of a document, whatever the case of its field name.

    Raises:
        ValueError: the document has no field called answer.
    """
    for key, value in doc.items():
        if key.lower() == "answer":
            return str(value)
    raise ValueError(f"no field named 'answer' among {sorted(doc)}; name the field with the gold answer so")


def judgement(grade: answers.Grade) -> dict[str, float]:
    """Returns acc, unchecked and boxed of a graded response."""
    return {
        "acc": float(grade.correct is True),
        "unchecked": float(grade.correct is None),
        "boxed": float(grade.answer is not None),
    }


def statistics(response: str) -> dict[str, float]:
    """Returns what a response tells of its generation; nothing for a plain string."""
    stats = stats_of(response)
    if not stats:
        return {}
    generated = stats["generated_tokens"]
    return {
        "completed": float(stats["finish_reason"] in COMPLETE),
        "generated_tokens": float(generated),
        "pruned_share": stats["pruned_tokens"] / generated if generated else 0.0,
        "peak_live_tokens": float(stats["peak_live_tokens"]),
        "illegal_tokens": float(stats["illegal_tokens"]),
        "unclosed_blocks": float(stats["malformed"].get("unclosed", 0)),
        "forced_tokens": float(sum(stats["forced"].values())),
        "loops": float(stats["loops"] > 0),
    }


def stats_of(response: str) -> dict[str, Any]:
    """Returns the statistics of a generation (`hcot_lmeval.events.Statistics.as_dict`); empty for a plain string."""
    return getattr(response, "stats", {})


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
