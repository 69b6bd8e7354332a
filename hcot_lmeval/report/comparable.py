"""Whether runs may stand in one table. What differs on purpose may differ; anything else is refused, with the reason.

May differ: the model, the policy and its ablation, the controls, the context window, the seed. Between *different*
checkpoints the chat template may differ too, since it belongs to the model as its tokenizer does; `remarks` says so.
Must agree within a task: its version and configuration, the documents and their targets, the metric and filter, the
number of responses, few-shot examples, system instruction, sampling, the budget of generated tokens
(`results.Budget`), and the versions of lm-eval, transformers and torch.

And the files of each run must agree with themselves, with the problems they hold and with the name they are given. A
samples file that was cut off, put beside the wrong results, or whose labels were moved gives numbers as smooth as any
other; each of these leaves a contradiction, and here it is found. This module imports the standard library alone.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from os.path import commonprefix
from statistics import fmean
from typing import Any

from hcot_lmeval.events import Statistics
from hcot_lmeval.report.results import LIMITS, ResultsError, Run, label

ANY_DIFFERENCE = frozenset(
    """ablation any_policy batch_size closing_tokens constraints delta device force_answer journal loop_tokens
    max_batch_size max_block_tokens max_context max_depth max_gen_toks max_length max_model_len max_solution_tokens
    model notes peft pretrained pruning revision seed""".split()
)
"""Model arguments that need no remark: they differ on purpose, are compared elsewhere, or do not change results."""

CODE = re.compile(r"^\s*(def |class |@|lambda|<function|<class|functools\.partial)")
"""Beginnings of a function as lm-eval writes it into the configuration of a task."""

COUNTED = ("generated_tokens", "pruned_tokens", "reforwarded_tokens", "prune_events", "blocks", "peak_live_tokens")
"""Statistics of a response that are not above the totals or maxima of its run."""

POLICY_WORDS = {
    **{word: {word} for word in ("off", "recompute", "evict")},
    "unpruned": {"off"},
    "pruned": {"recompute", "evict"},
}
"""Words in the name of a run -> the policies that they can mean."""

NAMED_WINDOW = re.compile(r"(?:\b(?:context|window)[ =]|max_context[ =]|, )(\d+)(?=,|$)")
"""A context window in the name of a run, as in ``MODEL, off, 1024`` and ``MODEL, window 1024``."""

COLUMN = re.compile(r"^(?:\{\{\s*)?(\w+)(?:\s*\}\})?$")
"""A ``doc_to_target`` that is a column of the documents and nothing else."""

SAME_COMMAND = "run one of them again with the arguments of the other"
OTHER_VERSION = "run the older one again, or allow it with --allow-versions"
ADVICE = {
    "versions of the task": "run the older one again",
    "metrics": "name one with --metric",
    "filters": "name one with --filter",
}
"""Where `SAME_COMMAND` is none."""
SWAPPED = "the labels were swapped, or the folder is another run's"


class Incomparable(ResultsError):
    """Runs cannot stand in one table; the message says which, why, and what to do."""


Faults = Iterator[tuple[str, str]]
"""What is wrong, and what to do."""


def check_comparable(runs: Sequence[Run], *, allow_versions: bool = False) -> None:
    """Refuses runs that must not be compared.

    Args:
        runs: of any tasks; those of one task are held against each other.
        allow_versions: let the versions of lm-eval, transformers and torch differ, and the code of a task's functions.

    Raises:
        Incomparable: naming the runs, what differs, and what to do.
    """
    for one, other in itertools.combinations(runs, 2):
        _refuse(one, other, _same_run(one, other))
    for run in runs:
        check_integrity(run)
    for one, other in itertools.permutations(runs, 2):
        _refuse(one, other, _swapped_name(one, other))
    for task in dict.fromkeys(run.task for run in runs):
        alike = [run for run in runs if run.task == task]
        for run in alike[1:]:
            _refuse(alike[0], run, _differences(alike[0], run, allow_versions))
        for one, other in itertools.combinations(alike, 2):  # what agrees with the first need not agree here
            _refuse(one, other, itertools.chain(_other_budget(one, other), _other_prompts(one, other)))


def _refuse(one: Run, other: Run, faults: Faults) -> None:
    for fault, advice in faults:
        raise Incomparable(f"{one.name!r} and {other.name!r} ({one.task}) cannot be compared: {fault}; {advice}")


# --- one run ----------------------------------------------------------------------------------------------------------


def check_integrity(run: Run) -> None:
    """Refuses a run whose files contradict themselves or its name.

    Raises:
        Incomparable: documents are missing or there twice; statistics of responses are missing; a document or its
            target is not the one that was hashed when the run was made; a target is not the answer in its document; a
            score lies outside 0..1; the scores do not have the mean of the results file; the responses cannot have
            been made under the settings beside them; the name says another policy or window than was used.
    """
    checks = (_complete, _statistics, _settings, _hashes, _targets, _scores, _name)
    for fault, advice in itertools.chain.from_iterable(check(run) for check in checks):
        raise Incomparable(f"{run.name!r} ({run.task}): {fault}; {advice} ({run.path})")


def _complete(run: Run) -> Faults:
    counts = Counter(sample["doc_id"] for sample in run.samples)
    if twice := [doc_id for doc_id, count in counts.items() if count > 1]:
        yield f"{_documents(twice)} stand in the samples more than once", "remove the copies, or run again"
    expected = run.results.get("n-samples", {}).get(run.task, {}).get("effective")
    if expected not in (None, len(counts)):
        fault = f"the samples file holds {len(counts)} documents, the results file was made from {expected}"
        yield fault, "a part was cut off or removed: run it again"


def _statistics(run: Run) -> Faults:
    """An older version of this package counted less; what it did not count is not 0."""
    needed = {field.name for field in fields(Statistics)}
    if missing := sorted({name for stats in run.requests or () for name in needed - stats.keys()}):
        fault = f"the statistics of its responses lack {', '.join(missing)}, so an older version made them"
        yield fault, "run it again"
        return
    for name in ("generated_tokens", "peak_live_tokens", "illegal_tokens") if run.requests else ():
        told = {s["doc_id"]: (s.get(name), fmean(each[name] for each in s["requests"])) for s in run.samples}
        if wrong := [key for key, (mean, real) in told.items() if mean is not None and not math.isclose(mean, real)]:
            fault = f"{name} of {_documents(wrong)} is not the mean over its responses"
            yield fault, "the file was changed after the run: take the original, or run again"


def _settings(run: Run) -> Faults:
    """Responses of another run, as from a cache, have statistics that these settings and totals do not allow."""
    if run.totals is None or not run.requests:
        return
    given = run.model_args.get("max_context")
    if given is not None and str(given) != str(run.max_context):
        yield f"its model arguments say max_context={given}, its totals {run.max_context}", "run it again"
    most: dict[str, Any] = {name: run.totals[name] for name in COUNTED if name in run.totals}
    if run.policy == "off":
        most |= {"pruned_tokens": 0, "prune_events": 0}
    if run.budget is not None:
        most["generated_tokens"] = min(run.budget.high, most.get("generated_tokens", run.budget.high))
    for name, allowed in most.items():
        found = max(stats[name] for stats in run.requests)
        if found > allowed:
            fault = f"a response has {name}={found}, and the results file (pruning={run.policy}) allows only {allowed}"
            yield fault, "the responses are another run's, as from a cache: run it again"


def _hashes(run: Run) -> Faults:
    """lm-eval hashed each document and target when it made them (`lm_eval.evaluator`, 0.4)."""
    for part in ("doc", "target"):
        key, text = f"{part}_hash", _as_json if part == "doc" else str
        if wrong := [s["doc_id"] for s in run.samples if key in s and s[key] != _hash(text(s[part]))]:
            fault = f"{key} of {_documents(wrong)} is not that of the {part} beside it"
            yield fault, "the file was changed after the run: take the original, or run again"


def _as_json(doc: Any) -> str:
    return json.dumps(doc, indent=2, ensure_ascii=False)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _targets(run: Run) -> Faults:
    found = COLUMN.match(str(run.task_config.get("doc_to_target", "")))
    if found is None:  # a template or a function
        return
    column = found[1]
    wrong = [s["doc_id"] for s in run.samples if column in s["doc"] and not _is_target(s["doc"][column], s["target"])]
    if wrong:
        fault = f"the target of {_documents(wrong)} is not the {column} of the document"
        yield fault, "the labels were swapped or changed: run it again"


def _is_target(answer: Any, target: str) -> bool:
    """Whether a target is the answer, perhaps read as a Python literal, as lm-eval does with templates."""
    if str(answer) == target:
        return True
    try:
        return str(ast.literal_eval(str(answer))) == target
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _scores(run: Run) -> Faults:
    if outside := [doc_id for doc_id, score in run.scores.items() if not 0 <= score <= 1]:
        fault = f"{run.metric} of {_documents(outside)} lies outside 0..1, as in {run.scores[outside[0]]:g}"
        yield fault, "name another metric with --metric"
    metrics = run.task_config.get("metric_list") or []
    is_mean = any(entry["metric"] == run.metric and entry.get("aggregation") == "mean" for entry in metrics)
    recorded = run.results["results"].get(run.task, {}).get(f"{run.metric},{run.samples[0]['filter']}")
    mean = fmean(run.scores.values())
    if is_mean and isinstance(recorded, (int, float)) and not math.isclose(mean, recorded, abs_tol=1e-6):
        fault = f"the mean of {run.metric} over the samples is {mean:.4f}, its results file says {recorded:.4f}"
        yield fault, "the two files are not of one evaluation, or one was changed: run it again"


def _name(run: Run) -> Faults:
    if run.totals is None:
        return
    for word in re.split(r"[\s,()=]+", run.name.lower()):  # a part of a word, as in tiny-evict, claims nothing
        if run.policy not in POLICY_WORDS.get(re.sub(r"-\d+$", "", word), {run.policy}):
            yield f"its results file says policy {run.policy}", SWAPPED
    windows = {int(number) for number in NAMED_WINDOW.findall(run.name)}
    if windows and run.max_context not in windows:
        yield f"its results file says max_context={run.max_context}", SWAPPED


def check_settings(run: Run, expected: Mapping[str, Any]) -> None:
    """Refuses a run that was made with other model arguments than it should have been.

    Args:
        run: as read.
        expected: model arguments, such as ``{"pruning": "off", "max_context": 1024}``.

    Raises:
        Incomparable: one of them has another value in the results file, or does not stand there.
    """
    acted = {"pruning": run.policy, "max_context": run.max_context} if run.totals else {}
    for name, value in expected.items():
        for found in (run.model_args.get(name), acted.get(name, value)):
            if str(found) != str(value):
                fault = f"its results file says {name}={found} instead of {value}"
                raise Incomparable(f"{run.name!r} ({run.task}): {fault}; {SWAPPED} ({run.path})")


def _documents(ids: Iterable[int]) -> str:
    """Returns ``document 3`` or ``12 documents (0, 1, 2, 3, 4, ...)``."""
    every = sorted(ids)
    if len(every) == 1:
        return f"document {every[0]}"
    return f"{len(every)} documents ({', '.join(map(str, every[:5]))}{', ...' if len(every) > 5 else ''})"


# --- one name ---------------------------------------------------------------------------------------------------------


def check_seeds(runs: Sequence[Run]) -> None:
    """Refuses to pool runs of one name as seeds of one setting, if they are of several, or one seed counts twice.

    Raises:
        ResultsError: as said.
    """
    settings = {repr((label(run), run.checkpoint, _without_seed(run))): run for run in runs}
    if len(settings) > 1:
        fault = "; ".join(f"{label(run)} ({run.path})" for run in settings.values())
        raise ResultsError(
            f"runs of the name {runs[0].name!r} differ in more than their seed: {fault}; name them apart"
        )
    for seed, count in Counter(run.seed for run in runs).items():
        if count > 1 and seed is not None:
            paths = ", ".join(str(run.path) for run in runs if run.seed == seed)
            raise ResultsError(f"{count} runs of {runs[0].name!r} have seed {seed} ({paths}); read one of them")


def _without_seed(run: Run) -> list[tuple[str, str]]:
    given = run.model_args.items()
    return sorted((name, str(value)) for name, value in given if name not in ("seed", "notes", "journal"))


def check_copies(one: Run, other: Run) -> None:
    """Refuses to take a run for an older one of the same name, if it is of another checkpoint or other sampling.

    Raises:
        ResultsError: as said.
    """
    kwargs = (one.generation_kwargs, other.generation_kwargs)
    for what, ours, theirs in (("checkpoints", one.checkpoint, other.checkpoint), ("generation kwargs", *kwargs)):
        if ours != theirs:
            fault = f"{one.path.name} and {other.path.name} of {one.path.parent} are both {one.name!r} ({one.task})"
            raise ResultsError(f"{fault}, but their {what} differ: {ours} and {theirs}; give each a folder")


# --- two runs ---------------------------------------------------------------------------------------------------------


def _same_run(one: Run, other: Run) -> Faults:
    """Neither a run nor a name may be there twice, but for other seeds, which a table pools."""
    paths = f"({one.path}, {other.path})"
    if _evaluation(one) == _evaluation(other):
        yield f"they are the same run {paths}", "name each folder once"
    if (one.name, one.task, one.seed) == (other.name, other.task, other.seed):
        yield f"both have this name {paths}", "give the folders names: NAME=DIR"


def _evaluation(run: Run) -> Any:
    """What two copies of one run have in common: the clock's readings, to the microsecond."""
    return run.results.get("date"), run.results.get("total_evaluation_time_seconds"), run.task


