"""What lm-eval left on disk, as `Run` objects: one task of one evaluation, of any model.

``lm_eval --log_samples --output_path DIR`` writes, for each evaluation, ``results_TIME.json`` and one
``samples_TASK_TIME.jsonl`` per task, with one time stamp. `read_runs` pairs them by that stamp. A run of
``--model hcot`` carries statistics of generation, one of another model (``hf``, ``vllm``, an API) carries scores alone:
what such a run does not tell is None, never zero.

This module imports the standard library alone, and what needs no more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hcot_lmeval.control import ControlOptions

STAMP = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}\.\d+)$")
"""Time stamp at the end of the name of a results or samples file (lm-eval 0.4)."""
PREFERRED = ("acc", "avg@", "exact_match")
"""Beginnings of the names of metrics that can be the accuracy of a run, the preferred first."""
GROUPINGS = ("level", "depth", "variables")
"""Columns of our tasks' documents by which problems are grouped, easiest first."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Generation kwargs that limit the generated tokens of a request; of several lm-eval takes the first of this order."""
TORCH_VERSION = re.compile(r"^PyTorch version: (\S+)$", re.MULTILINE)
"""Its line in what ``torch.utils.collect_env`` prints."""
UNBOUND = 2**63
"""No limit."""


class ResultsError(ValueError):
    """A folder does not hold what a comparison needs."""


class Checkpoint(NamedTuple):
    """What tells the weights of one run from those of another, as far as their names do."""

    name: str
    revision: str
    peft: str
    delta: str

    def __str__(self) -> str:
        return ", ".join(part for part in self if part not in ("", "main"))


class Budget(NamedTuple):
    """The limit on the generated tokens of a request, pruned ones included.

    Without pruning nothing can be generated beyond the context window, so that every limit from the window up does
    the same. Two runs have the same budget if some one limit would have left both as they are: `low` <= it <= `high`.
    """

    low: int
    high: int

    def agrees_with(self, other: Budget) -> bool:
        return max(self.low, other.low) <= min(self.high, other.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low} or more"


