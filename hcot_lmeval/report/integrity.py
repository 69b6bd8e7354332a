"""Whether the files of one run agree with themselves, with the problems they hold and with the name they are given.

A table is only as good as the files behind it. A samples file that was cut off, put beside the wrong results, or whose
labels were moved gives numbers as smooth as any other; each of these leaves a contradiction, and here it is found.
This module imports the standard library alone.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from statistics import fmean
from typing import Any

from hcot_lmeval.events import Statistics
from hcot_lmeval.report.recorded import budget, model_args, task_config
from hcot_lmeval.report.results import ResultsError, Run

SHOWN = 5
"""Documents that a message names."""

COUNTED = ("generated_tokens", "pruned_tokens", "reforwarded_tokens", "prune_events", "blocks", "peak_live_tokens")
"""Statistics of a response that are not above the totals or maxima of its run."""

POLICY_WORDS = {
    "off": {"off"},
    "unpruned": {"off"},
    "recompute": {"recompute"},
    "evict": {"evict"},
    "pruned": {"recompute", "evict"},
}
"""Words in the name of a run -> the policies that they can mean."""

NAMED_WINDOW = re.compile(r"(?:\b(?:context|window)[ =]|max_context[ =]|, )(\d+)(?=,|$)")
"""A context window in the name of a run, as in ``MODEL, off, 1024`` and ``MODEL, window 1024``."""

COLUMN = re.compile(r"^(?:\{\{\s*)?(\w+)(?:\s*\}\})?$")
"""A ``doc_to_target`` that is a column of the documents and nothing else."""


class Incomparable(ResultsError):
    """Runs cannot stand in one table; the message says which, why, and what to do."""


def check_integrity(run: Run) -> None:
    """Refuses a run whose files contradict themselves or its name.

    Raises:
        Incomparable: documents are missing or there twice; statistics of responses are missing; a document or its
            target is not the one that was hashed when the run was made; a target is not the answer in its document; a
            score lies outside 0..1; the scores do not have the mean of the results file; the responses cannot have
            been made under the settings beside them; the name says another policy or window than was used.
    """
    checks = (_check_complete, _check_statistics, _check_settings, _check_hashes, _check_targets, _check_scores)
    for check in (*checks, check_name):
        check(run)


def _check_complete(run: Run) -> None:
    counts = Counter(sample["doc_id"] for sample in run.samples)
    twice = [doc_id for doc_id, count in counts.items() if count > 1]
    if twice:
        raise _fault(run, f"{documents(twice)} stand in the samples more than once", "remove the copies, or run again")
    expected = run.results.get("n-samples", {}).get(run.task, {}).get("effective")
    if expected not in (None, len(counts)):
        told = f"the samples file holds {len(counts)} documents, the results file was made from {expected}"
        raise _fault(run, told, "a part was cut off or removed: run it again")


def _check_statistics(run: Run) -> None:
    """An older version of this package counted less; what it did not count is not 0."""
    wanted = {field.name for field in fields(Statistics)}
    missing = sorted({name for stats in run.requests or () for name in wanted - stats.keys()})
    if missing:
        told = f"the statistics of its responses lack {', '.join(missing)}, so an older version made them"
        raise _fault(run, told, "run it again")


def _check_settings(run: Run) -> None:
    """Responses of another run, as from a cache, have statistics that these settings and totals do not allow."""
    if run.totals is None or not run.requests:
        return
    limit = budget(run)
    most: dict[str, Any] = {name: run.totals[name] for name in COUNTED if name in run.totals}
    if run.policy == "off":
        most |= {"pruned_tokens": 0, "prune_events": 0}
    if limit is not None:
        most["generated_tokens"] = min(limit.high, most.get("generated_tokens", limit.high))
    for name, allowed in most.items():
        found = max(stats[name] for stats in run.requests)
        if found > allowed:
            told = f"a response has {name}={found}, and the results file (pruning={run.policy}) allows only {allowed}"
            raise _fault(run, told, "the responses are another run's, as from a cache: run it again")


def _check_hashes(run: Run) -> None:
    """lm-eval hashed each document and target when it made them (`lm_eval.evaluator`, 0.4)."""
    for part, text in (("doc", _as_hashed), ("target", str)):
        wrong = [s["doc_id"] for s in run.samples if f"{part}_hash" in s and s[f"{part}_hash"] != _hash(text(s[part]))]
        if wrong:
            told = f"{part}_hash of {documents(wrong)} is not that of the {part} beside it"
            raise _fault(run, told, "the file was changed after the run: take the original, or run again")


def _as_hashed(doc: Any) -> str:
    return json.dumps(doc, indent=2, ensure_ascii=False)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _check_targets(run: Run) -> None:
    found = COLUMN.match(str(task_config(run).get("doc_to_target", "")))
    if found is None:  # a template or a function
        return
    column = found[1]
    wrong = [s["doc_id"] for s in run.samples if column in s["doc"] and not _is_target(s["doc"][column], s["target"])]
    if wrong:
        told = f"the target of {documents(wrong)} is not the {column} of the document"
        raise _fault(run, told, "the labels were swapped or changed: run it again")


def _is_target(answer: Any, target: str) -> bool:
    """Whether a target is the answer, perhaps read as a Python literal, as lm-eval does with templates."""
    if str(answer) == target:
        return True
    try:
        return str(ast.literal_eval(str(answer))) == target
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _check_scores(run: Run) -> None:
    outside = [doc_id for doc_id, score in run.scores.items() if not 0 <= score <= 1]
    if outside:
        told = f"{run.metric} of {documents(outside)} lies outside 0..1, as in {run.scores[outside[0]]:g}"
        raise _fault(run, told, "name another metric with --metric")
    recorded = run.results["results"].get(run.task, {}).get(f"{run.metric},{run.samples[0]['filter']}")
    if not _is_mean(run) or not isinstance(recorded, (int, float)):
        return
    mean = fmean(run.scores.values())
    if not math.isclose(mean, recorded, abs_tol=1e-6):
        told = f"the mean of {run.metric} over the samples is {mean:.4f}, its results file says {recorded:.4f}"
        raise _fault(run, told, "the two files are not of one evaluation, or one was changed: run it again")


def _is_mean(run: Run) -> bool:
    metrics = task_config(run).get("metric_list") or []
    return any(entry["metric"] == run.metric and entry.get("aggregation") == "mean" for entry in metrics)


def check_name(run: Run) -> None:
    """Refuses a name that says another policy or window than the run recorded.

    Raises:
        Incomparable: as said.
    """
    if run.totals is None:
        return
    for word in re.split(r"[\s,()=]+", run.name.lower()):  # a part of a word, as in tiny-evict, claims nothing
        if run.policy not in POLICY_WORDS.get(re.sub(r"-\d+$", "", word), {run.policy}):
            raise _misnamed(run, f"policy {run.policy}")
    windows = {int(number) for number in NAMED_WINDOW.findall(run.name)}
    if windows and run.max_context not in windows:
        raise _misnamed(run, f"max_context={run.max_context}")


def check_settings(run: Run, expected: Mapping[str, Any]) -> None:
    """Refuses a run that was made with other model arguments than it should have been.

    Args:
        run: as read.
        expected: model arguments, such as ``{"pruning": "off", "max_context": 1024}``.

    Raises:
        Incomparable: one of them has another value in the results file, or does not stand there.
    """
    recorded = model_args(run)
    for name, value in expected.items():
        if str(recorded.get(name)) != str(value):
            raise _misnamed(run, f"{name}={recorded.get(name)} instead of {value}")
    ours = {"pruning": run.policy, "max_context": run.max_context} if run.totals else {}
    for name in ours.keys() & expected.keys():
        if ours[name] != expected[name]:
            raise _misnamed(run, f"{name}={ours[name]} instead of {expected[name]}")


def _misnamed(run: Run, told: str) -> Incomparable:
    return _fault(run, f"its results file says {told}", "the labels were swapped, or the folder is another run's")


def _fault(run: Run, told: str, advice: str) -> Incomparable:
    return Incomparable(f"{run.name!r} ({run.task}): {told}; {advice} ({run.path})")


def documents(ids: Iterable[int]) -> str:
    """Returns ``document 3`` or ``12 documents (0, 1, 2, 3, 4, ...)``."""
    every = sorted(ids)
    if len(every) == 1:
        return f"document {every[0]}"
    named = ", ".join(map(str, every[:SHOWN]))
    return f"{len(every)} documents ({named}{', ...' if len(every) > SHOWN else ''})"
