"""How likely a model finds given traces, token by token, in the contexts that a policy makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.trace import IGNORE, Policy
from hcot_lmeval.training.data.documents import Document, Example, TooLong, compile_document
from hcot_lmeval.training.data.rows import collate
from hcot_lmeval.training.forward import column_logprobs, install, token_logprobs


@dataclass(frozen=True)
class Scored:
    """One trace under one policy.

    Attributes:
        ids: the generated tokens.
        logprobs: of each of them, in nats.
        controls: control id to its log-probability before each of them.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    controls: dict[int, tuple[float, ...]]

    @property
    def nats(self) -> float:
        """Mean loss, in nats per generated token."""
        return -fmean(self.logprobs)

    def where_due(self, token: int) -> list[float]:
        """Log-probabilities of a control token where the trace has it."""
        return [logprob for i, logprob in zip(self.ids, self.logprobs, strict=True) if i == token]


def score_traces(
    model: Any, examples: Iterable[Example], grammar: Grammar, policy: Policy, max_length: int
) -> Iterator[Scored]:
    """Scores traces one by one.

    Args:
        model: of transformers, in evaluation mode.
        examples: prompts and traces.
        grammar: names the control tokens.
        policy: what a closing marker does.
        max_length: most tokens forwarded for a trace, those that a prune forwards again included; of longer ones a
            beginning is scored, and those without a beginning that fits are passed over.
    """
    install(model)
    controls = sorted(grammar.control_ids)
    for example in examples:
        try:
            document = compile_document(example, grammar, policy, max_length=max_length)
        except TooLong:
            continue
        yield _score(model, document, controls)


@torch.no_grad()
def _score(model: Any, document: Document, controls: Sequence[int]) -> Scored:
    device = model.get_input_embeddings().weight.device
    batch = {name: values.to(device) for name, values in collate([asdict(document)], len(document), 0).items()}
    rows = [row for row, target in enumerate(document.targets) if target != IGNORE]
    chosen = token_logprobs(model, batch)[0, rows].tolist()
    columns = column_logprobs(model, batch, controls)[0, rows].T.tolist()
    ids = tuple(document.targets[row] for row in rows)
    return Scored(ids, tuple(chosen), {i: tuple(c) for i, c in zip(controls, columns, strict=True)})


def prompt_nats(model: Any, prompts: Iterable[Sequence[int]], grammar: Grammar) -> float:
    """Mean loss on the tokens of prompts behind their first, in nats; NaN if there are none."""
    install(model)
    found: list[float] = []
    for ids in prompts:
        if len(ids) > 1:
            example = Example(tuple(ids[:1]), tuple(ids[1:]))
            document = compile_document(example, grammar, Policy.OFF, max_length=len(ids))
            found += (-logprob for logprob in _score(model, document, []).logprobs)
    return fmean(found) if found else float("nan")
