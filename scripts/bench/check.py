"""Whether the engines compute the same: their logits against forwards of the live context, at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.engines import ENGINES, Setting, UnavailableError, prepare
from bench.measure import Measurement, checked_run
from bench.output import Report
from bench.work import Script, make_work
from hcot_lmeval.trace import LiveContext, Policy

SCRIPT = Script(tokens=48, prompt=9, thought=10, solution=3, text=2)
ROWS = 2

ALLOWED = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest difference of a logit, in standard deviations of the logits, for each dtype: what rounding may do, and a
wrong position or a token too many in the context may not."""

COARSE = {"llama.cpp+flash": 3e-2}
"""The same for engines that compute in less than float32 somewhere, whatever the dtype; the larger bound counts."""


class WrongLogitsError(AssertionError):
    """An engine computes something else than the model."""


def check_engines(setting: Setting, engines: Sequence[str], report: Report) -> dict[str, float | str]:
    """Compares the engines with a fresh forward of the live context, at every token of a short trace.

    Under ``evict`` no fresh forward equals the live context, so it is not compared here; the tests of the engine do.

    Args:
        setting: the model and the threads; the work is a short one of its own.
        engines: names.
        report: called with what is being done.

    Returns:
        For each engine the largest difference, in standard deviations of the logits at that token, or why it was not
        compared.

    Raises:
        WrongLogitsError: a logit differs by more than `ALLOWED` and `COARSE` say.
    """
    setting = replace(setting, work=make_work(ROWS, SCRIPT, setting.model.config.vocab_size))
    dtype = str(setting.model.dtype).removeprefix("torch.")
    found: dict[str, float | str] = {}
    for name in engines:
        report(f"{name}: check")
        found[name] = difference = _difference(name, setting)
        limit = max(ALLOWED[dtype], COARSE.get(name, 0))
        if not isinstance(difference, str) and not difference <= limit:
            raise WrongLogitsError(
                f"{name}: a logit differs from a plain forward of the live context by {difference:.1e} standard "
                f"deviations (allowed: {limit:.0e})"
            )
    return found


def _difference(name: str, setting: Setting) -> float | str:
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def keep(row: int, generated: int, logits: Any) -> None:
        seen[row, generated] = torch.as_tensor(logits).double().cpu().clone()

    if ENGINES.get(name, ("", {}))[1].get("policy") == Policy.EVICT:
        return "no plain forward equals it"
    try:
        contender = prepare(name, replace(setting, on_logits=keep))
    except UnavailableError as error:
        return str(error)
    checked_run(Measurement(name), contender)
    contender.close()
    if not seen:
        return "it does not show its logits; its tokens were checked"
    work = setting.work
    contexts = [work.context(row, contender.policy) for row in range(work.batch)]
    return largest(seen, [live_logits(setting.model, *row) for row in zip(contexts, work.traces, strict=True)])


@torch.inference_mode()
def live_logits(model: Any, context: LiveContext, trace: Sequence[int]) -> torch.Tensor:
    """Returns the logits before each token of a trace, by forwards of the live context from its start.

    There is one forward for each stretch between prunes: its outputs are those of all the shorter contexts in it.

    Args:
        model: a causal language model of transformers.
        context: has read the prompt.
        trace: the tokens that follow.

    Returns:
        [len(trace), vocabulary], on the CPU, in double precision.
    """
    found, since = [], 0
    for index, token in enumerate(trace):
        live, since = list(context.live), since + 1
        if context.push(token).is_prune or index + 1 == len(trace):
            ids = torch.tensor([live], device=model.device)
            found.append(model(input_ids=ids, use_cache=False).logits[0, -since:].double().cpu())
            since = 0
    return torch.cat(found)


def largest(seen: dict[tuple[int, int], torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference of logits by (row, tokens generated), in standard deviations.

    It is infinite if some logits are missing or not finite.
    """
    places = [(row, n) for row, logits in enumerate(expected) for n in range(len(logits))]
    if set(seen) != set(places):
        return float("inf")
    differences = [(seen[row, n] - expected[row][n]).abs().max() / expected[row][n].std() for row, n in places]
    return float(torch.stack(differences).nan_to_num(nan=float("inf")).max())
