"""The device's loop: the host queues steps, reads what they emitted some steps ago, and feeds it to its rows.

The device decides by itself which token comes, what it prunes and when a row ends. The host repeats every decision with
the `Row` of its own loop, from the emitted tokens alone, and so has the same events, statistics and texts. What only
the host knows (a stop string, a loop) ends a row late: what the device emitted meanwhile is dropped. What the rows emit
is written to a log in the device's memory, which the host copies while the device goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.attention import Decode, Sdpa, handle_of
from hcot_lmeval.engine.device.choice import choose
from hcot_lmeval.engine.device.graphs import WARM_UP, Runner
from hcot_lmeval.engine.device.sampling import Sampler, kernel_for
from hcot_lmeval.engine.device.state import ENDED, NOTHING, Rule, State, on
from hcot_lmeval.engine.options import EngineOptions
from hcot_lmeval.engine.rows import Request, Row
from hcot_lmeval.engine.sampling import Choice
from hcot_lmeval.engine.scheduler import Scheduler
from hcot_lmeval.engine.slots import Chunk, KVPool, LayerSpec, upload
from hcot_lmeval.trace import Policy, Step

logger = logging.getLogger(__name__)

OnLogits = Callable[[Request, int, int, torch.Tensor], None]
"""Called with (request, sample, tokens generated so far, logits [vocabulary])."""
Accept = Callable[[Row, Choice], Step | None]
"""Gives a row its next token."""

FEW_ROWS = 4
"""Up to here the host reads after every step: there is little to queue, and a late ending wastes more."""
CHUNK_ROWS = 16
"""Up to here a solution is forwarded in one piece: token by token it would take a row's share of so many steps."""
RUN_AHEAD = 16
"""Steps queued before the host reads, on a device that runs beside it."""


class ScratchPool(KVPool):
    """A pool whose slots have one place more than a row may use: rows that do not run write there."""

    def __init__(self, layers: Mapping[int, LayerSpec], slots: int, length: int, **options: bool) -> None:
        super().__init__(layers, slots, length + 1, **options)


class _Copy(NamedTuple):
    """The log as it was when steps [first, first + steps) had written it; `done` is None if it is there already."""

    lines: torch.Tensor
    first: int
    steps: int
    done: torch.cuda.Event | None