def _swapped_name(one: Run, other: Run) -> Faults:
    """A run that is called like the checkpoint of another one carries a swapped label."""
    head = one.name.split(",")[0]
    if head == other.model != one.model:
        fault = f"{one.name!r} was made with {one.model}, and {head} is the checkpoint of {other.name!r}"
        yield fault, "the labels were swapped, or the name needs changing"


def _differences(one: Run, other: Run, allow_versions: bool) -> Faults:
    """What has to be the same in all runs of a task."""
    ours, theirs = _same(one), _same(other)
    for what, value in ours.items():
        yield from _differ(what, value, theirs[what], ADVICE.get(what, SAME_COMMAND))
    yield from _other_task_config(one, other, allow_versions)
    yield from _other_documents(one, other)
    for name in one.versions.keys() & other.versions.keys() if not allow_versions else ():
        yield from _differ(f"versions of {name}", one.versions[name], other.versions[name], OTHER_VERSION)


def _same(run: Run) -> dict[str, Any]:
    shots = run.results.get("n-shot", {}).get(run.task)
    return {
        "versions of the task": run.results["versions"].get(run.task),
        "metrics": run.metric,
        "filters": run.samples[0]["filter"],
        "numbers of few-shot examples": shots,
        "seeds of the choice of few-shot examples": run.config.get("fewshot_seed") if shots else None,
        "forms of few-shot examples": run.results.get("fewshot_as_multiturn"),
        "system instructions": run.results.get("system_instruction"),
        "numbers of responses to a problem": run.task_config.get("repeats", 1),
    }


