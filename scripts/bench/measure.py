"""Times engines by turns on one piece of work, and makes figures of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from bench.engines import Contender, Setting, UnavailableError, prepare
from bench.floor import Floor, FloorTime
from bench.machine import PeakMemory
from bench.models import token_bytes
from bench.output import Report
from bench.timing import Timing
from bench.work import Work
from hcot_lmeval.trace import Policy


@dataclass
class Measurement:
    """All runs of one engine on one piece of work.

    Attributes:
        name: of the engine.
        timings: one for each repeat, the warm-up apart.
        memory: MiB that the engine took beyond the shared model, at most, its own copy of the weights included; None
            where that is not known.
        reason: why it did not run; empty if it did.
        forced: whether it generated the tokens of the script.
    """

    name: str
    timings: list[Timing] = field(default_factory=list)
    memory: float | None = None
    reason: str = ""
    forced: bool = True


class WrongTokensError(AssertionError):
    """An engine did not generate what the script says, or held another number of tokens than the rule says."""


def measure(
    setting: Setting, engines: Sequence[str], repeats: int, report: Report, *, warm_up: bool = True
) -> tuple[list[Measurement], list[FloorTime]]:
    """Runs every engine once to warm up, then `repeats` times, taking turns; the floor is timed in each round too.

    Args:
        setting: the model and the work.
        engines: names.
        repeats: timed runs of each engine.
        report: called with what is being done.
        warm_up: whether there is a run beforehand that does not count.

    Returns:
        A measurement for each engine, in the order given, and the floor of each repeat.

    Raises:
        ValueError: there is no engine of a name.
        WrongTokensError: an engine did other work than it was given.
    """
    found = {name: Measurement(name) for name in engines}
    ready: dict[str, Contender] = {}
    live = setting.work.mean_live(Policy.RECOMPUTE)  # the pruned context is what has to be read
    floor, floors = Floor(setting.model, setting.work.batch, round(live * token_bytes(setting.model))), []
    try:
        for name in engines:
            report(f"{name}: getting ready")
            contender = _get_ready(found[name], setting)
            if contender is not None:
                ready[name] = contender
                if warm_up:
                    _attempt(metered_run, found[name], contender)
        for number in range(repeats):
            report(f"floor: {number + 1} of {repeats}")
            floors.append(floor.run())
            for name in engines:
                report(f"{name}: {number + 1} of {repeats}")
                if name in ready and not found[name].reason:
                    run = checked_run if warm_up or number else metered_run
                    found[name].timings += _attempt(run, found[name], ready[name])
    finally:
        for contender in ready.values():
            contender.close()
    return list(found.values()), floors


def _get_ready(found: Measurement, setting: Setting) -> Contender | None:
    """Makes an engine; None if it cannot run. What it holds from now on is its memory."""
    memory = PeakMemory(setting.model.device)
    try:
        contender = prepare(found.name, setting)
    except UnavailableError as error:
        found.reason = str(error)
        return None
    memory.forget()  # files that were written and weights that were converted on the way
    found.forced, found.memory = contender.forced, memory.mib()
    return contender


def _attempt(run: Callable[[Measurement, Contender], Timing], found: Measurement, contender: Contender) -> list[Timing]:
    """Runs an engine once; nothing comes back if its work does not fit into memory, which is then the reason."""
    try:
        return [run(found, contender)]
    except (torch.OutOfMemoryError, MemoryError) as error:
        found.reason = f"out of memory: {str(error).splitlines()[0]}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the others
    return []


def metered_run(found: Measurement, contender: Contender) -> Timing:
    """Runs an engine once; what it needs on the way belongs to its memory."""
    memory = PeakMemory(contender.setting.model.device)
    timing = checked_run(found, contender)
    grown = memory.mib()
    found.memory = None if grown is None or found.memory is None else found.memory + grown
    return timing


def checked_run(found: Measurement, contender: Contender) -> Timing:
    """Runs an engine once.

    Raises:
        WrongTokensError: it did other work than it was given.
    """
    name, work, timing = found.name, contender.setting.work, contender.run()
    if contender.forced and timing.tokens != work.traces:
        raise WrongTokensError(f"{name} did not generate the tokens of the script")
    if [len(tokens) for tokens in timing.tokens] != [work.tokens] * work.batch:
        raise WrongTokensError(f"{name} did not generate {work.tokens} tokens in each of {work.batch} rows")
    expected = work.peak_live(contender.policy)
    if timing.peak_live != expected:
        raise WrongTokensError(
            f"{name} held {timing.peak_live} tokens of a row at most; under policy {contender.policy} it is {expected}"
        )
    return timing


@dataclass(frozen=True)
class Figures:
    """What is said about one engine; None where it cannot be said.

    Attributes:
        engine: its name.
        tokens_per_second: of all rows together, prefill included; the median run.
        step_ms: the median ordinary step; the median of the runs.
        of_floor: the floor's step over that, 1 at the floor; the median of the ratios within each repeat.
        of_memory: the same with everything read and nothing multiplied in place of the floor.
        times_base: whole runs, how many times as fast as the base; the median of the ratios within each repeat.
        prune_ms: what a prune event adds; the median of the runs.
        peak_live: the largest number of live tokens of a row.
        memory_mib: see `Measurement`.
        reason: why it did not run.
        forced: whether its tokens were those of the script.
        mean: whether `step_ms` is the mean step, prune events included, since nothing else is known.
    """

    engine: str
    tokens_per_second: float | None = None
    step_ms: float | None = None
    of_floor: float | None = None
    of_memory: float | None = None
    times_base: float | None = None
    prune_ms: float | None = None
    peak_live: int | None = None
    memory_mib: float | None = None
    reason: str = ""
    forced: bool = True
    mean: bool = False


def figures(
    measurements: Sequence[Measurement], floors: Sequence[FloorTime], work: Work, *, base: str = "generate"
) -> list[Figures]:
    """Makes the figures of all engines of one piece of work; `base` is the engine that whole runs are compared with."""
    timings = next((m.timings for m in measurements if m.name == base and not m.reason), [])
    return [_figures(measurement, floors, timings, work) for measurement in measurements]


def _figures(found: Measurement, floors: Sequence[FloorTime], base: Sequence[Timing], work: Work) -> Figures:
    if found.reason:
        return Figures(found.name, reason=found.reason)
    seconds, steps = [t.seconds for t in found.timings], [t.step for t in found.timings]
    return Figures(
        found.name,
        tokens_per_second=work.batch * work.tokens / statistics.median(seconds),
        step_ms=_ms(median(steps)),
        of_floor=median_ratio([floor.seconds for floor in floors], steps),
        of_memory=median_ratio([floor.memory for floor in floors], steps),
        times_base=median_ratio([t.seconds for t in base], seconds) if base else None,
        prune_ms=_ms(median([t.prune for t in found.timings])),
        peak_live=found.timings[0].peak_live,
        memory_mib=found.memory,
        forced=found.forced,
        mean=found.timings[0].mean_step is not None,
    )


def median(values: Sequence[float | None]) -> float | None:
    """The median; None if one of the values is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def median_ratio(above: Sequence[float], below: Sequence[float | None]) -> float | None:
    """The median of the ratios within each repeat: what changes from repeat to repeat hits both sides."""
    return median([None if b is None else a / b for a, b in zip(above, below, strict=True)])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
