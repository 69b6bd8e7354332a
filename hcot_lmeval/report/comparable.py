"""Whether runs may stand in one table. What differs on purpose may differ; anything else is refused, with the reason.

May differ: the model, the policy and its ablation, the controls, the context window, the seed. Between *different*
checkpoints the chat template may differ too, since it belongs to the model as its tokenizer does; `remarks` says so.
Must agree within a task: its version and configuration, the documents and their targets, the metric and filter, the
number of responses, few-shot examples, system instruction, sampling, the budget of generated tokens
(`recorded.Budget`), and the versions of lm-eval, transformers and torch.

This module imports the standard library alone.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hcot_lmeval.report import recorded
from hcot_lmeval.report.integrity import Incomparable, check_integrity, documents
from hcot_lmeval.report.results import Run

ANY_DIFFERENCE = frozenset(
    """ablation any_policy batch_size closing_tokens constraints delta device force_answer journal loop_tokens
    max_batch_size max_block_tokens max_context max_depth max_gen_toks max_length max_model_len max_solution_tokens
    model notes peft pretrained pruning revision seed""".split()
)
"""Model arguments that need no remark: they differ on purpose, are compared elsewhere, or do not change results."""

CODE = re.compile(r"^\s*(def |class |@|lambda|<function|<class|functools\.partial)")
"""Beginnings of a function as lm-eval writes it into the configuration of a task."""


class Setting(NamedTuple):
    """Something that has to be the same in all runs of a task."""

    what: str
    of: Callable[[Run], Any]
    advice: str


SAME_COMMAND = "run one of them again with the arguments of the other"
SETTINGS = (
    Setting("versions of the task", lambda run: run.results["versions"].get(run.task), "run the older one again"),
    Setting("metrics", lambda run: run.metric, "name one with --metric"),
    Setting("filters", lambda run: run.samples[0]["filter"], "name one with --filter"),
    Setting("numbers of few-shot examples", lambda run: run.results.get("n-shot", {}).get(run.task), SAME_COMMAND),
    Setting("seeds of the choice of few-shot examples", lambda run: _few_shot(run, "fewshot_seed"), SAME_COMMAND),
    Setting("forms of few-shot examples", lambda run: run.results.get("fewshot_as_multiturn"), SAME_COMMAND),
    Setting("system instructions", lambda run: run.results.get("system_instruction"), SAME_COMMAND),
    Setting("numbers of responses to a problem", lambda run: recorded.task_config(run).get("repeats", 1), SAME_COMMAND),
)


def _few_shot(run: Run, key: str) -> Any:
    """A setting of the choice of examples, which matters only where there are any."""
    return run.config.get(key) if run.results.get("n-shot", {}).get(run.task) else None


def check_comparable(runs: Sequence[Run], *, allow_versions: bool = False) -> None:
    """Refuses runs that must not be compared.

    Args:
        runs: of any tasks; those of one task are held against each other.
        allow_versions: let the versions of lm-eval, transformers and torch differ, and the code of a task's functions.

    Raises:
        Incomparable: naming the runs, what differs, and what to do.
    """
    _check_distinct(runs)
    for run in runs:
        check_integrity(run)
    _check_model_names(runs)
    for alike in _by_task(runs):
        for run in alike[1:]:
            _check_pair(alike[0], run, allow_versions)
        for one, other in itertools.combinations(alike, 2):
            _check_budgets(one, other)
            _check_prompts(one, other)


def _by_task(runs: Sequence[Run]) -> Iterator[list[Run]]:
    for task in dict.fromkeys(run.task for run in runs):
        yield [run for run in runs if run.task == task]


# --- which runs -------------------------------------------------------------------------------------------------------


def _check_distinct(runs: Sequence[Run]) -> None:
    """Neither a run nor a name may be there twice, but for other seeds."""
    for same in (_evaluation, _place):
        seen: dict[Any, Run] = {}
        for run in runs:
            known = seen.setdefault(same(run), run)
            if known is not run:
                raise _twice(known, run)


def _evaluation(run: Run) -> Any:
    """What two copies of one run have in common: the clock's readings, to the microsecond."""
    return run.results.get("date"), run.results.get("total_evaluation_time_seconds"), run.task


def _place(run: Run) -> Any:
    """What makes a run one of a table's entries; runs of several seeds are pooled there."""
    return run.name, run.task, run.seed


def _twice(one: Run, other: Run) -> Incomparable:
    if _evaluation(one) == _evaluation(other):
        return _refusal(one, other, f"they are the same run ({one.path}, {other.path})", "name each folder once")
    told = f"both have this name ({one.path}, {other.path})"
    return _refusal(one, other, told, "give the folders names: NAME=DIR")