@dataclass(frozen=True)
class Run:
    """One task of one evaluation.

    Attributes:
        name: what the reader of a table calls it.
        task: the task's name.
        samples: the lines of the samples file, of one filter, in the order of their doc_id.
        results: the whole results file.
        path: of the results file.
        metric: the metric that is the accuracy here; its values lie within 0..1.
    """

    name: str
    task: str
    samples: tuple[dict[str, Any], ...]
    results: Mapping[str, Any]
    path: Path
    metric: str

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings of the evaluation as lm-eval recorded them."""
        return self.results["config"]

    @property
    def totals(self) -> Mapping[str, Any] | None:
        """Settings and totals of a run of ``--model hcot`` (`RunStatistics.as_dict`); None for another model."""
        return self.config.get("hcot")

    @property
    def model(self) -> str:
        """The checkpoint, without the folders it lies in."""
        return str(self.results.get("model_name") or self.config["model"]).rstrip("/").rpartition("/")[2]

    @property
    def policy(self) -> str | None:
        """``off``, ``recompute``, ``evict``, or None for a model that is not ours."""
        return self.setting("pruning")

    @property
    def controls(self) -> dict[str, Any]:
        """What was done beside the model's wish (`hcot_lmeval.control`)."""
        return dict(self.setting("controls") or {})

    @property
    def max_context(self) -> int | None:
        """Most live tokens of a request, or None for a model that is not ours."""
        return self.setting("max_context")

    @property
    def seed(self) -> int | None:
        """Of the sampling, or None for a model that is not ours."""
        return self.setting("seed")

    @property
    def clock(self) -> str | None:
        """What the chat template read as the time, or None if it read none."""
        return self.setting("clock")

    def setting(self, key: str) -> Any:
        """Returns a setting of ``--model hcot``, such as ``ablation``; None if it has none, or is another model."""
        return self.totals.get(key) if self.totals else None

    def agrees_with(self, facts: Mapping[str, Any]) -> bool:
        """Whether notes with these facts in their header may have been taken by this run, as far as both tell."""
        made = self.checkpoint
        if len({facts.get("name"), Path(made.peft or made.name).name} - {None, ""}) > 1:
            return False
        settings = {"pruning": self.policy, "max_context": self.max_context, "ablation": self.setting("ablation")}
        settings |= {field.name: self.controls.get(field.name) for field in fields(ControlOptions)}
        return facts.get("pruning") is None or all(facts.get(name) == value for name, value in settings.items())

    @property
    def model_args(self) -> dict[str, Any]:
        """The model arguments as they were given; older releases of lm-eval record one string."""
        given = self.config.get("model_args") or {}
        if isinstance(given, str):
            return dict(pair.split("=", 1) for pair in given.split(",") if "=" in pair)
        return dict(given)

    @property
    def checkpoint(self) -> Checkpoint:
        args = self.model_args
        name = args.get("pretrained") or args.get("model") or self.results.get("model_name") or ""
        return Checkpoint(str(name).rstrip("/"), *(str(args.get(key) or "") for key in ("revision", "peft", "delta")))

    @property
    def is_templated(self) -> bool:
        """Whether prompts were put into a chat template, by lm-eval or by ``--model hcot`` itself."""
        return bool(self.results.get("chat_template_sha") or self.setting("chat_template"))

    @property
    def task_config(self) -> Mapping[str, Any]:
        """The configuration of the task, as it was in force."""
        return self.results["configs"][self.task]

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """Those of the task, ``--gen_kwargs`` included."""
        return dict(self.task_config.get("generation_kwargs") or {})

    @property
    def budget(self) -> Budget | None:
        """The budget in force; None if the files do not tell, as for another model whose task names no limit.

        The task's generation kwargs come first, then the default of the model: for ``hcot`` as it recorded it, for
        another model its argument ``max_gen_toks``.
        """
        kwargs, totals = self.generation_kwargs, self.totals
        default = totals["max_gen_toks"] if totals else self.model_args.get("max_gen_toks")
        limit = next((kwargs[name] for name in LIMITS if kwargs.get(name) is not None), default)
        if limit is None:
            return None
        if totals and totals["pruning"] == "off" and int(limit) >= totals["max_context"]:
            return Budget(totals["max_context"], UNBOUND)
        return Budget(int(limit), int(limit))

    @property
    def versions(self) -> dict[str, str]:
        """Of what computed the run, as far as its files tell them."""
        torch = TORCH_VERSION.search(self.results.get("pretty_env_info") or "")
        found = {
            "lm-eval": self.results.get("lm_eval_version"),
            "transformers": self.results.get("transformers_version"),
            "torch": torch[1] if torch else None,
        }
        return {name: str(version) for name, version in found.items() if version not in (None, "N/A")}

    @cached_property
    def scores(self) -> dict[int, float]:
        """doc_id -> score, within 0..1; in a task with k repeats the share of the right ones."""
        return {sample["doc_id"]: float(sample[self.metric]) for sample in self.samples}

    @cached_property
    def by_doc(self) -> dict[Any, dict[str, Any]]:
        """doc_id -> sample."""
        return {sample["doc_id"]: sample for sample in self.samples}

    @cached_property
    def requests(self) -> tuple[Mapping[str, Any], ...] | None:
        """Statistics of every response (keys of `hcot_lmeval.events.Statistics`); None for a model that is not ours."""
        if not all("requests" in sample for sample in self.samples):
            return None
        return tuple(stats for sample in self.samples for stats in sample["requests"])

    def groups(self, column: str) -> dict[Any, list[int]]:
        """Returns the doc_ids for each value of a column of the documents, in the order of first appearance.

        Raises:
            ResultsError: the documents have no such column.
        """
        found: dict[Any, list[int]] = {}
        for sample in self.samples:
            if column not in sample["doc"]:
                known = ", ".join(sorted(sample["doc"]))
                raise ResultsError(f"documents of {self.task} have no column {column!r}; they have {known}")
            found.setdefault(sample["doc"][column], []).append(sample["doc_id"])
        return found

    @property
    def grouping(self) -> str | None:
        """The column of `GROUPINGS` that this task's documents have, if it tells them apart."""
        present = (c for c in GROUPINGS if all(c in sample["doc"] for sample in self.samples))
        return next((c for c in present if len({sample["doc"][c] for sample in self.samples}) > 1), None)

    def named(self, name: str) -> Run:
        """Returns this run under another name."""
        return replace(self, name=name)


