"""What a training curve says, in words: still learning, converged, overfitting since a step, or diverged.

    print(verdict(points_of(records)))

Losses of evaluations are noisy, so nothing is read off single values. Levels are running medians: of a window of three
evaluations, or an eighth of the curve where that is more. A change counts if it is large enough to matter (the
constants below) and larger than `NOISE_FACTOR` times the noise. The noise is measured on the curve itself: the median
absolute third difference, which neither slope, curvature nor a few outliers disturb.

The points should be those of one phase of a curriculum: a change of the data moves losses for reasons of its own.

This module imports the standard library alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from statistics import fmean, median
from typing import Any

MIN_POINTS = 5
"""Evaluations below which nothing is said; a fall, a turn and a rise that lasts take as many."""
WINDOW, WINDOW_SHARE = 3, 1 / 8
"""Evaluations in a running median: at least three, so that one outlier never counts; more on long curves, where they
cost little resolution."""
NOISE_FACTOR = 3.0
"""Noise that a change has to exceed, in standard deviations of an evaluation. The lowest of many noisy levels lies
about two below the true one, so two would see a turn in every flat curve."""
RISE = 0.02
"""Rise of the held-out loss above its minimum that is called overfitting. Early stopping does well to wait for a few
per cent: smaller rises often come back (Prechelt, Early stopping, but when?, 1998)."""
DIVERGENCE = 0.10
"""Rise of the training loss above its minimum that is called divergence. On data that is seen again and again this loss
falls; shuffles and curricula move it by a few per cent."""
PROGRESS = 0.01
"""Fall of the held-out loss over the last half of the curve below which it has converged: training on as long again
would gain less, as curves flatten, and another seed changes as much."""
FLOOR = 0.001
"""Nats per token below which a change never counts, however large its share of a loss near 0: over a trace of a few
hundred tokens it is less than one wrong token in three traces."""
GAP = 0.10
"""Share of the held-out loss by which the training loss is lower that is worth a word, and more data."""
MEMORISED = 0.1
"""Share of the held-out loss below which a training loss says that the training data are known by heart."""
ACCURACY_GAIN = 0.05
"""Rise of the accuracy after the turn of the loss that makes accuracy the better guide: a model may grow overconfident,
which the loss punishes, and still solve more problems."""


class Outcome(StrEnum):
    """What a curve shows."""

    TOO_FEW = "too few points"
    LEARNING = "still learning"
    CONVERGED = "converged"
    OVERFITTING = "overfitting"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        step: optimiser steps taken.
        train_loss: mean training loss since the evaluation before, in nats per token.
        held_out_loss: in nats per token.
        accuracy: share of the held-out problems solved, if measured.
        illegal_traces: share of the generated traces that break the notation, if measured.
    """

    step: int
    train_loss: float
    held_out_loss: float
    accuracy: float | None = None
    illegal_traces: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A judgement on a curve; as a string it is a paragraph for people.

    Attributes:
        outcome: what the curve shows.
        reason: the numbers that show it, in a sentence.
        advice: what to do next, in a sentence.
        best_step: the step with the lowest held-out loss; None if there is no finite one.
        since: the step at which the held-out loss turned or the training diverged; None for other outcomes.
        rise: how far the held-out loss is above its minimum now, as a share of it.
        gap: held-out minus training loss now, in nats per token; negative while a model learns fast, since the
            training loss is the mean of the steps before.
    """

    outcome: Outcome
    reason: str
    advice: str
    best_step: int | None = None
    since: int | None = None
    rise: float = 0.0
    gap: float = math.nan

    def __str__(self) -> str:
        since = "" if self.since is None else f" since step {self.since}"
        return f"{self.outcome}{since}: {self.reason} {self.advice}"


def points_of(records: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Returns the evaluations among the records of a run (see `training.monitor.curves`), oldest first.

    The training loss of a point is the mean of what was logged since the point before, or the last one logged where
    evaluations are closer together than logs. Evaluations before the first log are left out.
    """
    points: list[Point] = []
    logged: list[float] = []
    last: float | None = None
    for record in sorted(records, key=lambda record: (record["step"], "eval_loss" in record)):
        if "eval_loss" not in record:
            value = train_loss(record)
            logged += [] if value is None else [value]
            continue
        last = fmean(logged) if logged else last
        logged = []
        if last is not None:
            optional = (record.get("eval_accuracy"), record.get("eval_illegal_traces"))
            points = [point for point in points if point.step != record["step"]]
            points.append(Point(int(record["step"]), last, record["eval_loss"], *optional))
    return points


def train_loss(record: Mapping[str, Any]) -> float | None:
    """Returns the training loss in a record, or None: the cross-entropy alone where it is told apart."""
    value = record.get("cross_entropy", record.get("loss"))
    return None if value is None else float(value)


