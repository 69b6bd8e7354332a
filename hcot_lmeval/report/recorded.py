"""What the results file of a run tells of how it was made: checkpoint, prompt, budget, versions.

This module imports the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hcot_lmeval.report.results import Run

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Generation kwargs that limit the generated tokens of a request; of several lm-eval takes the first of this order."""

TORCH_VERSION = re.compile(r"^PyTorch version: (\S+)$", re.MULTILINE)
"""Its line in what ``torch.utils.collect_env`` prints."""

UNBOUND = 2**63
"""No limit."""


def model_args(run: Run) -> dict[str, Any]:
    """Returns the model arguments as they were given; older releases of lm-eval record one string."""
    given = run.config.get("model_args") or {}
    if isinstance(given, str):
        return dict(pair.split("=", 1) for pair in given.split(",") if "=" in pair)
    return dict(given)


class Checkpoint(NamedTuple):
    """What tells the weights of one run from those of another, as far as their names do."""

    name: str
    revision: str
    peft: str
    delta: str

    def __str__(self) -> str:
        return ", ".join(part for part in (self.name, self.revision, self.peft, self.delta) if part not in ("", "main"))


def checkpoint(run: Run) -> Checkpoint:
    """Returns the checkpoint that a run used."""
    args = model_args(run)
    name = args.get("pretrained") or args.get("model") or run.results.get("model_name") or ""
    return Checkpoint(str(name).rstrip("/"), *(str(args.get(key) or "") for key in ("revision", "peft", "delta")))


def commit(run: Run) -> str | None:
    """Returns the commit of a checkpoint on the hub, or None for one on disk and where lm-eval does not tell."""
    return run.config.get("model_sha") or None


def is_templated(run: Run) -> bool:
    """Whether prompts were put into a chat template, by lm-eval or by ``--model hcot`` itself."""
    return bool(run.results.get("chat_template_sha") or (run.totals or {}).get("chat_template"))


def clock(run: Run) -> str | None:
    """Returns what the chat template read as the time, or None if it read none."""
    return (run.totals or {}).get("clock")


def task_config(run: Run) -> Mapping[str, Any]:
    """Returns the configuration of the task, as it was in force."""
    return run.results["configs"][run.task]


def generation_kwargs(run: Run) -> dict[str, Any]:
    """Returns the generation kwargs of the task, ``--gen_kwargs`` included."""
    return dict(task_config(run).get("generation_kwargs") or {})


def generates(run: Run) -> bool:
    """Whether the task asks for text; other tasks compare log-likelihoods and have no budget."""
    return str(task_config(run).get("output_type", "")).startswith("generate")


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


def budget(run: Run) -> Budget | None:
    """Returns the budget in force; None if the files do not tell, as for another model whose task names no limit.

    The task's generation kwargs come first, then the default of the model: for ``hcot`` as it recorded it, for another
    model its argument ``max_gen_toks``.
    """
    kwargs, totals = generation_kwargs(run), run.totals
    default = totals["max_gen_toks"] if totals else model_args(run).get("max_gen_toks")
    limit = next((kwargs[name] for name in LIMITS if kwargs.get(name) is not None), default)
    if limit is None:
        return None
    limit = int(limit)
    if totals and totals["pruning"] == "off" and limit >= totals["max_context"]:
        return Budget(totals["max_context"], UNBOUND)
    return Budget(limit, limit)


def versions(run: Run) -> dict[str, str]:
    """Returns the versions of what computed the run, as far as its files tell them."""
    torch = TORCH_VERSION.search(run.results.get("pretty_env_info") or "")
    found = {
        "lm-eval": run.results.get("lm_eval_version"),
        "transformers": run.results.get("transformers_version"),
        "torch": torch[1] if torch else None,
    }
    return {name: str(version) for name, version in found.items() if version not in (None, "N/A")}