def read_runs(
    directory: Path, tasks: Sequence[str] | None = None, metric: str | None = None, filter_name: str | None = None
) -> list[Run]:
    """Reads all runs below a folder, oldest first.

    Args:
        directory: the ``--output_path`` of one or more evaluations, or a folder above it.
        tasks: those to read; None: all.
        metric: the accuracy; None: the first of `PREFERRED` that the samples have.
        filter_name: of lm-eval's filters, where a task has several; None: the first.

    Raises:
        ResultsError: the folder holds no run, a results file without its samples, half a file, or no such metric or
            filter.
    """
    found = [run for path in sorted(directory.rglob("results_*.json"), key=_stamp) for run in runs_of_file(path, tasks)]
    if not found:
        of_tasks = f" of {', '.join(tasks)}" if tasks else ""
        advice = f"run lm_eval with --log_samples --output_path {directory}"
        raise ResultsError(f"no run{of_tasks} below {directory}; {advice}")
    return [_finished(run, metric, filter_name) for run in found]


def runs_of_file(path: Path, tasks: Sequence[str] | None = None) -> Iterator[Run]:
    """Yields the run of each task of one results file, with the samples of all filters and no metric chosen.

    Raises:
        ResultsError: the samples of a task are missing, or a file is not complete.
    """
    results = _json(path, path.read_text(encoding="utf-8"))
    for task in results["configs"]:
        if tasks and task not in tasks:
            continue
        samples = path.with_name(f"samples_{task}_{_stamp(path)}.jsonl")
        if not samples.exists():
            raise ResultsError(f"{path} has no {samples.name} beside it; run lm_eval again with --log_samples")
        # not splitlines(): it also parts at U+2028 and its like, which JSON leaves within strings
        lines = samples.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        run = Run("", task, tuple(_json(samples, line) for line in lines if line), results, path, "")
        yield run.named(label(run))


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text.removeprefix("\ufeff"))
        if not isinstance(found, dict):
            raise ResultsError(f"{path} holds no JSON object, and is no file of lm-eval's; give the folder of a run")
        return found
    except json.JSONDecodeError:
        raise ResultsError(
            f"{path} is not complete: the run was killed while it wrote, or still writes; remove the file or run again"
        ) from None


def label(run: Run, model: str = "") -> str:
    """Returns the name of a run that was given none: checkpoint, policy, variant of the rule, controls, and window."""
    if run.totals is None:
        return f"{model or run.model} ({run.config['model']})"
    controls = " ".join(f"{name}={value}" for name, value in run.controls.items()) or None
    parts = (model or run.model, run.policy, run.setting("ablation"), controls, run.max_context)
    return ", ".join(str(part) for part in parts if part is not None)


def _finished(run: Run, metric: str | None, filter_name: str | None) -> Run:
    filters = list(dict.fromkeys(sample["filter"] for sample in run.samples))
    if not filters or (filter_name and filter_name not in filters):
        raise ResultsError(f"{run.path}: task {run.task} has no filter {filter_name!r}; it has {', '.join(filters)}")
    chosen = [sample for sample in run.samples if sample["filter"] == (filter_name or filters[0])]
    ordered = tuple(sorted(chosen, key=lambda sample: sample["doc_id"]))
    return replace(run, samples=ordered, metric=_metric(run, ordered, metric))


def _metric(run: Run, samples: Sequence[Mapping[str, Any]], named: str | None) -> str:
    numbers = [key for key, value in samples[0].items() if isinstance(value, (int, float))]
    known = [key for prefix in PREFERRED for key in numbers if key in samples[0]["metrics"] and key.startswith(prefix)]
    if named is None and known:
        return known[0]
    if named in numbers:
        return named
    have = ", ".join(samples[0]["metrics"])
    if "bypass" in samples[0]["metrics"]:
        raise ResultsError(
            f"{run.path}: task {run.task} was run with --predict_only, so nothing is graded; leave it out"
        )
    raise ResultsError(f"{run.path}: task {run.task} has no metric {named or 'for the accuracy'!r}; it has {have}")


def _stamp(path: Path) -> str:
    found = STAMP.search(path.stem)
    return found[1] if found else ""