def _differ(what: str, ours: Any, theirs: Any, advice: str = SAME_COMMAND) -> Faults:
    if ours != theirs:
        yield f"the {what} differ: {_short(ours)} and {_short(theirs)}", advice


def _short(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 60 else reprlib.repr(value)


def _other_task_config(one: Run, other: Run, allow_versions: bool) -> Faults:
    """Compares every setting of the task; code apart, for it changes with versions."""
    ours, theirs = _comparable_config(one), _comparable_config(other)
    for key in sorted(ours.keys() | theirs.keys()):
        mine, yours = ours.get(key), theirs.get(key)
        yield from _differ(f"settings {key!r} of the task", _without_code(mine), _without_code(yours))
        if not allow_versions and mine != yours:
            yield f"the code of the task's {key!r} differs", OTHER_VERSION


def _comparable_config(run: Run) -> dict[str, Any]:
    """The task's configuration without what is compared elsewhere, stems from the model, or names a file."""
    kwargs = {key: value for key, value in run.generation_kwargs.items() if key not in LIMITS}
    foreign = {*run.model_args, "version", "config_source"}  # lm-eval adds the model's arguments
    given = run.task_config.get("metadata") or {}
    metadata = {key: value for key, value in given.items() if key not in foreign}
    return {**run.task_config, "generation_kwargs": kwargs, "metadata": metadata}


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_code(part) for part in value]
    return "code" if isinstance(value, str) and CODE.match(value) else value


