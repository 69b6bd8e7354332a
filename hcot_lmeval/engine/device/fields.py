"""What a device knows of each row, field by field, and how it gets there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import Policy

NOTHING = -1
"""Emitted by a row that forwards a solution again, or waits for the host."""
ENDED = -2
"""Emitted by a row that has ended."""


class Moving(NamedTuple):
    """What changes with the tokens of a row; each is int64, [rows] when read from a `State`.

    Attributes:
        length: live tokens whose keys and values are in the slot.
        left: tokens to forward before the next one is sampled, at least 1.
        gap: distance of the tokens to forward from their place; 0 unless a solution is forwarded again.
        next: the token to forward when `gap` is 0.
        cut: live tokens that leave with the next forward (``evict``).
        generated: tokens.
        depth: open blocks.
        done: 1 for a row that has ended.
        hold: 1 for a row that waits for the host to move its keys and values.
    """

    length: torch.Tensor
    left: torch.Tensor
    gap: torch.Tensor
    next: torch.Tensor
    cut: torch.Tensor
    generated: torch.Tensor
    depth: torch.Tensor
    done: torch.Tensor
    hold: torch.Tensor

    @property
    def runs(self) -> torch.Tensor:
        """Whether a row takes part in a step: bool [rows]."""
        return (self.done | self.hold) == 0


class Fixed(NamedTuple):
    """What stays as it is from the first to the last token of a row; each is int64, [rows].

    Attributes:
        prompt: tokens of the prompt.
        max_gen: most tokens to generate.
        min_gen: end tokens may not come before so many.
        seed: of the sample, as the int64 with its bits.
        top_k: 0 if it is off.
        forced: how many tokens are forced.
    """

    prompt: torch.Tensor
    max_gen: torch.Tensor
    min_gen: torch.Tensor
    seed: torch.Tensor
    top_k: torch.Tensor
    forced: torch.Tensor


class Warmth(NamedTuple):
    """The settings of sampling that are not whole numbers; float64, [rows]. A temperature of 0 is greedy."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True)
class Rule:
    """What holds for all rows.

    Attributes:
        policy: what a closing marker does.
        markers: the notation; None only with policy ``off``.
        context: most live tokens.
        position: a trace stays shorter than this under ``evict``.
    """

    policy: Policy
    markers: MarkerIds | None
    context: int
    position: int


@dataclass(frozen=True)
class Start:
    """A row as it begins, its prompt in the slot but for the last token's output.

    Attributes:
        prompt_ids: the prompt.
        max_gen: see `Fixed`, as for the next three.
        min_gen: .
        seed: .
        top_k: .
        warmth: temperature, top_p, min_p.
        ends: ids that end the row.
        forced: the first tokens to generate.
    """

    prompt_ids: Sequence[int]
    max_gen: int
    min_gen: int = 0
    seed: int = 0
    top_k: int = 0
    warmth: tuple[float, float, float] = (0.0, 1.0, 0.0)
    ends: Sequence[int] = ()
    forced: Sequence[int] = ()


class Feed(NamedTuple):
    """What the rows of a step forward; each int64 [n].

    Attributes:
        rows: their lines.
        slots: where their keys and values are.
        first: 0; for a row that does not run, its place.
        places: where the new ones go, which is the number of live tokens before it.
        tokens: their ids.
        positions: their position ids.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    first: torch.Tensor
    places: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor


def on(device: torch.device) -> AbstractContextManager[Any]:
    """While it is open, `device` is where kernels go that name none: Triton's, and the events of streams."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor on `device` without a wait: from pinned memory, which its allocator keeps until the copy is done."""
    tensor = torch.tensor(list(values), dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
