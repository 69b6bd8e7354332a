"""What a diagnosis is made from: how likely gold traces are in several contexts, and what the model itself writes.

Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from hcot_lmeval.grammar import Grammar
from hcot_lmeval.trace import Policy

AS_RENDERED = "as rendered"
"""The prompt as the template makes it, among its variants."""


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


@dataclass(frozen=True)
class FirstFault:
    """The first token of a generation that the grammar forbids: at which generated token, which one, in which state."""

    index: int
    token: int
    state: str


@dataclass
class FreeWriting:
    """What the model writes by itself under one policy, greedily.

    Attributes:
        ends: finish reason to count.
        right: responses with the expected answer.
        looped: responses found to repeat themselves.
        faults: of each response its first fault, or None.
        generated: tokens of each response.
    """

    ends: Counter[str] = field(default_factory=Counter)
    right: int = 0
    looped: int = 0
    faults: list[FirstFault | None] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)

    @property
    def responses(self) -> int:
        return len(self.faults)

    @property
    def completed(self) -> float:
        """Share that ended by themselves."""
        return self.ends["eos"] / max(1, self.responses)

    @property
    def illegal(self) -> float:
        """Share with anything that the grammar forbids."""
        return sum(fault is not None for fault in self.faults) / max(1, self.responses)

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.responses)


@dataclass
class Measurements:
    """Everything that `findings` judges.

    Attributes:
        intended: the policy that the model would be run with.
        recorded: the policy of its training record, or None.
        scores: policy to the scored gold traces, the same ones under each.
        writing: policy to what the model writes.
        prompts: mean loss on the tokens of prompts, in nats.
        unigram: the same of a model that knows how often each token occurs in these prompts, and nothing else.
        beginnings: variant of the prompt's end to the first tokens of each trace behind it; the prompt as rendered is
            under ``as rendered``.
        names: control id to its text.
        grammar: of the notation.
    """

    intended: Policy
    recorded: Policy | None
    scores: dict[Policy, list[Scored]]
    writing: dict[Policy, FreeWriting]
    prompts: float
    unigram: float
    beginnings: dict[str, list[Scored]]
    names: dict[int, str]
    grammar: Grammar

    @property
    def losses(self) -> dict[Policy, list[float]]:
        """Policy -> mean loss of each trace."""
        return {policy: [scored.nats for scored in some] for policy, some in self.scores.items()}

    def due(self, policy: Policy) -> dict[int, float]:
        """Control id -> geometric mean of its probability where the gold traces have it; without those they lack."""
        return self.due_in(self.scores[policy])

    def due_in(self, traces: Sequence[Scored]) -> dict[int, float]:
        """The same in other traces."""
        found: dict[int, float] = {}
        for token in sorted(self.names):
            values = [value for scored in traces for value in scored.where_due(token)]
            if values:
                found[token] = math.exp(fmean(values))
        return found
