"""A device loop for given requests: everything that is allocated once and never moves."""

from __future__ import annotations

from collections.abc import Sequence

from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.attention import survey
from hcot_lmeval.engine.device.choice import choose
from hcot_lmeval.engine.device.fields import Rule, on
from hcot_lmeval.engine.device.graphs import Runner
from hcot_lmeval.engine.device.loop import Accept, DeviceLoop
from hcot_lmeval.engine.device.program import Log, Program
from hcot_lmeval.engine.device.sampling import Sampler, kernel_for
from hcot_lmeval.engine.device.state import State
from hcot_lmeval.engine.options import EngineOptions
from hcot_lmeval.engine.rows import Request
from hcot_lmeval.engine.scheduler import Scheduler
from hcot_lmeval.trace import Policy

FEW_ROWS = 4
"""Up to here the host listens to every step: there is little to queue, and a late ending wastes more."""
CHUNK_ROWS = 16
"""Up to here a solution is forwarded in one piece: token by token it would take a row's share of so many steps."""
RUN_AHEAD = 16
"""Steps queued before the host listens, on a device that runs beside it."""


def make_loop(
    decoder: Decoder,
    options: EngineOptions,
    rule: Rule,
    scheduler: Scheduler,
    requests: Sequence[Request],
    accept: Accept,
    *,
    eos: int,
    step_tokens: int,
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
        step_tokens: most prompt tokens forwarded at once.
    """
    pool, device, needs = scheduler.pool, decoder.device, survey(decoder)
    windows = rule.policy is Policy.EVICT and any(need.window is not None for need in needs)
    state = State(
        pool.slots,
        pool.length - 1,
        rule,
        device,
        ends=eos + max(len(r.params.stop_ids) for r in requests),
        forced=max(1, *(len(r.forced_ids) for r in requests)),
        positions=windows,
    )
    run_ahead = options.run_ahead or _run_ahead(pool.slots, device.type)
    log = Log(DeviceLoop.lines(run_ahead), pool.slots + 1, device)
    with on(device):
        backend = choose(needs, options.attention)
    kernel = None if options.compute == "torch" else kernel_for(device)
    sampler = Sampler.of(requests, decoder.vocabulary, device, kernel)
    program = Program(decoder, pool, state, sampler, backend, log)
    graphs = options.graphs and device.type == "cuda"
    runner = Runner(
        program.step, pool.slots, state.scratch, device, counter=log.tick, graphs=graphs, compiled=options.compiled
    )
    chunks = options.reforward == "chunk" or (options.reforward == "auto" and pool.slots <= CHUNK_ROWS)
    return DeviceLoop(program, runner, scheduler, accept, step_tokens=step_tokens, chunks=chunks, run_ahead=run_ahead)


def _run_ahead(slots: int, kind: str) -> int:
    if kind != "cuda":
        return 1
    return 2 if slots <= FEW_ROWS else RUN_AHEAD