def verdict(points: Sequence[Point], checkpoints: Collection[int] | None = None) -> Verdict:
    """Judges a curve.

    Args:
        points: oldest first.
        checkpoints: the steps whose checkpoints are still there, the only ones that it advises to go on from; by
            default all are.

    Raises:
        ValueError: the steps do not increase.
    """
    steps = [point.step for point in points]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"the steps {steps} of the points do not increase; judge one run, oldest point first")
    kept = [point for point in points if checkpoints is None or point.step in checkpoints]
    found = _judged(points, _best_step(kept))
    there = {point.step for point in kept}
    advice = re.sub(r"checkpoint-(\d+)", lambda match: _named(int(match[1]), there), found.advice)
    return replace(found, advice=advice)


def _named(step: int, there: Collection[int]) -> str:
    return f"checkpoint-{step}" if step in there else f"step {step} (not kept, see trainer.save_total_limit)"


def _judged(points: Sequence[Point], back: int | None) -> Verdict:
    """Judges a curve; `back` is the best step to go back to."""
    broken = [p for p in points if not (math.isfinite(p.train_loss) and math.isfinite(p.held_out_loss))]
    if broken:
        return _broken(points, broken[0], back)
    if len(points) < MIN_POINTS:
        return Verdict(
            Outcome.TOO_FEW,
            f"{len(points)} evaluation{'' if len(points) == 1 else 's'}, and {MIN_POINTS} are needed to tell.",
            "Go on training, or evaluate more often.",
            _best_step(points),
        )
    return _judge(points, Curve([p.train_loss for p in points]), Curve([p.held_out_loss for p in points]), back)


