"""A long trace with a short live context: what pruning is for."""

from __future__ import annotations

from collections.abc import Sequence

from bench.engines.contract import Setting
from bench.floor import FloorTime
from bench.measure import Measurement, Report, measure
from bench.work import LONG_LIVE
from hcot_lmeval.trace import Policy


def measure_long(
    setting: Setting, engines: Sequence[str], repeats: int, report: Report, *, max_live: int = LONG_LIVE
) -> tuple[list[Measurement], list[FloorTime]]:
    """Times the engines on a long trace, without a run to warm up.

    Every engine reports its largest live context, which has to be the simulated one exactly; ours run in slots of
    exactly that length besides.

    Args:
        setting: the model and the work.
        engines: names; the first is what the others are compared with.
        repeats: timed runs of each engine.
        report: called with what is being done.
        max_live: most live tokens of a row that the trace, pruned by `recompute`, may have.

    Raises:
        ValueError: the pruned trace has more.
        WrongTokensError: an engine did other work than it was given, or held more or less than the simulation.
    """
    peak = setting.work.peak_live(Policy.RECOMPUTE)
    if peak > max_live:
        raise ValueError(
            f"the pruned trace has {peak} live tokens at its peak, more than --max-live {max_live}; "
            "lower --prompt, --thought, --solution or --text, or allow more"
        )
    return measure(setting, engines, repeats, report, warm_up=False)
