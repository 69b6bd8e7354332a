"""Writes output folders as ``lm_eval --log_samples --output_path`` leaves them, with contents known to the test.

    build_run(tmp_path / "a", [1, 0, 1], policy="off", max_context=128)             # --model hcot
    build_run(tmp_path / "b", [1, 1, 0], kind="hf")                                 # scores alone
    build_run(tmp_path / "c", [1, 0], columns={"level": ["low", "top"]}, metric="avg@4",
              statistics=lambda i: [{"generated_tokens": 10 * i}] * 4)              # four responses to each problem

Hashes, means and totals follow from the contents as in real files; `change` makes them lie.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

STATISTICS: dict[str, Any] = {
    "prompt_tokens": 20,
    "generated_tokens": 100,
    "pruned_tokens": 60,
    "reforwarded_tokens": 8,
    "live_tokens": 60,
    "peak_live_tokens": 70,
    "live_token_steps": 4500,
    "prune_events": 4,
    "blocks": 4,
    "max_depth": 2,
    "malformed": {},
    "illegal_tokens": 0,
    "forced": {},
    "loops": 0,
    "finish_reason": "eos",
    "wall_seconds": 2.0,
    "tokens_per_second": 50.0,
}
"""Of one response; the keys of `hcot_lmeval.events.Statistics`."""

OFF = {"pruned_tokens": 0, "reforwarded_tokens": 0, "prune_events": 0, "live_tokens": 120, "peak_live_tokens": 120}
"""What is different in them without pruning."""

_clock = itertools.count(1)


def build_run(
    directory: Path,
    scores: Sequence[float] | Mapping[int, float],
    *,
    task: str = "toy",
    model: str = "org/model",
    kind: str = "hcot",
    policy: str = "recompute",
    max_context: int = 1024,
    metric: str = "acc",
    filter_name: str = "none",
    columns: Mapping[str, Sequence[Any]] | None = None,
    statistics: Callable[[int], Mapping[str, Any] | list[Mapping[str, Any]]] = lambda doc_id: {},
    version: float = 1.0,
    totals: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    generation_kwargs: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, Any], list[dict[str, Any]]], Any] | None = None,
) -> Path:
    """Writes one evaluation of one task, later than all before, and returns the path of its results file.

    Args:
        directory: the ``--output_path``.
        scores: of the documents 0, 1, ..., or of those with the ids given.
        task: its name; `metric`, `filter_name` and `version` are of the task too.
        model: the checkpoint.
        kind: what ``--model`` said; all but ``hcot`` have no `policy` and `max_context`, and leave scores alone.
        columns: of the documents, beside ``problem`` and ``answer``; a value for each score.
        statistics: doc_id -> what differs from `STATISTICS` in its response, or a list with an entry for each response.
        totals: what differs in ``config.hcot``, `model_args` in ``config.model_args``, `generation_kwargs` in the
            task's.
        change: called with the results and the samples before they are written; may return other samples.
    """
    pairs = dict(scores if isinstance(scores, Mapping) else enumerate(scores))
    rows = [{name: values[i] for name, values in (columns or {}).items()} for i in range(len(pairs))]
    kwargs = {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 4096} | dict(generation_kwargs or {})
    found = zip(pairs.items(), rows, strict=True)
    samples = [_sample(doc_id, score, metric, filter_name, row, kwargs) for (doc_id, score), row in found]
    ours = {"pruning": policy, "max_context": max_context} if kind == "hcot" else {}
    for sample in samples if ours else ():
        sample["requests"] = _responses(statistics(sample["doc_id"]), policy)
        sample["metrics"].append("requests")
    arguments = {"pretrained": model, **ours, **(model_args or {})}
    results = _results(task, version, arguments, kwargs, samples)
    results["config"] = {"model": kind, "model_args": arguments, **results["config"]}
    results |= {"model_source": kind, "model_name": model}
    if ours:
        results["config"]["hcot"] = _totals(samples, policy, max_context) | dict(totals or {})
    samples = (change(results, samples) if change else None) or samples
    folder, stamp = directory / model.replace("/", "__"), f"2026-01-01T00-00-00.{next(_clock):06d}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / f"samples_{task}_{stamp}.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / f"results_{stamp}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def _sample(
    doc_id: int, score: float, metric: str, filter_name: str, columns: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    doc = {"problem": f"{doc_id}+{doc_id}?", "answer": str(2 * doc_id), **columns}
    return {
        "doc_id": doc_id,
        "doc": doc,
        "target": doc["answer"],
        "arguments": {"gen_args_0": {"arg_0": doc["problem"], "arg_1": kwargs}},
        "resps": [[f"\\boxed{{{doc_id}}}"]],
        "filtered_resps": [f"\\boxed{{{doc_id}}}"],
        "filter": filter_name,
        "metrics": [metric, "completed"],
        "doc_hash": hash_of(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": hash_of(doc["problem"]),
        "target_hash": hash_of(doc["answer"]),
        metric: score,
        "completed": 1.0,
    }


def hash_of(text: str) -> str:
    """As lm-eval hashes documents, prompts and targets."""
    return hashlib.sha256(text.encode()).hexdigest()


def _responses(given: Mapping[str, Any] | list[Mapping[str, Any]], policy: str) -> list[dict[str, Any]]:
    base = STATISTICS | (OFF if policy == "off" else {})
    return [base | dict(one) for one in (given if isinstance(given, list) else [given])]


def _totals(samples: Sequence[Mapping[str, Any]], policy: str, max_context: int) -> dict[str, Any]:
    """As `hcot_lmeval.lm.reporting.RunStatistics.as_dict`, as far as a comparison looks at it."""
    every = [stats for sample in samples for stats in sample["requests"]]
    summed = "prompt_tokens generated_tokens pruned_tokens reforwarded_tokens live_token_steps prune_events blocks"
    sums = {name: sum(stats[name] for stats in every) for name in summed.split()}
    settings = {"pruning": policy, "markup": "hcot", "seed": 0, "chat_template": False, "max_context": max_context}
    return {
        **settings,
        "max_gen_toks": max_context if policy == "off" else max(max_context, 32768),
        "requests": len(every),
        "resumed_requests": 0,
        **sums,
        **{name: max(stats[name] for stats in every) for name in ("peak_live_tokens", "max_depth")},
        "wall_seconds": 10.0,
        "tokens_per_second": sums["generated_tokens"] / 10.0 or None,
    }


def _results(
    task: str,
    version: float,
    arguments: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The results file without its ``config`` section's model."""
    metric, filter_name = samples[0]["metrics"][0], samples[0]["filter"]
    mean = fmean(sample[metric] for sample in samples)
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in (metric, "completed")]
    config = {
        "task": task,
        "test_split": "test",
        "doc_to_text": "{{problem}}",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": metrics,
        "output_type": "generate_until",
        "generation_kwargs": dict(kwargs),
        "repeats": len(samples[0].get("requests", [1])),
        "metadata": {"version": version, **arguments},  # lm-eval mixes the model's arguments into it
    }
    hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return {
        "results": {task: {"name": task, "alias": task, f"{metric},{filter_name}": mean}},
        "configs": {task: config},
        "versions": {task: version},
        "n-shot": {task: 0},
        "n-samples": {task: {"original": len(samples), "effective": len(samples)}},
        "config": {"batch_size": "32", "device": "cpu", "limit": None, "gen_kwargs": {}, "fewshot_seed": 1234},
        "date": 1.8e9 + next(_clock),
        "pretty_env_info": "PyTorch version: 2.13.0+cpu\nIs debug build: False\n",
        "transformers_version": "5.23.0",
        "lm_eval_version": "0.4.13",
        "task_hashes": {task: hash_of(hashes)},
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": "12.5",
    }