def _check_model_names(runs: Sequence[Run]) -> None:
    """A run that is called like the checkpoint of another one carries a swapped label."""
    for run in runs:
        head = run.name.split(",")[0]
        for other in runs:
            if head == other.model != run.model:
                told = f"{run.name!r} was made with {run.model}, and {head} is the checkpoint of {other.name!r}"
                raise _refusal(run, other, told, "the labels were swapped, or the name needs changing")


# --- what has to agree ------------------------------------------------------------------------------------------------


def _check_pair(one: Run, other: Run, allow_versions: bool) -> None:
    for what, of, advice in SETTINGS:
        _require(one, other, what, of(one), of(other), advice)
    _check_task_config(one, other, allow_versions)
    _check_documents(one, other)
    if not allow_versions:
        ours, theirs = recorded.versions(one), recorded.versions(other)
        for name in ours.keys() & theirs.keys():
            advice = "run the older one again, or allow it with --allow-versions"
            _require(one, other, f"versions of {name}", ours[name], theirs[name], advice)


def _require(one: Run, other: Run, what: str, ours: Any, theirs: Any, advice: str) -> None:
    if ours != theirs:
        raise _refusal(one, other, f"the {what} differ: {_short(ours)} and {_short(theirs)}", advice)


def _short(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 60 else reprlib.repr(value)


def _check_task_config(one: Run, other: Run, allow_versions: bool) -> None:
    """Compares every setting of the task; code apart, for it changes with versions."""
    ours, theirs = _comparable_config(one), _comparable_config(other)
    for key in sorted(ours.keys() | theirs.keys()):
        mine, yours = ours.get(key), theirs.get(key)
        what = f"settings {key!r} of the task"
        _require(one, other, what, _without_code(mine), _without_code(yours), SAME_COMMAND)
        if not allow_versions and mine != yours:
            advice = "run the older one again, or allow it with --allow-versions"
            raise _refusal(one, other, f"the code of the task's {key!r} differs", advice)


def _comparable_config(run: Run) -> dict[str, Any]:
    """The task's configuration without what is compared elsewhere, stems from the model, or names a file."""
    config = dict(recorded.task_config(run))
    kwargs = {key: value for key, value in recorded.generation_kwargs(run).items() if key not in recorded.LIMITS}
    foreign = {*recorded.model_args(run), "version", "config_source"}  # lm-eval adds the model's arguments
    metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key not in foreign}
    return config | {"generation_kwargs": kwargs, "metadata": metadata}


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_code(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_code(part) for part in value]
    return "code" if isinstance(value, str) and CODE.match(value) else value


def _check_documents(one: Run, other: Run) -> None:
    ours, theirs = _documents_of(one), _documents_of(other)
    for run, more, lacking, fewer in ((other, ours, theirs, one), (one, theirs, ours, other)):
        if missing := more.keys() - lacking.keys():
            limits = f"--limit {fewer.config.get('limit')} and {run.config.get('limit')}"
            told = f"{documents(missing)} of {fewer.name!r} missing in {run.name!r} ({limits})"
            raise _refusal(one, other, told, "run both on the same documents")
    for part, advice in (("doc", "the data are others, or in another order"), ("target", "the labels were changed")):
        wrong = [doc_id for doc_id in ours if ours[doc_id][part] != theirs[doc_id][part]]
        if wrong:
            told = f"{documents(wrong)} with another {part}, as in {_differing(ours, theirs, wrong[0], part)}"
            raise _refusal(one, other, told, f"{advice}: run both on the same data")


def _documents_of(run: Run) -> dict[int, dict[str, Any]]:
    return {sample["doc_id"]: sample for sample in run.samples}


def _differing(ours: Any, theirs: Any, doc_id: int, part: str) -> str:
    return f"{_short(ours[doc_id][part])} and {_short(theirs[doc_id][part])}"


def _check_budgets(one: Run, other: Run) -> None:
    if not recorded.generates(one):
        return
    ours, theirs = recorded.budget(one), recorded.budget(other)
    if ours == theirs or (ours and theirs and ours.agrees_with(theirs)):
        return
    told = f"the budgets of generated tokens differ: {ours or 'not recorded'} and {theirs or 'not recorded'}"
    raise _refusal(one, other, told, "give both the same limit, as in --gen_kwargs max_gen_toks=32768")


# --- prompts ----------------------------------------------------------------------------------------------------------


def _check_prompts(one: Run, other: Run) -> None:
    """Prompts have to be the same text, save where lm-eval logs them within the template of another checkpoint."""
    rendered = one.results.get("chat_template_sha") or other.results.get("chat_template_sha")
    if recorded.checkpoint(one) == recorded.checkpoint(other):
        _check_same_checkpoint(one, other)
    elif rendered:
        return
    ours, theirs = _prompts(one), _prompts(other)
    wrong = [doc_id for doc_id in ours if ours[doc_id] != theirs.get(doc_id)]
    if wrong and not _differ_in_time_alone(one, other):
        raise _refusal(one, other, f"the prompts of {documents(wrong)} differ", SAME_COMMAND)


