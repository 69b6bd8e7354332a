"""A diagnosis in words, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from hcot_lmeval.diagnosis.findings import Finding, Kind
from hcot_lmeval.diagnosis.measurements import Measurements
from hcot_lmeval.trace import Policy

MEANINGS = (
    "nats: mean loss of the gold traces per generated token, in the contexts of the policy",
    "due: geometric mean of the probability of a marker or end where the gold traces have it",
    "right, ended, illegal, loops: share of the responses, written greedily, that are right, end by themselves, have",
    "    anything that the grammar forbids, repeat themselves",
    "first fault: median index, among the generated tokens, of the first token that the grammar forbids",
)


def as_dict(measured: Measurements, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns everything as JSON values."""
    return {
        "intended_policy": measured.intended.value,
        "recorded_policy": None if measured.recorded is None else measured.recorded.value,
        "traces": len(measured.scores[measured.intended]),
        "policies": {policy.value: _policy(measured, policy) for policy in measured.scores},
        "prompt_nats": measured.prompts,
        "prompt_unigram_nats": measured.unigram,
        "prompt_ends": {name: fmean(s.nats for s in traces) for name, traces in measured.beginnings.items()},
        "findings": [{"code": f.code.value, "kind": f.kind.value, "text": f.text} for f in findings],
    }


def _policy(measured: Measurements, policy: Policy) -> dict[str, Any]:
    writing = measured.writing.get(policy)
    found: dict[str, Any] = {
        "nats": fmean(measured.losses[policy]),
        "due": {measured.names[token]: value for token, value in measured.due(policy).items()},
    }
    if writing is not None:
        indices = [fault.index for fault in writing.faults if fault is not None]
        found["written"] = {
            "responses": writing.responses,
            "accuracy": writing.accuracy,
            "completed": writing.completed,
            "illegal": writing.illegal,
            "looped": writing.looped / max(1, writing.responses),
            "first_fault": median(indices) if indices else None,
            "generated_tokens": fmean(writing.generated),
            "ends": dict(writing.ends),
        }
    return found


def table(measured: Measurements) -> str:
    """Returns the figures, a row for each policy, with what they mean."""
    from tabulate import tabulate

    policies = as_dict(measured, ())["policies"]
    tokens = list(dict.fromkeys(name for policy in policies.values() for name in policy["due"]))
    heads = ["policy", "nats", *(f"due {name}" for name in tokens), "right", "ended", "illegal", "loops", "first fault"]
    rows = [[policy, f"{facts['nats']:.3f}", *_cells(facts, tokens)] for policy, facts in policies.items()]
    return "\n".join([tabulate(rows, heads, tablefmt="simple", disable_numparse=True), "", *MEANINGS])


def _cells(facts: dict[str, Any], tokens: Sequence[str]) -> list[str]:
    due = [f"{facts['due'][name]:.2g}" if name in facts["due"] else "" for name in tokens]
    written = facts.get("written")
    if written is None:
        return [*due, *[""] * 5]
    shares = [f"{100 * written[name]:.0f} %" for name in ("accuracy", "completed", "illegal", "looped")]
    first = written["first_fault"]
    return [*due, *shares, "" if first is None else f"{first:.0f}"]


def verdict(findings: Sequence[Finding]) -> str:
    """Returns the findings in words."""
    parts = []
    if not any(finding.kind is not Kind.NOTE for finding in findings):
        parts = ["Nothing is wrong: policy, markers, ends, prompt and template are those of the training."]
    for kind in Kind:
        some = [f"  * {finding.text}" for finding in findings if finding.kind is kind]
        parts += [f"{kind.capitalize()}{'s' if len(some) > 1 else ''}:", *some] if some else []
    return "\n".join(parts)
