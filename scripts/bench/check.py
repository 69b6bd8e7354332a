"""Whether the engines compute the same: their logits against forwards of the live context, at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.engines import ENGINES, prepare
from bench.engines.contract import Setting, UnavailableError
from bench.measure import Measurement, Report, checked_run
from bench.work import Script, Work, make_work
from hcot_lmeval.trace import Policy

SCRIPT = Script(tokens=48, prompt=9, thought=10, solution=3, text=2)
ROWS = 2

ALLOWED = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest difference of a logit, in standard deviations of the logits, for each dtype: what rounding may do, and a
wrong position or a token too many in the context may not."""

COARSE = {"llama.cpp+flash": 3e-2}
"""The same for engines that compute in less than float32 somewhere, whatever the dtype; the larger bound counts."""


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
        WrongLogitsError: a logit differs by more than `ALLOWED` and `COARSE` say.
    """
    work = make_work(ROWS, SCRIPT, setting.model.config.vocab_size)
    setting = replace(setting, work=work)
    expected: dict[str, list[list[torch.Tensor]]] = {}
    differences = []
    for name in engines:
        report(f"{name}: check")
        difference = _difference(name, setting, expected)
        limit = max(ALLOWED[str(setting.model.dtype).removeprefix("torch.")], COARSE.get(name, 0))
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
    """Returns for each row and generated token the logits before it, by forwards of the live context from the start.

    There is one forward for each stretch between prunes: its outputs are those of all the shorter contexts in it.
    """
    return [_row_logits(model, work, row, policy) for row in range(work.batch)]


def _row_logits(model: Any, work: Work, row: int, policy: str) -> list[torch.Tensor]:
    context, found, wanted = work.context(row, policy), [], 0
    for index, token in enumerate(work.traces[row]):
        live, wanted = list(context.live), wanted + 1
        step = context.push(token)
        if step.is_prune or index + 1 == work.tokens:
            ids = torch.tensor([live], device=model.device)
            found += list(model(input_ids=ids, use_cache=False).logits[0, -wanted:].double().cpu())
            wanted = 0
    return found


def _largest(seen: dict[tuple[int, int], torch.Tensor], expected: list[list[torch.Tensor]]) -> float:
    """The largest difference, in standard deviations; infinite if logits are missing or not finite."""
    places = [(row, n) for row, logits in enumerate(expected) for n in range(len(logits))]
    if set(seen) != set(places):
        return float("inf")
    differences = [(seen[row, n] - expected[row][n]).abs().max() / expected[row][n].std() for row, n in places]
    return float(torch.stack(differences).nan_to_num(nan=float("inf")).max())
