"""From measurements to verdicts in words. Every threshold is here, with its reason.

A finding is made only from differences that are large and, where traces are compared with one another, significant.
This module needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, median, stdev

from hcot_lmeval.diagnosis.measurements import AS_RENDERED, Measurements
from hcot_lmeval.trace import Policy

SIGNIFICANT = 3.0
"""Standard errors that a mean difference has to exceed: a few comparisons are made, and none should be luck."""
POLICY_NATS = 0.02
"""Nats per token by which the traces have to be likelier under another policy; another training seed moves less."""
TEMPLATE_NATS = 0.05
"""The same for the first tokens of traces behind another prompt."""
LEARNED = 0.05
"""A marker that was learned gets more than this (geometric mean) where it is due. Opening a block is a choice, and a
good model may give it a few per cent; one that was never a target gets less than any of these by orders."""
CHOICE = 0.002
"""The same for markers that the writer was free to place: the opening one."""
END_FALL = 0.5
"""An end that is likely in one context and less than this share as likely in another needs that context."""
FREQUENT = 0.1
"""Share of the responses from which on something is reported as a habit rather than an accident."""


class Code(StrEnum):
    """The findings there are, as they stand in the JSON."""

    WRONG_POLICY = "wrong_policy"
    WRONG_RECORD = "wrong_record"
    NEVER_LEARNED = "never_learned"
    END_NEVER_LEARNED = "end_never_learned"
    PROMPT_IN_LOSS = "prompt_in_loss"
    TEMPLATE = "template"
    END_NEEDS_CONTEXT = "end_needs_context"
    ILLEGAL = "illegal_traces"
    LOOPS = "loops"
    CUT = "cut"


class Kind(StrEnum):
    """What a finding is to the user."""

    CAUSE = "cause"
    """A mistake to mend."""
    SYMPTOM = "symptom"
    """What goes wrong when the model writes by itself."""
    NOTE = "note"
    """Good to know, and no fault."""


@dataclass(frozen=True)
class Finding:
    """One verdict.

    Attributes:
        code: which one.
        kind: cause, symptom or note.
        text: what was found, with its figures, and what to do.
    """

    code: Code
    kind: Kind
    text: str


def find_all(measured: Measurements) -> list[Finding]:
    """Returns what was found: causes, then symptoms, then notes; for a model without fault at most notes."""
    made = [finding for judge in JUDGES for finding in judge(measured)]
    return sorted(made, key=lambda finding: list(Kind).index(finding.kind))


def trained_policy(measured: Measurements) -> Policy:
    """The policy under which the gold traces are likeliest; `intended` unless another one is clearly better."""
    losses = measured.losses
    best = min(losses, key=lambda policy: fmean(losses[policy]))
    better = _is_better(losses[best], losses[measured.intended], POLICY_NATS)
    return best if better else measured.intended


def _is_better(losses: Sequence[float], than: Sequence[float], by: float) -> bool:
    """Whether traces are likelier by so many nats per token on average, and that is no luck."""
    gains = [b - a for a, b in zip(losses, than, strict=True)]
    if len(gains) < 2 or fmean(gains) <= by:
        return False
    return fmean(gains) > SIGNIFICANT * stdev(gains) / math.sqrt(len(gains))


def _policy(measured: Measurements) -> Iterator[Finding]:
    """Whether the model is run, and recorded, under the policy that it was trained with."""
    best, losses = trained_policy(measured), measured.losses
    figures = ", ".join(f"{policy} {fmean(some):.3f}" for policy, some in losses.items())
    if best != measured.intended:
        yield Finding(
            Code.WRONG_POLICY,
            Kind.CAUSE,
            f"The gold traces are likeliest under policy {best} (nats per token: {figures}), so the model was trained "
            f"with it, and not with {measured.intended}, under which it would be run. Run it with pruning={best}.",
        )
    recorded = measured.recorded
    if recorded not in (None, best) and _is_better(losses[best], losses[recorded], POLICY_NATS):
        yield Finding(
            Code.WRONG_RECORD,
            Kind.CAUSE,
            f"The checkpoint's record says policy {recorded}; the traces say {best}. Correct the entry hcot in its "
            "config.json, or train it again.",
        )


def _markers(measured: Measurements) -> Iterator[Finding]:
    """Markers and ends that come in no context, neither under the best policy nor behind the best prompt."""
    best, grammar = trained_policy(measured), measured.grammar
    others = [measured.due_in(traces) for traces in measured.beginnings.values()]
    for token, probability in measured.due(best).items():
        highest = max(probability, *(due.get(token, 0.0) for due in others), 0.0)
        if highest >= (CHOICE if token == grammar.markers.open else LEARNED):
            continue
        code, what, why = _END if token in grammar.eos_ids else _MARKER
        yield Finding(
            code,
            Kind.CAUSE,
            f"The {what} {measured.names[token]} has probability {probability:.1e} where the traces have it, under the "
            f"likeliest policy ({best}): it was never learned; {why}",
        )


_END = (
    Code.END_NEVER_LEARNED,
    "end of the sequence",
    "was it masked out of the loss, as padding with the same id is?",
)
_MARKER = (
    Code.NEVER_LEARNED,
    "marker",
    "was it in the vocabulary when the model was trained, and a target of the loss?",
)


def _prompt(measured: Measurements) -> Iterator[Finding]:
    if measured.prompts < measured.unigram:
        yield Finding(
            Code.PROMPT_IN_LOSS,
            Kind.CAUSE,
            f"The model predicts prompts ({measured.prompts:.2f} nats per token, {measured.unigram:.2f} from how often "
            "each token occurs): they were in the loss. That is no fault of a base that was pretrained on such text; "
            "otherwise mask the prompts, which teach it to write questions.",
        )


def _template(measured: Measurements) -> Iterator[Finding]:
    others = {name: [scored.nats for scored in traces] for name, traces in measured.beginnings.items()}
    rendered = others.pop(AS_RENDERED, None)
    if rendered is None or not others:
        return
    best = min(others, key=lambda name: fmean(others[name]))
    if _is_better(others[best], rendered, TEMPLATE_NATS):
        yield Finding(
            Code.TEMPLATE,
            Kind.CAUSE,
            f"The first tokens of the traces are likelier behind a prompt with {best} ({fmean(others[best]):.3f} nats "
            f"per token) than behind the prompt as it is rendered ({fmean(rendered):.3f}): the chat template is not "
            "that of the training.",
        )


def _ends(measured: Measurements) -> Iterator[Finding]:
    """Ends that come in one context and not in another: why a run that does not prune never stops."""
    best = trained_policy(measured)
    for policy in dict.fromkeys((Policy.OFF, measured.intended)):
        here, there = measured.due(best), measured.due(policy)
        lost = [
            f"{measured.names[token]} {here[token]:.2g} and {there[token]:.1e}"
            for token in (measured.grammar.think[1], *sorted(measured.grammar.eos_ids))
            if token in here and here[token] >= LEARNED and there.get(token, 1) < END_FALL * here[token]
        ]
        if lost:
            yield Finding(
                Code.END_NEEDS_CONTEXT,
                Kind.SYMPTOM if policy is measured.intended else Kind.NOTE,
                f"Ends come in the contexts of {best} alone. Probability where they are due under {best} and under "
                f"{policy}: {', '.join(lost)}. With pruning={policy} the model goes on until its budget is spent.",
            )


def _writing(measured: Measurements) -> Iterator[Finding]:
    """What goes wrong when the model writes by itself under the policy that is intended."""
    writing = measured.writing[measured.intended]
    count = max(1, writing.responses)
    if writing.illegal > FREQUENT:
        faults = [fault for fault in writing.faults if fault is not None]
        places = [(measured.names.get(fault.token, str(fault.token)), fault.state) for fault in faults]
        usual = max(set(places), key=places.count)
        yield Finding(
            Code.ILLEGAL,
            Kind.SYMPTOM,
            f"{100 * writing.illegal:.0f} % of the responses under {measured.intended} break the notation, first by "
            f"{usual[0]} in state {usual[1]} ({places.count(usual)} of {len(places)}), at generated token "
            f"{median(fault.index for fault in faults):.0f} in the median. constraints=grammar prevents it, and heals "
            "no cause.",
        )
    if writing.looped / count > FREQUENT:
        yield Finding(
            Code.LOOPS,
            Kind.SYMPTOM,
            f"{100 * writing.looped / count:.0f} % of the responses under {measured.intended} repeat themselves. "
            "loop_tokens ends them early; force_answer gets an answer out of them.",
        )
    if writing.completed < 1 - FREQUENT:
        ends = ", ".join(f"{reason} {number}" for reason, number in writing.ends.most_common())
        yield Finding(
            Code.CUT,
            Kind.SYMPTOM,
            f"{100 * writing.completed:.0f} % of the responses under {measured.intended} end by themselves ({ends}).",
        )


JUDGES: tuple[Callable[[Measurements], Iterator[Finding]], ...] = (
    _policy,
    _markers,
    _prompt,
    _template,
    _ends,
    _writing,
)