def _other_documents(one: Run, other: Run) -> Faults:
    ours, theirs = one.by_doc, other.by_doc
    for run, more, lacking, fewer in ((other, ours, theirs, one), (one, theirs, ours, other)):
        if missing := more.keys() - lacking.keys():
            limits = f"--limit {fewer.config.get('limit')} and {run.config.get('limit')}"
            fault = f"{_documents(missing)} of {fewer.name!r} missing in {run.name!r} ({limits})"
            yield fault, "run both on the same documents"
    for part, advice in (("doc", "the data are others, or in another order"), ("target", "the labels were changed")):
        if wrong := [doc_id for doc_id in ours if ours[doc_id][part] != theirs[doc_id][part]]:
            example = " and ".join(_short(samples[wrong[0]][part]) for samples in (ours, theirs))
            fault = f"{_documents(wrong)} with another {part}, as in {example}"
            yield fault, f"{advice}: run both on the same data"


def _other_budget(one: Run, other: Run) -> Faults:
    if not str(one.task_config.get("output_type", "")).startswith("generate"):
        return  # log-likelihoods are compared, and there is no budget
    ours, theirs = one.budget, other.budget
    if ours != theirs and not (ours and theirs and ours.agrees_with(theirs)):
        fault = f"the budgets of generated tokens differ: {ours or 'not recorded'} and {theirs or 'not recorded'}"
        yield fault, "give both the same limit, as in --gen_kwargs max_gen_toks=32768"