def _check_same_checkpoint(one: Run, other: Run) -> None:
    advice = "give --apply_chat_template to both or to neither"
    _require(one, other, "uses of a chat template", recorded.is_templated(one), recorded.is_templated(other), advice)
    ours, theirs = (run.results.get("chat_template_sha") for run in (one, other))
    if ours and theirs:
        _require(one, other, "chat templates", ours, theirs, SAME_COMMAND)
    ours, theirs = recorded.commit(one), recorded.commit(other)
    if ours and theirs:
        _require(one, other, f"commits of {recorded.checkpoint(one)}", ours, theirs, "name one with revision=")


def _differ_in_time_alone(one: Run, other: Run) -> bool:
    """Whether the prompts differ in one and the same piece each, and the chat template did read two times."""
    times = {recorded.clock(one), recorded.clock(other)}
    if None in times or len(times) == 1:
        return False
    ours, theirs = _documents_of(one), _documents_of(other)
    return len({_changed(_text(ours[doc_id]), _text(theirs[doc_id])) for doc_id in ours}) == 1


def _text(sample: Mapping[str, Any]) -> str:
    return str(sample["arguments"]["gen_args_0"]["arg_0"])


def _changed(old: str, new: str) -> tuple[str, str]:
    """What stands between the beginning and the end that two texts have in common."""
    start = _common(old, new)
    end = _common(old[start:][::-1], new[start:][::-1])
    return old[start : len(old) - end], new[start : len(new) - end]


def _common(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _prompts(run: Run) -> dict[int, str | None]:
    return {sample["doc_id"]: sample.get("prompt_hash") for sample in run.samples}


# --- what a reader should know ----------------------------------------------------------------------------------------


def remarks(runs: Sequence[Run]) -> list[str]:
    """Returns what a reader of the tables should know and does not see in them, a sentence each.

    That is: prompts that no run could read, and what differs between runs and is not plain from their names.
    """
    found = [text for run in runs for text in _room_remarks(run)]
    if len({recorded.is_templated(run) for run in runs}) > 1:
        without = ", ".join(dict.fromkeys(run.name for run in runs if not recorded.is_templated(run)))
        found.append(f"no chat template was applied to the prompts of {without}; it was to the others")
    for name in ("lm-eval", "transformers", "torch"):
        values = {recorded.versions(run).get(name, "unknown") for run in runs}
        if len(values) > 1:
            found.append(f"the runs were made with different versions of {name}: {', '.join(sorted(values))}")
    times = dict.fromkeys(time for time in map(recorded.clock, runs) if time)
    if len(times) > 1:
        found.append(f"the chat template told the models different times: {', '.join(times)}")
    for what in ("device", "batch_size"):
        values = {str(run.config.get(what)) for run in runs}
        if len(values) > 1:
            found.append(f"{what} differs ({', '.join(sorted(values))}), so speeds are not comparable")
    return found + [text for alike in _by_checkpoint(runs) for text in _argument_remarks(alike)]


def _room_remarks(run: Run) -> Iterator[str]:
    """A prompt that fills the window ends its response before the first token (`hcot_lmeval.lm.model`)."""
    full = [s for s in run.requests or () if s["finish_reason"] == "context" and not s["generated_tokens"]]
    if full:
        count, longest = len(run.requests or ()), max(stats["prompt_tokens"] for stats in full)
        yield (
            f"{len(full)} of {count} prompts of {run.name!r} ({run.task}) left no room in its window, so that their "
            f"responses are empty; the longest has {longest} tokens: choose a window well above that"
        )


def _by_checkpoint(runs: Sequence[Run]) -> Iterator[list[Run]]:
    for checkpoint in dict.fromkeys(map(recorded.checkpoint, runs)):
        yield [run for run in runs if recorded.checkpoint(run) == checkpoint]


def _argument_remarks(runs: Sequence[Run]) -> Iterator[str]:
    """Differences between runs of one checkpoint, such as dtype."""
    args = [recorded.model_args(run) for run in runs]
    for name in sorted({name for given in args for name in given} - ANY_DIFFERENCE):
        values = {str(given.get(name, "its default")) for given in args}
        if len(values) > 1:
            yield f"runs of {recorded.checkpoint(runs[0])} differ in {name}: {', '.join(sorted(values))}"


def _refusal(one: Run, other: Run, told: str, advice: str) -> Incomparable:
    return Incomparable(f"{one.name!r} and {other.name!r} ({one.task}) cannot be compared: {told}; {advice}")
