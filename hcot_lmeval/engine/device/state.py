"""The rule of `hcot_lmeval.trace` as tensor arithmetic: what a device has to know of every row, and one token's effect.

A row is a line of small integers, `RowState`. One step reads the lines of the rows that take part, computes new ones
with static shapes and writes them back; nothing is read by the host. The host follows by feeding the emitted tokens to
the same `LiveContext` as ever, and the two never disagree (the tests hold them against each other).

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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hcot_lmeval.engine.rows import Request
from hcot_lmeval.engine.sampling import derive_seed, signed
from hcot_lmeval.engine.slots import Span, drop_spans, upload
from hcot_lmeval.markup import MarkerIds
from hcot_lmeval.trace import Policy

NOTHING = -1
"""Emitted by a row that forwards a solution again, or waits for the host."""
ENDED = -2
"""Emitted by a row that has ended."""


class RowState(NamedTuple):
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

    length: Tensor
    left: Tensor
    gap: Tensor
    next: Tensor
    cut: Tensor
    generated: Tensor
    depth: Tensor
    done: Tensor
    hold: Tensor

    @property
    def runs(self) -> Tensor:
        """Whether a row takes part in a step: bool [rows]."""
        return (self.done | self.hold) == 0


class RowLimits(NamedTuple):
    """What stays the same from the first to the last token of a row; each is int64, [rows].

    Attributes:
        prompt: tokens of the prompt.
        max_gen: most tokens to generate.
        min_gen: end tokens may not come before so many.
        seed: of the sample, as the int64 with its bits.
        top_k: 0 if it is off.
        forced: how many tokens are forced.
    """

    prompt: Tensor
    max_gen: Tensor
    min_gen: Tensor
    seed: Tensor
    top_k: Tensor
    forced: Tensor


class SamplingRows(NamedTuple):
    """The settings of sampling that are not whole numbers; float64, [rows]. A temperature of 0 is greedy."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor


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

    rows: Tensor
    slots: Tensor
    first: Tensor
    places: Tensor
    tokens: Tensor
    positions: Tensor


class Closing(NamedTuple):
    """What a token does to the blocks of a row.

    Attributes:
        depth: open blocks after it.
        prunes: whether it closes a block whose live span [start, stop) leaves: bool [rows].
        start: of the span.
        stop: of the span.
        vanishes: 1 if the closing marker leaves too, in every row alike.
    """

    depth: Tensor
    prunes: Tensor
    start: Tensor
    stop: Tensor
    vanishes: int


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