class Curve:
    """Levels of a noisy sequence.

    Attributes:
        noise: standard deviation of a value around the trend. For independent errors a third difference has 20 times
            their variance, and 1.4826 is the ratio of standard deviation and median absolute deviation of a Gaussian.
        levels: running medians; windows are as wide at the ends, so that a steady fall ends on its lowest level.
        lowest: index of the lowest level.
        now: level at the end.
        width: evaluations in a running median.
    """

    def __init__(self, values: Sequence[float]) -> None:
        quads = zip(values, values[1:], values[2:], values[3:], strict=False)
        self.noise = 1.4826 * median(abs(a - 3 * b + 3 * c - d) for a, b, c, d in quads) / math.sqrt(20)
        self.width = width = max(WINDOW, round(len(values) * WINDOW_SHARE))
        starts = [min(max(0, i - width // 2), len(values) - width) for i in range(len(values))]
        self.levels = [median(values[start : start + width]) for start in starts]
        self.now = self.levels[-1]
        self.lowest = min(range(len(values)), key=self.levels.__getitem__)
        self._last = values[-max(MIN_POINTS, len(values) // 2) :]

    @property
    def rise(self) -> float:
        """How far the end is above the lowest level."""
        return self.now - self.levels[self.lowest]

    def has_risen(self, share: float) -> bool:
        """Whether the end is above the lowest level by more than `share` of it, and not by chance."""
        return self.rise > max(share * self.levels[self.lowest], NOISE_FACTOR * self.noise, FLOOR)

    def recent_fall(self) -> float:
        """How far the values fell over their last half: by the median slope of all pairs (Theil 1950, Sen 1968)."""
        pairs = [(i, j) for i in range(len(self._last)) for j in range(i)]
        return -median((self._last[i] - self._last[j]) / (i - j) for i, j in pairs) * (len(self._last) - 1)

    def still_falls(self) -> bool:
        """Whether the last half falls by more than what counts; a fitted line averages the noise of its values."""
        chance = NOISE_FACTOR * self.noise * math.sqrt(12 / len(self._last))
        return self.recent_fall() > max(PROGRESS * self.now, chance, FLOOR)


def _judge(points: Sequence[Point], train: Curve, held_out: Curve, back: int | None) -> Verdict:
    rise = max(0.0, held_out.rise) / max(held_out.levels[held_out.lowest], FLOOR)
    facts: dict[str, Any] = {"best_step": _best_step(points), "rise": rise, "gap": held_out.now - train.now}
    turned = held_out.has_risen(RISE)
    if train.has_risen(DIVERGENCE) or (turned and train.has_risen(RISE)):
        return _diverged(points, train, facts, back)
    if turned:
        return _overfitting(points, held_out, facts)
    if held_out.now < FLOOR:
        return _learned(held_out, facts)
    if held_out.still_falls():
        return _learning(held_out, facts)
    if train.now < MEMORISED * held_out.now:
        return _memorised(points, train, held_out, facts)
    return _converged(points, held_out, facts)


def _broken(points: Sequence[Point], first: Point, back: int | None) -> Verdict:
    start = "Start anew" if back is None else f"Go back to checkpoint-{back}"
    return Verdict(
        Outcome.DIVERGED,
        f"a loss is not finite (training {first.train_loss:g}, held out {first.held_out_loss:g}).",
        f"{start} with a lower learning rate, a longer warm-up or gradient clipping.",
        _best_step(points),
        first.step,
    )


def _diverged(points: Sequence[Point], train: Curve, facts: dict[str, Any], back: int | None) -> Verdict:
    start = "start anew" if back is None else f"go on from checkpoint-{back}"
    low = train.levels[train.lowest]
    return Verdict(
        Outcome.DIVERGED,
        f"the training loss rose from {low:.4g} to {train.now:.4g} nats per token (medians of {train.width} logs).",
        f"Lower the learning rate and {start}.",
        since=points[train.lowest].step,
        **facts,
    )


def _overfitting(points: Sequence[Point], held_out: Curve, facts: dict[str, Any]) -> Verdict:
    low, turn, best = held_out.levels[held_out.lowest], points[held_out.lowest], facts["best_step"]
    reason = (
        f"the held-out loss turned there at {low:.4g} nats per token and is {facts['rise']:.0%} above it now "
        f"(medians of {held_out.width} evaluations), {_gap(facts['gap'])}."
    )
    advice = f"Stop: checkpoint-{best} is the best; for more, train on more data."
    solved = max((p for p in points if p.accuracy is not None), key=lambda p: p.accuracy or 0.0, default=None)
    if solved is not None and turn.accuracy is not None and solved.step > turn.step:
        gain = (solved.accuracy or 0.0) - turn.accuracy
        if gain > ACCURACY_GAIN:
            reason += f" The accuracy went on from {turn.accuracy:.0%} to {solved.accuracy:.0%}."
            advice = f"Stop: checkpoint-{best} has the lowest loss, checkpoint-{solved.step} solves the most problems."
    return Verdict(Outcome.OVERFITTING, reason, advice, since=turn.step, **facts)


def _learning(held_out: Curve, facts: dict[str, Any]) -> Verdict:
    fall = held_out.recent_fall()
    reason = (
        f"the held-out loss is {_now(held_out)} and fell by {fall:.2g} nats over the last half of the curve, "
        f"{_gap(facts['gap'])}."
    )
    return Verdict(Outcome.LEARNING, reason, "Train longer.", **facts)


def _learned(held_out: Curve, facts: dict[str, Any]) -> Verdict:
    reason = f"the held-out loss is {_now(held_out)}, next to nothing."
    advice = f"Stop: checkpoint-{facts['best_step']} is the best; these data have nothing left to teach."
    return Verdict(Outcome.CONVERGED, reason, advice, **facts)


def _memorised(points: Sequence[Point], train: Curve, held_out: Curve, facts: dict[str, Any]) -> Verdict:
    reason = (
        f"the training data are known by heart (loss {train.now:.2g}), while the held-out loss stays at "
        f"{_now(held_out)}.{_solved(points)}"
    )
    advice = f"checkpoint-{facts['best_step']} has the lowest held-out loss; for more, train on more data, less often."
    return Verdict(Outcome.OVERFITTING, reason, advice, **facts)


def _converged(points: Sequence[Point], held_out: Curve, facts: dict[str, Any]) -> Verdict:
    best, wide = facts["best_step"], facts["gap"] > max(GAP * held_out.now, FLOOR)
    further = "more data would help more than more steps" if wide else "for more, train a larger model"
    reason = (
        f"the held-out loss stays at {_now(held_out)}, as far as noise lets one see, {_gap(facts['gap'])}."
        f"{_solved(points)}"
    )
    return Verdict(Outcome.CONVERGED, reason, f"Stop: checkpoint-{best} is the best; {further}.", **facts)


def _solved(points: Sequence[Point]) -> str:
    """The accuracy at the end, which a loss alone says little about."""
    accuracy = points[-1].accuracy
    return "" if accuracy is None else f" It solves {accuracy:.0%} of the held-out problems."


def _now(curve: Curve) -> str:
    """The level at the end, and that it is no single evaluation's."""
    return f"{curve.now:.4g} nats per token (median of the last {curve.width} evaluations)"


def _gap(gap: float) -> str:
    return f"{abs(gap):.2g} nats {'above' if gap >= 0 else 'below'} the training loss"


def _best_step(points: Sequence[Point]) -> int | None:
    """The step of the lowest held-out loss as measured, which is what a trainer keeps as its best checkpoint."""
    finite = [point for point in points if math.isfinite(point.held_out_loss)]
    return min(finite, key=lambda point: point.held_out_loss).step if finite else None