class Log:
    """What every slot emitted in the last steps; the host copies it on a stream of its own.

    Args:
        lines: steps that it holds; step n writes line n modulo lines.
        slots: slots, and one for padding.
        device: where it lies.

    Attributes:
        emitted: int64 [lines, slots]: a token, `NOTHING` or `ENDED`; what a slot that took no part holds is `NOTHING`.
        tick: steps so far, int64 [1].
    """

    def __init__(self, lines: int, slots: int, device: torch.device) -> None:
        self.lines = lines
        self.emitted = torch.full((lines, slots), NOTHING, dtype=torch.int64, device=device)
        self.tick = torch.zeros(1, dtype=torch.int64, device=device)
        self._copies: deque[_Copy] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, rows: torch.Tensor, emitted: torch.Tensor) -> None:
        """Adds a line: `rows` and what they emitted, int64 [n]."""
        line = self.tick % self.lines
        self.emitted.index_fill_(0, line, NOTHING)
        self.emitted[line.expand_as(rows), rows] = emitted
        self.tick.add_(1)

    def copy(self, first: int, count: int) -> None:
        """Asks for the lines of the steps [first, first + count), whose kernels are queued."""
        if self._stream is None:
            self._copies.append(_Copy(self.emitted.clone(), first, count, None))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.emitted.device))
        lines = torch.empty(self.emitted.shape, dtype=self.emitted.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            lines.copy_(self.emitted, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self.emitted.record_stream(self._stream)
        self._copies.append(_Copy(lines, first, count, done))

    def read(self, behind: int) -> list[list[int]]:
        """Waits for all lines asked for but those of the last `behind` copies, and returns them, each once."""
        found: list[list[int]] = []
        while len(self._copies) > behind:
            copy = self._copies.popleft()
            if copy.done is not None:
                copy.done.synchronize()
            table = copy.lines.tolist()
            found += [table[step % self.lines] for step in range(copy.first, copy.first + copy.steps)]
        return found


@dataclass
class Program:
    """A model, its keys and values, and the state of their rows; all in memory that never moves.

    Attributes:
        decoder: the model.
        pool: its keys and values.
        state: of the rows.
        sampler: chooses tokens.
        backend: attends.
        log: what was emitted.
        tap: the logits behind the lines of the log, [lines, slots + 1, vocabulary], if anybody wants to see them.
    """

    decoder: Decoder
    pool: KVPool
    state: State
    sampler: Sampler
    backend: Sdpa
    log: Log
    tap: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._handle = handle_of(self.backend)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Has to be open while the program runs."""
        with on(self.state.device), self.decoder.attached():
            yield

    @torch.no_grad()
    def step(self, rows: torch.Tensor) -> None:
        """Forwards one token of each of `rows`, int64 [n], and samples what follows. To be called within `attached`."""
        self.offer(rows, self.logits(rows))

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Forwards one token of each of `rows` and returns what predicts the next: [n, vocabulary]."""
        feed, decoder = self.state.feed(rows), self.decoder
        decoder.running.step = Decode(feed, self.pool, self._handle, self.state.positions)
        return decoder.call(feed.tokens[:, None], feed.positions[:, None])[:, 0]

    def offer(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Samples for `rows` from the logits of what was forwarded last, [n, vocabulary], and writes the log."""
        tokens = self.sampler.choose(self.state, rows, logits)
        if self.tap is not None:
            self.tap[(self.log.tick % self.log.lines).expand_as(rows), rows] = logits
        self.log.write(rows, self.state.advance(rows, tokens))


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
class _Slot:
    """A row on the device.

    Attributes:
        row: the host's own.
        queued: steps that it takes part in, queued so far.
        read: how many of them the host has read.
        prunes: returns that the host still has a part in.
    """

    row: Row
    queued: int = 0
    read: int = 0
    prunes: list[_Prune] = field(default_factory=list)


class DeviceLoop:
    """Steps the rows of a scheduler on the device.

    Args:
        program: what runs there.
        runner: how it is run.
        scheduler: admits and retires rows, and plans prompts.
        accept: gives a row its next token.
        chunks: forward solutions in one piece; otherwise token by token beside the other rows.
        run_ahead: most steps that are queued and not read; 1 waits for each.
        on_logits: sees what the device saw before each token; the program then needs a `tap`.
    """

    def __init__(
        self,
        program: Program,
        runner: Runner,
        scheduler: Scheduler,
        accept: Accept,
        *,
        chunks: bool,
        run_ahead: int,
        on_logits: OnLogits | None = None,
    ) -> None:
        self._on_logits, self._line = on_logits, 0
        self.program, self.runner, self.scheduler, self._accept = program, runner, scheduler, accept
        self._policy, self._chunks = program.state.rule.policy, chunks
        self._steps_at_once, self._behind = max(1, run_ahead // 2), int(run_ahead > 1)
        self._slots: list[_Slot] = []
        self._batch: list[_Slot] = []  # whom the runner steps
        self._steps: list[list[_Slot]] = []  # who took part in the steps that the host has not read
        self._tick = 0

    @staticmethod
    def lines(run_ahead: int) -> int:
        """Lines of the log that such a loop needs.

        Two rounds of steps, each behind one over prompts and solutions, and what warming up writes before a capture.
        """
        return 2 * (max(1, run_ahead // 2) + 1) + WARM_UP

    @torch.no_grad()
    def step(self) -> None:
        """Queues some steps and reads earlier ones; rows that have ended are marked `finished`."""
        first, log = self._tick, self.program.log
        self._move()
        self._forward_known()
        if self._slots:
            self._run()
        if self._tick > first:
            log.copy(first, self._tick - first)
        for emitted in log.read(self._behind if self._slots else 0):
            for slot in self._steps.pop(0):
                slot.read += 1
                if not slot.row.finished:
                    self._take(slot, emitted[slot.row.slot])
            self._line = (self._line + 1) % log.lines
        self._leave()

    # --- queueing -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._batch != self._slots:
            self._batch = list(self._slots)
            self.runner.load([slot.row.slot for slot in self._slots])
        for _ in range(self._steps_at_once):
            self.runner.run()
            self._queued(self._batch)

    def _queued(self, slots: list[_Slot]) -> None:
        self._tick += 1
        self._steps.append(list(slots))
        for slot in slots:
            slot.queued += 1

    def _forward_known(self) -> None:
        """Forwards what the host knows: the solutions that are read again, and prompts."""
        program, solutions = self.program, self._solutions()
        prompts = [(_Slot(row), chunk) for row, chunk in self.scheduler.plan()]
        planned = [*solutions, *prompts]
        if not planned:
            return
        logits = program.decoder.forward(program.pool, [chunk for _, chunk in planned], program.backend.chunk)
        for _, chunk in solutions:
            program.state.skip(chunk.slot, chunk.ids, chunk.start)
        for slot, chunk in prompts:
            row = slot.row
            row.forwarded(len(chunk.ids))
            if row.needs_token:
                program.state.begin(row.slot, row.request, sorted(row.end_ids), row.sample)
                self._slots.append(slot)
        complete = [(index, slot) for index, (slot, _) in enumerate(planned) if slot.row.needs_token]
        if complete:
            device, ready = program.state.device, [slot for _, slot in complete]
            at = upload([index for index, _ in complete], torch.int64, device)
            program.offer(upload([slot.row.slot for slot in ready], torch.int64, device), logits[at])
            self._queued(ready)

    def _solutions(self) -> list[tuple[_Slot, Chunk]]:
        """What rows that pruned have still to forward again, beyond what the queued steps forward one by one."""
        planned = []
        for slot in self._slots if self._chunks and self._policy is Policy.RECOMPUTE else ():
            for prune in slot.prunes:
                step, replayed = prune.step, slot.queued - prune.at
                rest, start = step.forward[replayed:], step.rewind + replayed
                if len(rest) > 1:  # one token is as well forwarded beside the other rows
                    planned.append((slot, Chunk(slot.row.slot, start, rest, range(start + len(rest)))))
            slot.prunes.clear()
        return planned

    def _move(self) -> None:
        """Under ``evict``: drops the thoughts whose returns are forwarded, and lets their rows go on."""
        for slot in self._slots if self._policy is Policy.EVICT else ():
            if slot.prunes and slot.queued > slot.prunes[0].at:
                prune, at = slot.prunes.pop(0), slot.row.slot
                self.program.pool.drop(at, prune.step.drop, prune.length)
                self.program.state.drop(at, prune.step.drop, prune.length)
                self.program.state.release(at)
                for later in slot.prunes:
                    later.at = slot.queued

    # --- reading ------------------------------------------------------------------------------------------------------

    def _take(self, slot: _Slot, token: int) -> None:
        """Gives a row what it emitted in the oldest step that was not read."""
        row = slot.row
        if token == ENDED:
            raise RuntimeError(
                f"the device ended request {row.request.id!r} after {len(row.generated)} tokens and the host did not; "
                "this is a defect of hcot_lmeval. loop='host' does without the device's loop"
            )
        if token == NOTHING:
            return
        if self._on_logits is not None and self.program.tap is not None:
            self._on_logits(row.request, row.sample, len(row.generated), self.program.tap[self._line, row.slot])
        step = self._accept(row, Choice(token))
        if step is None or row.finished:
            return
        row.forwarded(len(step.forward))
        if step.is_prune:
            length = len(row.context.live) + sum(stop - start for start, stop in step.drop)
            if self._policy is Policy.RECOMPUTE:
                slot.prunes.clear()  # an earlier solution has been forwarded: it was needed for this token
            slot.prunes.append(_Prune(step, slot.read, length))

    def _leave(self) -> None:
        """Ends the rows that the host has ended; the device may not know of it."""
        for slot in [slot for slot in self._slots if slot.row.finished]:
            self.program.state.end(slot.row.slot)
            self._slots.remove(slot)


def make_loop(
    decoder: Decoder,
    options: EngineOptions,
    rule: Rule,
    scheduler: Scheduler,
    requests: Sequence[Request],
    accept: Accept,
    *,
    eos: int,
    on_logits: OnLogits | None = None,
) -> DeviceLoop:
    """Returns the loop of a scheduler whose pool is a `ScratchPool`.

    Args:
        decoder: the model.
        options: of the engine.
        rule: what holds for all rows.
        scheduler: of the requests.
        requests: all that it will admit.
        accept: gives a row its next token.
        eos: how many end tokens the model has.
        on_logits: sees the logits before each token, which takes memory for some steps of all rows.
    """
    pool, device, layers = scheduler.pool, decoder.device, list(decoder.layers.values())
    state = State(
        pool.slots,
        pool.length - 1,
        rule,
        device,
        ends=eos + max(len(r.params.stop_ids) for r in requests),
        forced=max(1, *(len(r.forced_ids) for r in requests)),
        positions=rule.policy is Policy.EVICT and any(layer.window is not None for layer in layers),
    )
    run_ahead = options.run_ahead or _run_ahead(pool.slots, device.type)
    log = Log(DeviceLoop.lines(run_ahead), pool.slots + 1, device)
    with on(device):
        backend = choose(layers, options.attention)
    kernel = None if options.compute == "torch" else kernel_for(device)
    program = Program(decoder, pool, state, Sampler.of(requests, decoder.vocabulary, device, kernel), backend, log)
    if on_logits is not None:
        shape = (log.lines, pool.slots + 1, decoder.vocabulary)
        program.tap = torch.zeros(shape, dtype=decoder.logits_dtype, device=device)
    runner = Runner(
        program.step,
        pool.slots,
        state.scratch,
        device,
        counter=log.tick,
        graphs=options.graphs and device.type == "cuda",
        compiled=options.compiled,
    )
    chunks = options.reforward == "chunk" or (options.reforward == "auto" and pool.slots <= CHUNK_ROWS)
    return DeviceLoop(program, runner, scheduler, accept, chunks=chunks, run_ahead=run_ahead, on_logits=on_logits)


def _run_ahead(slots: int, kind: str) -> int:
    if kind != "cuda":
        return 1
    return 2 if slots <= FEW_ROWS else RUN_AHEAD


def runs_on_device(decoder: Decoder, options: EngineOptions, requests: Sequence[Request], *, watched: bool) -> bool:
    """Whether the device's loop runs the steps; arguments as in `obstacles`.

    Raises:
        ValueError: it was asked for and cannot serve these requests.
    """
    if options.loop == "host" or (options.loop == "auto" and decoder.device.type != "cuda"):
        return False
    found = obstacles(decoder, options, requests, watched=watched)
    if found and options.loop == "device":
        raise ValueError(
            f"loop='device' cannot serve {', '.join(found)}; leave that out, or choose loop='auto', which takes the "
            "loop of the host where it has to"
        )
    if found:
        logger.info("the host runs the steps, since the device's loop cannot serve %s", ", ".join(found))
    return not found


def obstacles(decoder: Decoder, options: EngineOptions, requests: Sequence[Request], *, watched: bool) -> list[str]:
    """Returns why these requests need the host's loop, each in a few words; nothing if they do not.

    Args:
        decoder: the model.
        options: of the engine.
        requests: what is to be generated.
        watched: whether somebody wants the logits of every token.
    """
    found = [f"{name}={value}" for name, value in options.controls.items() if name != "loop_tokens"]
    if options.ablation is not None:
        found.append(f"ablation={options.ablation}")
    if options.prompt_acts:
        found.append("prompt_acts=True")
    if watched:
        found.append("on_logits")
    penalties = sorted({r.params.repetition_penalty for r in requests} - {1.0})
    found += [f"repetition_penalty={penalty:g}" for penalty in penalties]
    if any(r.params.logprobs for r in requests):
        found.append("logprobs=True")
    if decoder.pool_kind is not KVPool:
        found.append("a model that is read row by row")
    devices = sorted({str(layer.device) for layer in decoder.layers.values()})
    if len(devices) > 1:
        found.append(f"a model on {', '.join(devices)}")
    return found
