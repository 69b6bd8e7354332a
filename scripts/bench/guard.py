"""A minute's form of the benchmark for tests: fails on ratios within the run alone, never on a time.

Each ratio is the best of some repeats in which both sides take turns. What else runs on the machine may spoil a repeat,
or several; the code has become slow only if it spoils all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bench.engines import Setting
from bench.measure import measure
from bench.models import make_model
from bench.output import Report
from bench.prune_events import Place, time_events
from bench.work import Script, make_work

SHAPE = "tiny"
SCRIPT = Script(tokens=120, prompt=24, thought=40, solution=6, text=4)
PLACE = Place(solution=16, context=192, thought=64)
BATCHES = (1, 4)
REPEATS = 4


class Finding(NamedTuple):
    """One ratio: how many times as fast the engine was as the other side, at its best, and the least that passes."""

    name: str
    ratio: float
    least: float

    @property
    def passed(self) -> bool:
        return self.ratio >= self.least

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'SLOW'}  {self.name}: {self.ratio:.2f}, at least {self.least:.2f}"


def guard(report: Report, threads: int | None = None, options: Mapping[str, Any] | None = None) -> list[Finding]:
    """Measures all ratios that are guarded; arguments as in `time_events` and `make_model`."""
    model, found = make_model(SHAPE, threads=threads), []
    for batch in BATCHES:
        setting = Setting(model, make_work(batch, SCRIPT, model.config.vocab_size), options=options or {})
        (base, ours), _ = measure(setting, ["generate", "recompute"], REPEATS, report)
        ratios = [a.seconds / b.seconds for a, b in zip(base.timings, ours.timings, strict=True)]
        found.append(Finding(f"recompute over generate, batch {batch}", max(ratios), 0.8))
    (event,) = time_events(model, [PLACE], REPEATS, report, options)
    return [*found, Finding("prefill of k tokens over a prune event", 1 / min(event.ratios), 0.4)]
