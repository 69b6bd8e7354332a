"""What a step takes when the device runs it: kernel by kernel (L0), as a graph (L1), compiled and as a graph (L2).

Rows begin with contexts of a given length, whose keys and values are noise, and write given tokens; nothing is
forwarded to get there. Beside each time stands the bandwidth floor: all weights, and the keys and values in sight, read
once at the speed at which one large tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import seconds
from bench.work import MARKERS
from hcot_lmeval.engine import Request, SamplingParams
from hcot_lmeval.engine.decoder import Decoder
from hcot_lmeval.engine.device.attention import Sdpa
from hcot_lmeval.engine.device.choice import choose
from hcot_lmeval.engine.device.graphs import WARM_UP, Runner
from hcot_lmeval.engine.device.program import Log, Program, ScratchPool
from hcot_lmeval.engine.device.sampling import Sampler
from hcot_lmeval.engine.device.state import Rule, State, on
from hcot_lmeval.trace import Policy

LEVELS = {"L0": "kernel by kernel", "L1": "CUDA graph", "L2": "torch.compile and CUDA graph"}
SETTLE = 3
"""Steps before the clock starts, once a graph is there."""
READ_BYTES = {"cuda": 2**32, "cpu": 2**26}
"""Size of the tensor by whose sum the memory's speed is measured."""
READS = 10
WORD = 10
"""The token that all rows write: text."""


@dataclass(frozen=True)
class StepFigure:
    """One level at one size.

    Attributes:
        level: a key of `LEVELS`.
        batch: rows.
        live: tokens in sight of each row when the clock starts.
        ms: milliseconds of the mean step; None if it did not run.
        floor_ms: of the bandwidth floor.
        backend: who attended.
        reason: why it did not run.
        failed: whether it should have run.
    """

    level: str
    batch: int
    live: int
    ms: float | None = None
    floor_ms: float | None = None
    backend: str = ""
    reason: str = ""
    failed: bool = False

    @property
    def of_floor(self) -> float | None:
        """The floor's time over the step's; 1 is the floor."""
        return None if self.ms is None or self.floor_ms is None else self.floor_ms / self.ms


def skipped(level: str, device: torch.device) -> str:
    """Why a level cannot run on a device; empty if it can."""
    return "" if level == "L0" or device.type == "cuda" else f"CUDA graphs need CUDA, not {device.type}"


def bandwidth(device: torch.device) -> float:
    """Returns the bytes a second at which one large tensor is summed."""
    tensor = torch.zeros(READ_BYTES[device.type] // 4, device=device)
    tensor.sum()
    return tensor.nbytes / seconds(tensor.sum, device, runs=READS)


def time_levels(
    model: Any, levels: Sequence[str], batches: Sequence[int], lives: Sequence[int], *, steps: int
) -> Iterator[StepFigure]:
    """Yields a figure for every level, batch and live length.

    Args:
        model: a causal language model of transformers.
        levels: keys of `LEVELS`.
        batches: numbers of rows.
        lives: live lengths.
        steps: that are timed together.
    """
    decoder = Decoder(model, check=False, compute="torch")
    with on(decoder.device):
        backend, speed = choose([*decoder.layers.values()]), bandwidth(decoder.device)
        for batch in batches:
            for live in lives:
                for level in levels:
                    yield _figure(decoder, backend, speed, StepFigure(level, batch, live), steps)


def _figure(decoder: Decoder, backend: Sdpa, speed: float, asked: StepFigure, steps: int) -> StepFigure:
    where = asked.level, asked.batch, asked.live
    reason = skipped(asked.level, decoder.device)
    if reason:
        return StepFigure(*where, reason=reason)
    try:
        ms = 1000 * time_step(decoder, backend, asked, steps=steps)
    except Exception as error:  # the other levels and sizes are still worth their while
        fits = not isinstance(error, (torch.OutOfMemoryError, MemoryError))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return StepFigure(*where, backend=backend.name, reason=reason, failed=fits)
    finally:
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
    read = weight_bytes(decoder.model) + asked.batch * (asked.live + steps / 2) * decoder.token_bytes
    return StepFigure(*where, ms, 1000 * read / speed, backend.name)


class CaptureError(RuntimeError):
    """A step could not be captured; the log says why."""


def time_step(decoder: Decoder, backend: Sdpa, asked: StepFigure, *, steps: int) -> float:
    """Returns the seconds of the mean step.

    Raises:
        CaptureError: a graph was asked for, and there is none.
    """
    total = SETTLE + steps
    program = make_program(decoder, backend, asked.batch, asked.live, total)
    scratch, log = program.state.scratch, program.log
    graphs, compiled = asked.level != "L0", asked.level == "L2"
    settings: dict[str, Any] = {"counter": log.tick, "graphs": graphs, "compiled": compiled}
    runner = Runner(program.step, asked.batch, scratch, decoder.device, **settings)

    def run(times: int) -> None:
        for _ in range(times):
            runner.run()

    with torch.no_grad(), program.attached():
        runner.load(range(asked.batch))
        run(SETTLE)
        if graphs and not runner.captured:
            raise CaptureError("the step could not be captured; the log says why")
        taken = seconds(lambda: run(steps), decoder.device, runs=1)
    _check(program, asked, total)
    return taken / steps


def make_program(decoder: Decoder, backend: Sdpa, batch: int, live: int, steps: int) -> Program:
    """Returns rows with `live` tokens of noise each, which write text for `steps` steps."""
    length, device = live + steps + 1, decoder.device
    pool = ScratchPool(decoder.layers, batch, length)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.normal_()
    rule = Rule(Policy.RECOMPUTE, MARKERS, length, length)
    state = State(batch, length, rule, device, forced=steps)
    request = Request("", (WORD,) * live, SamplingParams(max_gen_toks=steps + 1), forced_ids=(WORD,) * steps)
    for slot in range(batch):
        state.begin(slot, request, ends=())
    sampler = Sampler(places=None, truncates=False, bans=False, forces=True)
    return Program(decoder, pool, state, sampler, backend, Log(1 + WARM_UP, batch + 1, device))


def _check(program: Program, asked: StepFigure, steps: int) -> None:
    """Every row has to have made every step."""
    generated = program.state.read(torch.arange(asked.batch, device=program.state.device)).generated
    if generated.tolist() != [steps] * asked.batch:
        raise AssertionError(f"rows made {sorted(set(generated.tolist()))} steps, not {steps}")


def weight_bytes(model: Any) -> int:
    """Returns the bytes of the weights that every step reads: those of all matrix products, the output layer's once."""
    matrices = {m.weight.data_ptr(): m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    return sum(weight.nbytes for weight in matrices.values())