def on(device: torch.device) -> AbstractContextManager[Any]:
    """While it is open, `device` is where kernels go that name none: Triton's, and the events of streams."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        states: the lines of `RowState`, int64 [slots + 1, fields].
        limits: the lines of `RowLimits`.
        sampling: the lines of `SamplingRows`.
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
        self.states = self._zeros(len(RowState._fields))
        self.states[:, RowState._fields.index("done")] = 1
        self.limits = self._zeros(len(RowLimits._fields))
        self.sampling = self._zeros(len(SamplingRows._fields)).double()
        self.ends, self.forced = self._zeros(ends) - 1, self._zeros(forced)
        self.opens, self.splits = self._zeros(length + 1), self._zeros(length + 1)

    def _zeros(self, columns: int) -> Tensor:
        return torch.zeros(self.scratch + 1, columns, dtype=torch.int64, device=self.device)

    # --- in the order of the stream, by the host ----------------------------------------------------------------------

    def begin(self, slot: int, request: Request, ends: Sequence[int], sample: int = 0) -> None:
        """Puts a row into a slot whose prompt is forwarded; `advance` with its logits' token is due next.

        Args:
            slot: its slot.
            request: its request.
            ends: ids that end it.
            sample: which sample of the request it is.
        """
        prompt, params, forced = request.prompt_ids, request.params, request.forced_ids
        self._write(self.ids[slot], 0, prompt)
        if self.positions is not None:
            self._write(self.positions[slot], 0, range(len(prompt)))
        self._write(self.states[slot], 0, [len(prompt) - 1, 1, 0, prompt[-1], 0, 0, 0, 0, 0])
        seed = signed(derive_seed(params.seed, sample))
        limits = [len(prompt), params.max_gen_toks, params.min_gen_toks, seed, params.top_k, len(forced)]
        self._write(self.limits[slot], 0, limits)
        self._write(self.sampling[slot], 0, [params.temperature, params.top_p, params.min_p])
        self._write(self.ends[slot], 0, [*ends, *[-1] * (self.ends.shape[1] - len(ends))])
        self._write(self.forced[slot], 0, forced)

    def end(self, slot: int) -> None:
        """Ends the row in a slot."""
        self.states[slot, RowState._fields.index("done")] = 1

    def skip(self, slot: int, ids: Sequence[int], length: int) -> None:
        """The last tokens of a solution, `ids` from place `length` on, are forwarded; `advance` is due next."""
        last = length + len(ids) - 1
        self._write(self.ids[slot], length, ids)
        self._write(self.states[slot], 0, [last, 1, 0, ids[-1]])

    def drop(self, slot: int, spans: Sequence[Span], length: int) -> None:
        """Removes spans of tokens of a slot that holds `length`."""
        for tensor in (self.ids, self.positions):
            if tensor is not None:
                drop_spans(tensor[slot], spans, length)

    def release(self, slot: int) -> None:
        """Lets a row go on that waited for its keys and values."""
        self.states[slot, RowState._fields.index("hold")] = 0

    def _write(self, row: Tensor, first: int, values: Sequence[int] | Sequence[float]) -> None:
        if len(values):
            row[first : first + len(values)].copy_(upload(values, row.dtype, self.device), non_blocking=True)

    # --- in a step ----------------------------------------------------------------------------------------------------

    def read(self, rows: Tensor) -> RowState:
        """The lines of `rows`, int64 [n]."""
        return RowState(*self.states[rows].unbind(1))

    def constants(self, rows: Tensor) -> RowLimits:
        """What does not change in `rows`, int64 [n]."""
        return RowLimits(*self.limits[rows].unbind(1))

    def feed(self, rows: Tensor) -> Feed:
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

    def advance(self, rows: Tensor, tokens: Tensor) -> Tensor:
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
        self.states[rows] = torch.where(runs[:, None], after, torch.stack([*row], 1))
        emitted = torch.where(sampled & runs, tokens, NOTHING)
        return torch.where(row.done > 0, ENDED, emitted)

    def _rule(
        self, rows: Tensor, tokens: Tensor, live: Tensor, row: RowState, constants: RowLimits, writes: Tensor
    ) -> tuple[RowState, Tensor]:
        """The row when its token is appended, and whether the token fits. Only rows that `writes` get new places."""
        zero, one = torch.zeros_like(live), torch.ones_like(live)
        after = row._replace(length=live, left=one, gap=zero, next=tokens, cut=zero, generated=row.generated + 1)
        fits = live < self.rule.context
        if self.rule.policy is Policy.OFF:
            return after, fits
        found = self.follow(rows, tokens, live, row, writes)
        after = after._replace(depth=found.depth)
        if self.rule.policy is Policy.EVICT:
            fits &= constants.prompt + row.generated < self.rule.position
            return after._replace(cut=torch.where(found.prunes, found.stop - found.start + found.vanishes, zero)), fits
        return self._rewound(rows, tokens, live, after, found, writes), fits | found.prunes

    def follow(self, rows: Tensor, tokens: Tensor, live: Tensor, row: RowState, writes: Tensor) -> Closing:
        """Pushes, sets or pops the stack of open blocks, as `LiveContext.push` does."""
        marks = self._marks
        top = (row.depth - 1).clamp_min(0)
        opened, split = self.opens[rows, top], self.splits[rows, top]
        inside = row.depth > 0
        opens = (tokens == marks.open) & (marks.nested | ~inside)
        splits, closes = (tokens == marks.split) & inside, (tokens == marks.close) & inside
        place = torch.where(opens, row.depth, top)
        self.opens[rows, place] = torch.where(opens & writes, live, self.opens[rows, place])
        new = torch.where(opens, NOTHING, torch.where(splits, live, split))
        self.splits[rows, place] = torch.where(writes, new, self.splits[rows, place])
        start, stop = opened + ("open" in marks.keep), split + ("split" not in marks.keep)
        empty = (start == stop) & ("close" in marks.keep)
        depth = row.depth + opens.long() - closes.long()
        return Closing(depth, closes & (split >= 0) & ~empty, start, stop, int("close" not in marks.keep))

    def _rewound(
        self, rows: Tensor, tokens: Tensor, live: Tensor, after: RowState, found: Closing, writes: Tensor
    ) -> RowState:
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
