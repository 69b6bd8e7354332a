"""The rule of `hcot_lmeval.trace` as tensor arithmetic: what a device has to know of every row, and one token's effect.

A row is a line of small integers, `Moving`. One step reads the lines of the rows that take part, computes new ones with
static shapes and writes them back; nothing is read by the host. The host follows by feeding the emitted tokens to the
same `LiveContext` as ever, and the two never disagree (the tests hold them against each other).

``recompute``  A return that prunes sets `length` back. The solution is forwarded again in place: while `gap` is not 0
               the token at `length` is the one `gap` places above it, and what is sampled counts only at the last of
               the `left` tokens.
``evict``      The return is forwarded with the thought in sight; the next step takes `cut` off `length` and holds the
               row until the host has moved the keys and values. A move within the step would need a fixed number of
               rows and two more kernels a layer in every step, for something that happens once in hundreds of tokens.
``off``        Only the ends are looked at.

The stack of open blocks has a place for every live token, so it cannot overflow: each open block holds its marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hcot_lmeval.engine.device.fields import ENDED, NOTHING, Feed, Fixed, Moving, Rule, Start, Warmth, upload
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import Policy


class State:
    """All rows of a device, one for each slot, and a last one without a slot, for padding, that has always ended.

    Args:
        slots: rows.
        length: live tokens that a slot can hold.
        rule: see `Rule`.
        device: where the tensors are.
        ends: most ids that end a row.
        forced: most forced tokens of a row.
        positions: keep the position of every live token (sliding windows under ``evict`` need it).

    Attributes:
        scratch: the line of padding.
        ids: live tokens, int64 [slots + 1, length + 2]; those at `length` and above are on their way into the slot: a
            return that prunes a full context, and what a row that has ended would write next.
        positions: their position ids, or None.
        moving: the lines of `Moving`, int64 [slots + 1, fields].
        fixed: the lines of `Fixed`.
        warmth: the lines of `Warmth`.
        ends: int64 [slots + 1, ends], filled up with -1.
        forced: int64 [slots + 1, forced].
    """

    def __init__(
        self,
        slots: int,
        length: int,
        rule: Rule,
        device: torch.device,
        *,
        ends: int = 0,
        forced: int = 0,
        positions: bool = False,
    ) -> None:
        self.scratch, self.length, self.rule, self.device = slots, length, rule, device
        self.ids = self._zeros(length + 2)
        self.positions = self._zeros(length + 2) if positions else None
        self.moving = self._zeros(len(Moving._fields))
        self.moving[:, Moving._fields.index("done")] = 1
        self.fixed = self._zeros(len(Fixed._fields))
        self.warmth = self._zeros(len(Warmth._fields)).double()
        self.ends, self.forced = self._zeros(ends) - 1, self._zeros(forced)
        self._opens, self._splits = self._zeros(length + 1), self._zeros(length + 1)

    def _zeros(self, columns: int) -> torch.Tensor:
        return torch.zeros(self.scratch + 1, columns, dtype=torch.int64, device=self.device)

    # --- in the order of the stream, by the host ----------------------------------------------------------------------

    def begin(self, slot: int, start: Start) -> None:
        """Puts a row into a slot whose prompt is forwarded; `advance` with its logits' token is due next."""
        tokens = len(start.prompt_ids)
        self._write(self.ids[slot], 0, start.prompt_ids)
        if self.positions is not None:
            self._write(self.positions[slot], 0, range(tokens))
        self._write(self.moving[slot], 0, [tokens - 1, 1, 0, start.prompt_ids[-1], 0, 0, 0, 0, 0])
        fixed = [tokens, start.max_gen, start.min_gen, start.seed, start.top_k, len(start.forced)]
        self._write(self.fixed[slot], 0, fixed)
        self._write(self.warmth[slot], 0, start.warmth)
        self._write(self.ends[slot], 0, [*start.ends, *[-1] * (self.ends.shape[1] - len(start.ends))])
        self._write(self.forced[slot], 0, start.forced)

    def end(self, slot: int) -> None:
        """Ends the row in a slot."""
        self.moving[slot, Moving._fields.index("done")] = 1

    def skip(self, slot: int, ids: Sequence[int], length: int) -> None:
        """The last tokens of a solution, `ids` from place `length` on, are forwarded; `advance` is due next."""
        last = length + len(ids) - 1
        self._write(self.ids[slot], length, ids)
        self._write(self.moving[slot], 0, [last, 1, 0, ids[-1]])

    def drop(self, slot: int, start: int, stop: int, length: int) -> None:
        """Removes the places [start, stop) of a slot that holds `length` tokens."""
        for tensor in (self.ids, self.positions):
            if tensor is not None:
                tensor[slot, start : start + length - stop] = tensor[slot, stop:length].clone()

    def release(self, slot: int) -> None:
        """Lets a row go on that waited for its keys and values."""
        self.moving[slot, Moving._fields.index("hold")] = 0

    def _write(self, row: torch.Tensor, first: int, values: Sequence[int] | Sequence[float]) -> None:
        if len(values):
            row[first : first + len(values)].copy_(upload(values, row.dtype, self.device), non_blocking=True)

    # --- in a step ----------------------------------------------------------------------------------------------------

    def read(self, rows: torch.Tensor) -> Moving:
        """The lines of `rows`, int64 [n]."""
        return Moving(*self.moving[rows].unbind(1))

    def constants(self, rows: torch.Tensor) -> Fixed:
        """What stays in `rows`, int64 [n]."""
        return Fixed(*self.fixed[rows].unbind(1))

    def feed(self, rows: torch.Tensor) -> Feed:
        """What each of `rows` forwards now. Rows that do not run write where nobody reads: behind the last place."""
        row = self.read(rows)
        runs = row.runs
        places = torch.where(runs, row.length, self.length)
        source = torch.where(runs, row.length + row.gap, 0)
        tokens = torch.where(row.gap > 0, self.ids[rows, source], row.next)
        positions = torch.where(runs, row.length, 0)
        if self.rule.policy is Policy.EVICT:
            positions = torch.where(runs, self.constants(rows).prompt + row.generated - 1, 0)
        self.ids[rows, places] = tokens
        if self.positions is not None:
            self.positions[rows, places] = positions
        first = torch.where(runs, 0, places)
        return Feed(rows, rows.clamp_max(self.scratch - 1), first, places, tokens, positions)

    def advance(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What was fed is in the slots, and `tokens`, int64 [n], were sampled from the outputs.

        Returns:
            What each row emits: the token, even if it does not fit into the context and ends the row; or `NOTHING`, or
            `ENDED`.
        """
        row, constants = self.read(rows), self.constants(rows)
        runs, sampled = row.runs, row.left == 1
        live = row.length + 1 - row.cut
        forwarded = row._replace(length=live, left=row.left - 1, hold=(row.cut > 0).long())
        appended, fits = self._rule(rows, tokens, live, row, constants, runs & sampled)
        ended = (self.ends[rows] == tokens[:, None]).any(1) | (appended.generated >= constants.max_gen)
        appended = appended._replace(done=(ended | ~fits).long(), hold=forwarded.hold)
        after = torch.where(sampled[:, None], torch.stack([*appended], 1), torch.stack([*forwarded], 1))
        self.moving[rows] = torch.where(runs[:, None], after, torch.stack([*row], 1))
        emitted = torch.where(sampled & runs, tokens, NOTHING)
        return torch.where(row.done > 0, ENDED, emitted)

    def _rule(
        self,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        live: torch.Tensor,
        row: Moving,
        constants: Fixed,
        writes: torch.Tensor,
    ) -> tuple[Moving, torch.Tensor]:
        """The row when its token is appended, and whether the token fits. Only rows that `writes` get new places."""
        zero, one = torch.zeros_like(live), torch.ones_like(live)
        after = row._replace(length=live, left=one, gap=zero, next=tokens, cut=zero, generated=row.generated + 1)
        fits = live < self.rule.context
        if self.rule.policy is Policy.OFF:
            return after, fits
        found = self._follow(rows, tokens, live, row, writes)
        after = after._replace(depth=found.depth)
        if self.rule.policy is Policy.EVICT:
            fits &= constants.prompt + row.generated < self.rule.position
            return after._replace(cut=torch.where(found.prunes, found.stop - found.start + found.vanishes, zero)), fits
        return self._rewound(rows, tokens, live, after, found, writes), fits | found.prunes

    def _follow(
        self, rows: torch.Tensor, tokens: torch.Tensor, live: torch.Tensor, row: Moving, writes: torch.Tensor
    ) -> Found:
        """Pushes, sets or pops the stack of open blocks, as `LiveContext.push` does."""
        marks = self._marks
        top = (row.depth - 1).clamp_min(0)
        opened, split = self._opens[rows, top], self._splits[rows, top]
        inside = row.depth > 0
        opens = (tokens == marks.open) & (marks.nested | ~inside)
        splits, closes = (tokens == marks.split) & inside, (tokens == marks.close) & inside
        place = torch.where(opens, row.depth, top)
        self._opens[rows, place] = torch.where(opens & writes, live, self._opens[rows, place])
        new = torch.where(opens, NOTHING, torch.where(splits, live, split))
        self._splits[rows, place] = torch.where(writes, new, self._splits[rows, place])
        start, stop = opened + ("open" in marks.keep), split + ("split" not in marks.keep)
        empty = (start == stop) & ("close" in marks.keep)
        depth = row.depth + opens.long() - closes.long()
        return Found(depth, closes & (split >= 0) & ~empty, start, stop, int("close" not in marks.keep))

    def _rewound(
        self,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        live: torch.Tensor,
        after: Moving,
        found: Found,
        writes: torch.Tensor,
    ) -> Moving:
        """The row as ``recompute`` leaves it: what survives behind the thought is forwarded again."""
        self.ids[rows, live] = torch.where(writes, tokens, self.ids[rows, live])  # a return that survives is read too
        left = live + (1 - found.vanishes) - found.stop
        nothing = left == 0  # then the last token before the thought is read again, for an output to sample from
        before = (found.start - 1).clamp_min(0)
        length = torch.where(nothing, before, found.start)
        gap = torch.where(nothing, 0, found.stop - found.start)
        following = torch.where(nothing, self.ids[rows, before], tokens)
        return after._replace(
            length=torch.where(found.prunes, length, after.length),
            left=torch.where(found.prunes, left.clamp_min(1), after.left),
            gap=torch.where(found.prunes, gap, after.gap),
            next=torch.where(found.prunes, following, after.next),
        )

    @property
    def _marks(self) -> MarkerIds:
        assert self.rule.markers is not None, "policies that prune have markers"
        return self.rule.markers


class Found(NamedTuple):
    """What a token does to the blocks of a row.

    Attributes:
        depth: open blocks after it.
        prunes: whether it closes a block whose live span [start, stop) leaves: bool [rows].
        start: of the span.
        stop: of the span.
        vanishes: 1 if the closing marker leaves too, in every row alike.
    """

    depth: torch.Tensor
    prunes: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    vanishes: int