def _other_prompts(one: Run, other: Run) -> Faults:
    """Prompts have to be the same text, save where lm-eval logs them within the template of another checkpoint."""
    ours, theirs = (run.results.get("chat_template_sha") for run in (one, other))
    if one.checkpoint == other.checkpoint:
        advice = "give --apply_chat_template to both or to neither"
        yield from _differ("uses of a chat template", one.is_templated, other.is_templated, advice)
        if ours and theirs:
            yield from _differ("chat templates", ours, theirs)
        mine, yours = (run.config.get("model_sha") for run in (one, other))  # on the hub, if lm-eval tells
        if mine and yours:
            yield from _differ(f"commits of {one.checkpoint}", mine, yours, "name one with revision=")
    elif ours or theirs:
        return
    before, after = one.by_doc, other.by_doc
    hashes = {doc_id: sample.get("prompt_hash") for doc_id, sample in after.items()}
    wrong = [doc_id for doc_id, sample in before.items() if sample.get("prompt_hash") != hashes.get(doc_id)]
    if wrong and not _differ_in_time_alone(one, other):
        yield f"the prompts of {_documents(wrong)} differ", SAME_COMMAND


def _differ_in_time_alone(one: Run, other: Run) -> bool:
    """Whether the prompts differ in one and the same piece each, and the chat template did read two times."""
    if None in (one.clock, other.clock) or one.clock == other.clock:
        return False
    ours, theirs = (
        {doc_id: str(sample["arguments"]["gen_args_0"]["arg_0"]) for doc_id, sample in run.by_doc.items()}
        for run in (one, other)
    )
    return len({_changed(ours[doc_id], theirs[doc_id]) for doc_id in ours}) == 1


def _changed(old: str, new: str) -> tuple[str, str]:
    """What stands between the beginning and the end that two texts have in common."""
    start = len(commonprefix([old, new]))  # noqa: RUF071 - of characters
    end = len(commonprefix([old[start:][::-1], new[start:][::-1]]))  # noqa: RUF071
    return old[start : len(old) - end], new[start : len(new) - end]


# --- what a reader should know ----------------------------------------------------------------------------------------


def remarks(runs: Sequence[Run]) -> list[str]:
    """Returns what a reader of the tables should know and does not see in them, a sentence each.

    That is: prompts that no run could read, and what differs between runs and is not plain from their names.
    """
    found = [text for run in runs for text in _room_remarks(run)]
    if len({run.is_templated for run in runs}) > 1:
        without = ", ".join(dict.fromkeys(run.name for run in runs if not run.is_templated))
        found.append(f"no chat template was applied to the prompts of {without}; it was to the others")
    for name in ("lm-eval", "transformers", "torch"):
        values = {run.versions.get(name, "unknown") for run in runs}
        if len(values) > 1:
            found.append(f"the runs were made with different versions of {name}: {', '.join(sorted(values))}")
    times = dict.fromkeys(run.clock for run in runs if run.clock)
    if len(times) > 1:
        found.append(f"the chat template told the models different times: {', '.join(times)}")
    for what in ("device", "batch_size"):
        values = {str(run.config.get(what)) for run in runs}
        if len(values) > 1:
            found.append(f"{what} differs ({', '.join(sorted(values))}), so speeds are not comparable")
    for checkpoint in dict.fromkeys(run.checkpoint for run in runs):
        args = [run.model_args for run in runs if run.checkpoint == checkpoint]
        for name in sorted(set().union(*args) - ANY_DIFFERENCE):
            values = {str(given.get(name, "its default")) for given in args}
            if len(values) > 1:
                found.append(f"runs of {checkpoint} differ in {name}: {', '.join(sorted(values))}")
    return found


def _room_remarks(run: Run) -> Iterator[str]:
    """A prompt that fills the window ends its response before the first token (`hcot_lmeval.lm.model`)."""
    full = [s for s in run.requests or () if s["finish_reason"] == "context" and not s["generated_tokens"]]
    if full:
        count, longest = len(run.requests or ()), max(stats["prompt_tokens"] for stats in full)
        yield (
            f"{len(full)} of {count} prompts of {run.name!r} ({run.task}) left no room in its window, so that their "
            f"responses are empty; the longest has {longest} tokens: choose a window well above that"
        )
