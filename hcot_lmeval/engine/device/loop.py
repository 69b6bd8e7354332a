"""The device's loop: the host queues steps, listens to what they emitted some steps ago, and feeds it to its rows.

The device decides by itself which token comes, what it prunes and when a row ends. The host repeats every decision with
the `Row` of its own loop, from the emitted tokens alone, and so has the same events, statistics and texts. What only
the host knows (a stop string, a loop) ends a row late: what the device emitted meanwhile is not heard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hcot_lmeval.engine.device.attention import attached
from hcot_lmeval.engine.device.fields import ENDED, NOTHING, Start, on, upload
from hcot_lmeval.engine.device.graphs import WARM_UP, Runner
from hcot_lmeval.engine.device.program import Program
from hcot_lmeval.engine.device.readback import Readback
from hcot_lmeval.engine.rows import Row
from hcot_lmeval.engine.sampling import Choice, derive_seed, signed
from hcot_lmeval.engine.scheduler import Scheduler
from hcot_lmeval.engine.slots import Chunk
from hcot_lmeval.trace import Policy, Step

Accept = Callable[[Row, Choice], Step | None]
"""Gives a row its next token."""


@dataclass
class _Prune:
    """A return that the device has emitted.

    Attributes:
        step: what it does.
        at: steps of its row before it is forwarded, or forwarded again.
        length: tokens in the slot before spans are dropped (``evict``).
    """

    step: Step
    at: int
    length: int


@dataclass(eq=False)
class _Seat:
    """A row on the device.

    Attributes:
        row: the host's own.
        queued: steps that it takes part in, queued so far.
        heard: how many of them the host has heard of.
        prunes: returns that the host still has a part in.
    """

    row: Row
    queued: int = 0
    heard: int = 0
    prunes: list[_Prune] = field(default_factory=list)


class DeviceLoop:
    """Steps the rows of a scheduler on the device.

    Args:
        program: what runs there.
        runner: how it is run.
        scheduler: admits and retires rows.
        accept: gives a row its next token.
        step_tokens: most prompt tokens forwarded at once.
        chunks: forward solutions in one piece; otherwise token by token beside the other rows.
        run_ahead: most steps that are queued and not heard of; 1 waits for each.
    """

    def __init__(
        self,
        program: Program,
        runner: Runner,
        scheduler: Scheduler,
        accept: Accept,
        *,
        step_tokens: int,
        chunks: bool,
        run_ahead: int,
    ) -> None:
        self.program, self.runner, self.scheduler, self._accept = program, runner, scheduler, accept
        self._step_tokens, self._chunks = step_tokens, chunks
        self._steps_at_once, self._behind = max(1, run_ahead // 2), int(run_ahead > 1)
        self._seats: list[_Seat] = []
        self._seated: list[_Seat] = []
        self._steps: list[list[_Seat]] = []  # who took part in the steps that the host has not heard of
        self._tick = 0
        self._readback = Readback(program.log.emitted)

    @staticmethod
    def lines(run_ahead: int) -> int:
        """Lines of the log that such a loop needs.

        Two rounds of steps, each behind one over prompts and solutions, and what warming up writes before a capture.
        """
        return 2 * (max(1, run_ahead // 2) + 1) + WARM_UP

    @contextmanager
    def attached(self) -> Iterator[None]:
        """To be open while it steps."""
        with on(self.program.state.device), attached(self.program.decoder, self.program.context):
            yield

    @torch.no_grad()  # not inference mode, in which torch 2.11 does not compile a step
    def step(self) -> None:
        """Queues some steps and listens to earlier ones; rows that have ended are marked `finished`."""
        first = self._tick
        self._move()
        self._forward_known()
        if self._seats:
            self._run()
        if self._tick > first:
            self._readback.start(first, self._tick - first)
        for emitted in self._readback.finished(self._behind if self._seats else 0):
            self._hear(emitted)
        self._leave()

    # --- queueing -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._seated != self._seats:
            self._seated = list(self._seats)
            self.runner.seat([seat.row.slot for seat in self._seats])
        for _ in range(self._steps_at_once):
            self.runner.run()
            self._queued(self._seated)

    def _queued(self, seats: list[_Seat]) -> None:
        self._tick += 1
        self._steps.append(list(seats))
        for seat in seats:
            seat.queued += 1

    def _forward_known(self) -> None:
        """Forwards what the host knows: prompts, and the solutions that are read again."""
        planned = [*self._solutions(), *self._prompts()]
        if not planned:
            return
        logits = self.program.forward([chunk for _, chunk in planned])
        complete = []
        for index, (seat, chunk) in enumerate(planned):
            if seat in self._seats:
                self.program.state.skip(chunk.slot, chunk.ids, chunk.start)
                complete.append((index, seat))
            elif self._is_read(seat.row, len(chunk.ids)):
                self.program.state.begin(chunk.slot, start_of(seat.row))
                self._seats.append(seat)
                complete.append((index, seat))
        if complete:
            self._offer(logits, complete)

    def _offer(self, logits: torch.Tensor, complete: list[tuple[int, _Seat]]) -> None:
        device = self.program.state.device
        slots = upload([seat.row.slot for _, seat in complete], torch.int64, device)
        self.program.offer(slots, logits[upload([index for index, _ in complete], torch.int64, device)])
        self._queued([seat for _, seat in complete])

    def _prompts(self) -> list[tuple[_Seat, Chunk]]:
        """Pieces of the prompts that rows without a seat still have to read, short ones first."""
        waiting = sorted((r for r in self.scheduler.rows if r.reads_prompt), key=lambda row: row.waiting_tokens)
        planned, budget = [], self._step_tokens
        for row in waiting:
            if budget <= 0:
                break
            chunk = row.next_chunk(budget)
            budget -= len(chunk.ids)
            planned.append((_Seat(row), chunk))
        return planned

    @staticmethod
    def _is_read(row: Row, tokens: int) -> bool:
        row.forwarded(tokens)
        return row.needs_token

    def _solutions(self) -> list[tuple[_Seat, Chunk]]:
        """What rows that pruned have still to forward again, beyond what the queued steps forward one by one."""
        planned = []
        for seat in self._seats if self._chunks and self._policy is Policy.RECOMPUTE else ():
            for prune in seat.prunes:
                step, replayed = prune.step, seat.queued - prune.at
                rest, start = step.forward[replayed:], step.rewind + replayed
                if len(rest) > 1:  # one token is as well forwarded beside the other rows
                    planned.append((seat, Chunk(seat.row.slot, start, rest, range(start + len(rest)))))
            seat.prunes.clear()
        return planned

    def _move(self) -> None:
        """Under ``evict``: drops the thoughts whose returns are forwarded, and lets their rows go on."""
        for seat in self._seats if self._policy is Policy.EVICT else ():
            if seat.prunes and seat.queued > seat.prunes[0].at:
                prune, slot = seat.prunes.pop(0), seat.row.slot
                length = prune.length
                for start, stop in reversed(prune.step.drop):
                    self.program.pool.drop(slot, start, stop, length)
                    self.program.state.drop(slot, start, stop, length)
                    length -= stop - start
                self.program.state.release(slot)
                for later in seat.prunes:
                    later.at = seat.queued

    @property
    def _policy(self) -> Policy:
        return self.program.state.rule.policy

    # --- listening ----------------------------------------------------------------------------------------------------

    def _hear(self, emitted: list[int]) -> None:
        """Gives the rows of the oldest unheard step what they emitted."""
        for seat in self._steps.pop(0):
            seat.heard += 1
            if not seat.row.finished:
                self._take(seat, emitted[seat.row.slot])

    def _take(self, seat: _Seat, token: int) -> None:
        if token == ENDED:
            raise RuntimeError(
                f"the device ended request {seat.row.request.id!r} after {len(seat.row.generated)} tokens and the host "
                "did not; this is a defect of hcot_lmeval. loop='host' does without the device's loop"
            )
        if token == NOTHING:
            return
        step = self._accept(seat.row, Choice(token))
        if step is None or seat.row.finished:
            return
        seat.row.forwarded(len(step.forward))
        if step.is_prune:
            length = len(seat.row.context.live) + sum(stop - start for start, stop in step.drop)
            if self._policy is Policy.RECOMPUTE:
                seat.prunes.clear()  # an earlier solution has been forwarded: it was needed for this token
            seat.prunes.append(_Prune(step, seat.heard, length))

    def _leave(self) -> None:
        """Ends the rows that the host has ended; the device may not know of it."""
        for seat in [seat for seat in self._seats if seat.row.finished]:
            self.program.state.end(seat.row.slot)
            self._seats.remove(seat)


def start_of(row: Row) -> Start:
    """What the device has to know of a row whose prompt is read."""
    params, ends = row.request.params, row.limits.eos_ids.union(row.request.params.stop_ids)
    return Start(
        row.request.prompt_ids,
        params.max_gen_toks,
        params.min_gen_toks,
        signed(derive_seed(params.seed, row.sample)),
        params.top_k,
        (params.temperature, params.top_p, params.min_p),
        sorted(ends),
        row.request.forced_ids,
    )
