"""Cross-entropy and structure losses from hidden states, without the logits of a whole batch.

Let A be the log-sum-exp of a row's legal logits, F that of the logits I that the grammar forbids there, Z = log(e^A +
e^F) that of all, and M = 1 - sum_{i in I} p_i the mass of the legal tokens. The cross-entropy of a legal target y is

    -log p_y = Z - z_y = -log p(y | legal) - log M,        M = e^(A - Z) = sigmoid(A - F)

so plain cross-entropy holds the term on illegal markers once, and the structure loss adds ``weight`` times more of
it: it raises legality and nothing else, and vanishes where nothing illegal is likely. (Unlikelihood, Welleck et al.
2020, is the same to first order, and weighting markers teaches to write more of them; see docs/trained.md.)

All results are sums over targets, so that a caller can divide by the count of a whole, distributed batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from hcot_lmeval.grammar import Grammar, State, TokenClass
from hcot_lmeval.trace import IGNORE

Head = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states [n, D] to logits [n, V]."""


@dataclass
class LossSums:
    """Sums over the targets of a batch, in nats.

    Attributes:
        objective: what is differentiated, [].
        cross_entropy: unweighted, for each `TokenClass`, [classes]; without gradients.
        structure: the term on illegal markers, unweighted, []; without gradients.
        counts: targets of each class, [classes].
    """

    objective: torch.Tensor
    cross_entropy: torch.Tensor
    structure: torch.Tensor
    counts: torch.Tensor

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LossSums:
        """Returns what `change` makes of each tensor."""
        return LossSums(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def means(self) -> tuple[float, float, list[float]]:
        """Returns cross-entropy and structure term per target, and the cross-entropy per target of each `TokenClass`.

        They are NaN where there is no target.
        """
        count = self.counts.sum()
        by_class: list[float] = (self.cross_entropy / self.counts).tolist()
        return float(self.cross_entropy.sum() / count), float(self.structure / count), by_class


def packed_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    states: torch.Tensor,
    classes: torch.Tensor,
    head: Head,
    grammar: Grammar,
    weight: float = 1.0,
    chunk: int = 1024,
) -> LossSums:
    """Returns the sums of the losses over the rows that have a target.

    Logits exist for `chunk` rows at a time and are computed again for the backward pass, so that memory is
    chunk x vocabulary instead of tokens x vocabulary.

    Args:
        hidden: last hidden states, [N, D].
        targets: token ids, or `IGNORE`, [N].
        states: `State` in which each target is generated, [N].
        classes: `TokenClass` of each target, [N].
        head: from hidden states to logits, soft caps and scales included.
        grammar: which markers are illegal in each state.
        weight: of the term on illegal markers that is added to the cross-entropy, lambda.
        chunk: rows of logits.

    Raises:
        ValueError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; it has to be at least 1 row of logits")
    rows = (targets != IGNORE).nonzero()[:, 0]
    illegal = _IllegalIds.of(grammar, hidden.device)

    def sums(hidden: torch.Tensor, targets: torch.Tensor, states: torch.Tensor, classes: torch.Tensor) -> LossSums:
        cross_entropy, term = checkpoint(_entropies, hidden, targets, states, head, illegal, use_reentrant=False)
        member = torch.nn.functional.one_hot(classes, len(TokenClass))
        return LossSums(
            objective=cross_entropy.sum() + weight * term.sum(),
            cross_entropy=(member * cross_entropy.detach()[:, None]).sum(0),  # autocast would round a matrix product
            structure=term.detach().sum(),
            counts=member.sum(0),
        )

    # without targets there is one chunk of no rows, whose zeros depend on every parameter, as DDP wants
    chunks = (column[rows].split(chunk) for column in (hidden, targets, states, classes))
    return reduce(operator.add, map(sums, *chunks))


@dataclass(frozen=True)
class _IllegalIds:
    """The grammar as tensors. Members of an IntEnum are compared as ints: dynamo would decide the comparison by type.

    Attributes:
        ids: the illegal ids of each state, [states, width]; where it has fewer, the first of them again.
        real: which entries of `ids` are no repetition, [states, width].
        lead: the only token that may come in state `LEAD`; -1, which is no token, where there is none.
    """

    ids: torch.Tensor
    real: torch.Tensor
    lead: int

    @classmethod
    def of(cls, grammar: Grammar, device: torch.device) -> _IllegalIds:
        sets = [sorted(grammar.illegal(state)) for state in State]
        width = max(map(len, sets))
        ids = torch.tensor([found + found[:1] * (width - len(found)) for found in sets], device=device)
        sizes = torch.tensor([len(found) for found in sets], device=device)
        real = torch.arange(width, device=device) < sizes[:, None]
        return cls(ids, real, -1 if grammar.markers.lead is None else grammar.markers.lead)

    def allow(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Returns whether each token may come in its state, bool [n]."""
        listed = (self.ids[states] == tokens[:, None]).any(-1)
        return ~listed & ((states != int(State.LEAD)) | (tokens == self.lead))


def _entropies(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    states: torch.Tensor,
    head: Head,
    illegal: _IllegalIds,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cross-entropy and the structure term of each row, [n] each.

    The term is 0 where the target itself is illegal, as in malformed traces that are kept: there the losses would pull
    in opposite directions.
    """
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids, real = illegal.ids[states], illegal.real[states]
    never = torch.finfo(logits.dtype).min  # log 0 in effect; the log-sum-exp of -inf alone has no gradient
    few = logits.gather(-1, torch.cat([ids, targets[:, None]], -1))  # at once: its gradient is as large as the logits
    forbidden, chosen = few[:, :-1].clamp_min(never).masked_fill(~real, never), few[:, -1]
    allowed = logits.scatter(-1, ids, -torch.inf).logsumexp(-1)
    cross_entropy = torch.logaddexp(allowed, forbidden.logsumexp(-1)) - chosen
    term = -logsigmoid(allowed - forbidden.logsumexp(-1))  # accurate at any mass, where 1 - p would be rounding error
    return cross_entropy, term.where(illegal.allow(targets, states), 0.0)
