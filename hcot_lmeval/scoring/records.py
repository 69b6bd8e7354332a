"""One response and its gold answer turned into numbers.

Every function returns metric names with plain numbers, so that a record can be a line of a samples file as it is.
The names and their meaning:

================= ======================================================================================
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
================= ======================================================================================

The last eight come from the statistics that a `hcot_lmeval.response.Response` carries. A model of another kind returns
plain strings: these are then absent, for every document alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hcot_lmeval import answers

COMPLETE = frozenset({"eos", "stop"})
"""The finish reasons with which a model ends by itself; the others (length, context, loop) are not its own."""


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


def mean_record(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Averages the records of one document, key by key; all records have the same keys."""
    return {key: fmean(record[key] for record in records) for key in records[0]}
