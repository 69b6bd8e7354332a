"""What the curve of a run says, in words: still learning, converged, overfitting since a step, or diverged.

    print(verdict(records))      # of one phase: a change of the data moves losses for reasons of its own

Losses of evaluations are noisy, so levels are running medians, which one outlier never moves, and one rule says what
counts: a change that matters (`SHARE`, `FLOOR`) and is no chance (`SIGMAS`). The noise is measured on the curve itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from hcot_lmeval.training.curves import TRAIN, Record, series, with_train_loss

FEWEST = 5
"""Evaluations below which nothing is said; a fall, a turn and a rise that lasts take as many."""
SHARE = 0.02
"""Share of a loss by which it has to change: smaller rises often come back (Prechelt, Early stopping, but when?, 1998),
and another seed changes as much."""
FLOOR = 0.001
"""Nats per token below which a change never counts: over some hundred tokens, less than one wrong token in 3 traces."""
SIGMAS = 3.0
"""Standard deviations of an evaluation by which a loss has to change. The lowest of many noisy levels lies about two
below the true one, so two would see a turn in every flat curve."""

CALMER = "Start anew with a lower learning rate, a longer warm-up or gradient clipping."
LARGER = "for more, train a larger model"


class Point(NamedTuple):
    """An evaluation.

    Attributes:
        step: optimiser steps taken.
        trained: mean training loss since the evaluation before, or the last one logged, in nats per token.
        held_out: held-out loss, in nats per token.
        accuracy: share of the held-out problems solved, if measured.
    """

    step: int
    trained: float
    held_out: float
    accuracy: float | None = None


def verdict(records: Iterable[Record]) -> str:
    """Returns a paragraph: the outcome, the numbers that show it, and what to do.

    Args:
        records: of a run (see `training.curves`), of one phase alone.
    """
    points = points_of(records)
    for point in points:
        if not (math.isfinite(point.trained) and math.isfinite(point.held_out)):
            numbers = f"training {point.trained:g}, held out {point.held_out:g}"
            return f"diverged by step {point.step}: a loss is not finite ({numbers}). {CALMER}"
    if len(points) < FEWEST:
        return f"too few evaluations to tell: {len(points)}, and {FEWEST} are needed. Go on, or evaluate more often."
    trained, held_out = Levels([p.trained for p in points]), Levels([p.held_out for p in points])
    turn = points[held_out.lowest]
    if held_out.counts(held_out.rise):
        if trained.counts(trained.rise):
            return (
                f"diverged since step {points[trained.lowest].step}: the training loss rose from {trained.least:.4g} "
                f"to {trained.now:.4g} nats per token, and the held-out loss with it. {CALMER}"
            )
        return (
            f"overfitting since step {turn.step}: the held-out loss turned there at {held_out.least:.4g} nats per "
            f"token and is {held_out.rise / max(held_out.least, FLOOR):.0%} above it now, {_gap(trained, held_out)}."
            f"{_solved(points[-1], turn)} Stop: {_best(points)}; for more, train on more data, or less often on these."
        )
    if held_out.counts(held_out.recent_fall):
        return (
            f"still learning: the held-out loss is {held_out.now:.4g} nats per token and fell by "
            f"{held_out.recent_fall:.2g} of them over the last half of the curve, {_gap(trained, held_out)}."
            f"{_solved(points[-1])} Train longer."
        )
    more = "more data would help more than more steps" if held_out.counts(held_out.now - trained.now) else LARGER
    return (
        f"converged: the held-out loss stays at {held_out.now:.4g} nats per token, as far as noise lets one see, "
        f"{_gap(trained, held_out)}.{_solved(points[-1])} Stop: {_best(points)}; {more}."
    )


def points_of(records: Iterable[Record]) -> list[Point]:
    """Returns the evaluations of a run, oldest first, but for those before the first training loss."""
    records = [with_train_loss(record) for record in records]
    logs = list(zip(*series(records, TRAIN), strict=True))
    accuracy = dict(zip(*series(records, "eval_accuracy"), strict=True))
    losses = dict(zip(*series(records, "eval_loss"), strict=True))
    points = list[Point]()
    for before, step in pairwise([-1, *losses]):
        logged = [loss for at, loss in logs if before < at <= step]
        if logged or points:
            trained = fmean(logged) if logged else points[-1].trained
            points.append(Point(step, trained, losses[step], accuracy.get(step)))
    return points


class Levels:
    """The levels of a noisy sequence: running medians of three, at its ends as well.

    Attributes:
        noise: standard deviation of a value around the trend, from third differences, which neither slope nor
            curvature disturbs: they have 20 times its variance, and 1.4826 is the ratio of standard deviation and
            median absolute deviation of a Gaussian.
        lowest: index of the lowest level.
        least: that level.
        now: the level at the end.
        rise: how far that is above the lowest one.
        recent_fall: how far it is below that at half the curve.
    """

    def __init__(self, values: Sequence[float]) -> None:
        thirds = zip(values, values[1:], values[2:], values[3:], strict=False)
        self.noise = 1.4826 * median(abs(a - 3 * b + 3 * c - d) for a, b, c, d in thirds) / math.sqrt(20)
        inner = [median(values[start : start + 3]) for start in range(len(values) - 2)]
        levels = [inner[0], *inner, inner[-1]]
        self.now, self.least = levels[-1], min(levels)
        self.lowest = levels.index(self.least)
        self.rise = self.now - self.least
        self.recent_fall = levels[len(levels) // 2] - self.now

    def counts(self, change: float) -> bool:
        """Whether a change is large enough to matter, and too large for chance."""
        return change > max(SHARE * self.least, FLOOR, SIGMAS * self.noise)


def _gap(trained: Levels, held_out: Levels) -> str:
    gap = held_out.now - trained.now
    return f"{abs(gap):.2g} nats {'above' if gap >= 0 else 'below'} the training loss"


def _solved(now: Point, turn: Point | None = None) -> str:
    """The accuracy, about which a loss alone says little: a model may grow overconfident and still solve more."""
    if now.accuracy is None:
        return ""
    before = "" if turn is None or turn.accuracy is None else f", {turn.accuracy:.0%} at step {turn.step}"
    return f" It solves {now.accuracy:.0%} of the held-out problems{before}."


def _best(points: Sequence[Point]) -> str:
    best = min(points, key=lambda point: point.held_out)
    return f"step {best.step} has the lowest held-out loss, {best.held_out:.4g}"
