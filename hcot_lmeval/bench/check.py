"""Whether the engines compute the same: their logits against forwards of the live context, at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hcot_lmeval.bench.engines import ENGINES, prepare
from hcot_lmeval.bench.engines.contract import Setting, UnavailableError
from hcot_lmeval.bench.measure import Measurement, Report, checked_run
from hcot_lmeval.bench.work import Script, Work, make_work
from hcot_lmeval.trace import Policy

SCRIPT = Script(tokens=48, prompt=9, thought=10, solution=3, text=2)
ROWS = 2

ALLOWED = {"float32": 1e-2, "bfloat16": 0.25, "float16": 0.05}
"""Largest difference of a logit, in standard deviations of the logits, for each dtype: what rounding may do, and a
wrong position or a token too many in the context may not. Flash attention of llama.cpp needs half of it in float32."""


@dataclass(frozen=True)
class Difference:
    """How far the logits of an engine are from those of a plain forward of its live context.

    Attributes:
        engine: its name.
        deviation: the largest difference, in standard deviations of the logits at that token; None if it was not
            compared.
        reason: why it was not compared.
    """

    engine: str
    deviation: float | None = None
    reason: str = ""


class WrongLogitsError(AssertionError):
    """An engine computes something else than the model."""


def check_engines(setting: Setting, engines: Sequence[str], report: Report) -> list[Difference]:
    """Compares the engines with a fresh forward of the live context, at every token of a short trace.

    Under ``evict`` no fresh forward equals the live context, so it is not compared here; the tests of the engine do.

    Args:
        setting: the model and the threads; the work is a short one of its own.
        engines: names.
        report: called with what is being done.

    Raises:
        WrongLogitsError: a logit differs by more than `ALLOWED`.
    """
    work = make_work(ROWS, SCRIPT, setting.model.config.vocab_size)
    setting = replace(setting, work=work)
    expected: dict[str, list[list[torch.Tensor]]] = {}
    differences = []
    for name in engines:
        report(f"{name}: check")
        difference = _difference(name, setting, expected)
        limit = ALLOWED[str(setting.model.dtype).removeprefix("torch.")]
        if difference.deviation is not None and not difference.deviation <= limit:
            raise WrongLogitsError(
                f"{name}: a logit differs from a plain forward of the live context by {difference.deviation:.1e} "
                f"standard deviations (allowed: {limit:.0e})"
            )
        differences.append(difference)
    return differences


def _difference(name: str, setting: Setting, expected: dict[str, list[list[torch.Tensor]]]) -> Difference:
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def keep(row: int, generated: int, logits: Any) -> None:
        seen[row, generated] = torch.as_tensor(logits).double().cpu().clone()

    if ENGINES.get(name, ("", {}))[1].get("policy") == Policy.EVICT:
        return Difference(name, reason="no plain forward equals it")
    try:
        contender = prepare(name, replace(setting, on_logits=keep))
    except UnavailableError as error:
        return Difference(name, reason=str(error))
    checked_run(Measurement(name), contender, setting)
    contender.close()
    if not seen:
        return Difference(name, reason="it does not show its logits; its tokens were checked")
    if contender.policy not in expected:
        expected[contender.policy] = plain_logits(setting.model, setting.work, contender.policy)
    return Difference(name, _largest(seen, expected[contender.policy]))


@torch.inference_mode()
def plain_logits(model: Any, work: Work, policy: str) -> list[list[torch.Tensor]]:
    """Returns for each row and generated token the logits before it: a forward of the live context from the start."""
    found = []
    for row in range(work.batch):
        context = work.context(row, policy)
        logits = []
        for token in work.traces[row]:
            ids = torch.tensor([context.live], device=model.device)
            logits.append(model(input_ids=ids, use_cache=False).logits[0, -1].double().cpu())
            context.push(token)
        found.append(logits)
    return found


def _largest(seen: dict[tuple[int, int], torch.Tensor], expected: list[list[torch.Tensor]]) -> float:
    """The largest difference, in standard deviations; infinite if logits are missing or not finite."""
    places = [(row, n) for row, logits in enumerate(expected) for n in range(len(logits))]
    if set(seen) != set(places):
        return float("inf")
    differences = [(seen[row, n] - expected[row][n]).abs().max() / expected[row][n].std() for row, n in places]
    return float(torch.stack(differences).nan_to_num(nan=float("inf")).max())
