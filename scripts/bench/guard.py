"""A minute's form of the benchmark for tests: fails on ratios within the run alone, never on a time.

Each ratio is the best of some repeats in which both sides take turns. What else runs on the machine may spoil a repeat,
or several; the code has become slow only if it spoils all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.engines.contract import Setting
from bench.measure import Report, measure
from bench.prune_events import Place, time_events
from bench.shapes import make_model
from bench.work import Script, make_work

SHAPE = "tiny"
SCRIPT = Script(tokens=120, prompt=24, thought=40, solution=6, text=4)
PLACE = Place(solution=16, context=192, thought=64)
REPEATS = 4
BATCHES = (1, 4)


@dataclass(frozen=True)
class Finding:
    """One ratio and its bound.

    Attributes:
        name: what was compared.
        ratio: how many times as fast the engine was as the other side, at its best.
        least: the smallest ratio that passes.
    """

    name: str
    ratio: float
    least: float

    @property
    def passed(self) -> bool:
        return self.ratio >= self.least

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'SLOW'}  {self.name}: {self.ratio:.2f}, at least {self.least:.2f}"


def guard(report: Report, *, threads: int | None = None, options: Mapping[str, Any] | None = None) -> list[Finding]:
    """Measures all ratios that are guarded.

    Args:
        report: called with what is being done.
        threads: CPU threads; as many as before by default.
        options: fields of `EngineOptions`.
    """
    model = make_model(SHAPE, threads=threads)
    found = [_against_generate(model, batch, report, options or {}) for batch in BATCHES]
    (event,) = time_events(model, [PLACE], REPEATS, report, options)
    return [*found, Finding("prefill of k tokens over a prune event", 1 / min(event.ratios), 0.4)]


def _against_generate(model: Any, batch: int, report: Report, options: Mapping[str, Any]) -> Finding:
    work = make_work(batch, SCRIPT, model.config.vocab_size)
    (base, ours), _ = measure(Setting(model, work, options=options), ["generate", "recompute"], REPEATS, report)
    ratios = [a.seconds / b.seconds for a, b in zip(base.timings, ours.timings, strict=True)]
    return Finding(f"recompute over generate, batch {batch}", max(ratios), 0.8)
