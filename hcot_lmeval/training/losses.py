"""Cross-entropy and structure losses from hidden states, without the logits of a whole batch.

Let A be the log-sum-exp of a row's legal logits, F that of the logits I that the grammar forbids there, Z = log(e^A +
e^F) that of all, and M = 1 - sum_{i in I} p_i the mass of the legal tokens. The cross-entropy of a legal target y is

    -log p_y = Z - z_y = -log p(y | legal) - log M,        M = e^(A - Z) = sigmoid(A - F)

so plain cross-entropy holds the term on illegal markers once, and ``mass`` adds ``weight`` times more of it: it raises
legality and nothing else, and vanishes where nothing illegal is likely. ``unlikelihood`` (Welleck et al. 2020) adds
``- sum_{i in I} log(1 - p_i)``, which is the same to first order. ``marker_weight`` multiplies the cross-entropy of
markers, for comparison; it teaches to write more of them, not to place them better (see docs/trained.md).

All results are sums over targets, so that a caller can divide by the count of a whole, distributed batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Literal, get_args

import torch
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from hcot_lmeval.grammar import Grammar, State, TokenClass
from hcot_lmeval.trace import IGNORE

Head = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states [n, D] to logits [n, V]."""

Kind = Literal["none", "mass", "unlikelihood"]


@dataclass(frozen=True)
class StructureLoss:
    """What is added to the cross-entropy.

    Attributes:
        kind: the term on illegal markers.
        weight: its factor, lambda.
        marker_weight: factor of the cross-entropy of markers.

    Raises:
        ValueError: the kind is unknown, or a factor is negative or not finite.
    """

    kind: Kind = "mass"
    weight: float = 1.0
    marker_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"structure loss {self.kind!r} is unknown; choose one of {', '.join(get_args(Kind))}")
        for name in ("weight", "marker_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; it has to be finite and at least 0")


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

    def detach(self) -> LossSums:
        """Returns the same numbers without gradients."""
        return LossSums(**{f.name: getattr(self, f.name).detach() for f in fields(self)})


def packed_losses(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    states: torch.Tensor,
    classes: torch.Tensor,
    head: Head,
    grammar: Grammar,
    structure: StructureLoss,
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
        structure: what is added to the cross-entropy.
        chunk: rows of logits.

    Raises:
        ValueError: `chunk` is less than 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; it has to be at least 1 row of logits")
    rows = (targets != IGNORE).nonzero()[:, 0]
    illegal = _IllegalIds.of(grammar, hidden.device)

    def sums(hidden: torch.Tensor, targets: torch.Tensor, states: torch.Tensor, classes: torch.Tensor) -> LossSums:
        inputs = (hidden, targets, states, head, illegal, structure.kind)
        cross_entropy, term = checkpoint(_entropies, *inputs, use_reentrant=False)
        return _sums(cross_entropy, term, classes, structure)

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
    kind: Kind,
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
    term = _structure_term(kind, allowed, forbidden)
    return cross_entropy, term.where(illegal.allow(targets, states), 0.0)


def _structure_term(kind: Kind, allowed: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Returns the term of each row, [n].

    Both are sums of log sigmoids, since 1 - p_i = sigmoid(log-sum-exp of the other logits - z_i) as well. That is
    accurate in single precision at any mass, and so are the gradients. 1 minus a probability would not be: where
    nearly all mass is illegal it is rounding error.

    Args:
        kind: which term.
        allowed: log-sum-exp of the legal logits, [n].
        forbidden: the illegal logits, [n, width].
    """
    if kind == "mass":
        return -logsigmoid(allowed - forbidden.logsumexp(-1))
    if kind == "unlikelihood":
        same = torch.eye(forbidden.shape[-1], dtype=torch.bool, device=forbidden.device)
        others = forbidden[:, None, :].masked_fill(same, torch.finfo(forbidden.dtype).min).logsumexp(-1)
        return -logsigmoid(torch.logaddexp(allowed[:, None], others) - forbidden).sum(-1)
    return torch.zeros_like(allowed)


def _sums(cross_entropy: torch.Tensor, term: torch.Tensor, classes: torch.Tensor, structure: StructureLoss) -> LossSums:
    weights = torch.where(classes == int(TokenClass.MARKER), structure.marker_weight, 1.0).to(cross_entropy.dtype)
    member = torch.nn.functional.one_hot(classes, len(TokenClass))
    return LossSums(
        objective=(weights * cross_entropy).sum() + structure.weight * term.sum(),
        cross_entropy=(member * cross_entropy.detach()[:, None]).sum(0),  # a matrix product would round under autocast
        structure=term.detach().sum(),
        counts=member.sum(0),
    )
