"""From compiled plans to packed training batches.

A row holds several documents one behind the other. They cannot see each other because no death reaches beyond the end
of its document; a document that does not fit is cut, which is exact, since the beginning of a plan is the plan of the
beginning of the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from hcot_lmeval.masks import dense_mask
from hcot_lmeval.trace import IGNORE, Plan


@dataclass
class Row:
    """One packed row; the lists have one length, at most that of the row."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    death: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def append(self, plan: Plan, room: int) -> None:
        """Adds the first `room` tokens of `plan`."""
        start = len(self.ids)
        end = min(start + room, start + len(plan))
        self.ids += plan.ids[:room]
        self.positions += plan.positions[:room]
        self.death += [min(start + death, end) for death in plan.death[:room]]
        self.targets += plan.targets[:room]

    def pad(self, length: int, pad_id: int) -> None:
        """Fills the row with tokens that see themselves alone and predict nothing."""
        start, missing = len(self.ids), length - len(self.ids)
        self.ids += [pad_id] * missing
        self.positions += [0] * missing
        self.death += range(start + 1, length + 1)
        self.targets += [IGNORE] * missing


def pack(plans: Iterable[Plan], length: int, min_room: int = 32) -> Iterator[Row]:
    """Yields rows of at most `length` tokens that hold `plans` in their order.

    A row is closed when fewer than `min_room` tokens are left in it: a stump of a document is mostly prompt, on which
    there is no loss.
    """
    row = Row()
    for plan in plans:
        row.append(plan, length - len(row.ids))
        if length - len(row.ids) < min_room:
            yield row
            row = Row()
    if row.ids:
        yield row


def collate(rows: Iterable[Row], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Pads the rows to `length` and returns them as a batch for a transformers causal LM.

    Returns:
        input_ids, position_ids and shift_labels, [B, T], and attention_mask, bool [B, 1, T, T];
        ``shift_labels[b, t]`` is the target of token t, or -100.
    """
    rows = list(rows)
    for row in rows:
        row.pad(length, pad_id)
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "position_ids": torch.tensor([row.positions for row in rows]),
        "shift_labels": torch.tensor([row.targets for row in rows]),
        "attention_mask": dense_mask(torch.tensor([row.death for row in rows])),
    }
