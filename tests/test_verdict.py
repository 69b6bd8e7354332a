"""Verdicts on made-up curves, clean and noisy."""

import math
import random

import pytest

from hcot_lmeval.training.monitor.verdict import MIN_POINTS, Curve, Outcome, Point, points_of, verdict

SHAPES = {
    "steady fall": (lambda t: (2 - t, 2.05 - t), Outcome.LEARNING),
    "exponential fall": (lambda t: (1 + 2 * math.exp(-2 * t), 1.02 + 2 * math.exp(-2 * t)), Outcome.LEARNING),
    "fall by half each": (lambda t: (2 ** (-8 * t), 2 ** (1 - 8 * t)), Outcome.LEARNING),
    "plateau": (lambda t: (1 + 2 * math.exp(-20 * t), 1.02 + 2 * math.exp(-20 * t)), Outcome.CONVERGED),
    "flat": (lambda t: (1.0, 1.0), Outcome.CONVERGED),
    "solved": (lambda t: (3 * math.exp(-25 * t) + 1e-4, 3 * math.exp(-25 * t) + 2e-4), Outcome.CONVERGED),
    "slow turn": (
        lambda t: (2 * math.exp(-3 * t) + 0.1, 1 + math.exp(-12 * t) + 0.35 * max(0.0, t - 0.3)),
        Outcome.OVERFITTING,
    ),
    "sharp turn": (lambda t: (2 * math.exp(-5 * t), 1 + 3 * abs(t - 0.4)), Outcome.OVERFITTING),
    "turn of small losses": (lambda t: (0.1 * math.exp(-5 * t), 0.02 + 0.1 * abs(t - 0.4)), Outcome.OVERFITTING),
    "both rise": (
        lambda t: (1 + math.exp(-10 * t) + 3 * max(0.0, t - 0.6), 1.1 + math.exp(-10 * t) + 3 * max(0.0, t - 0.6)),
        Outcome.DIVERGED,
    ),
    "held-out rise with a smaller one of training": (
        lambda t: (1 + 0.3 * abs(t - 0.5), 1 + 0.4 * abs(t - 0.5)),
        Outcome.DIVERGED,
    ),
}


def curve(shape, count: int, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """`count` evaluations of a shape over t in (0, 1], 100 steps apart, each loss times a log-normal error."""
    rng = random.Random(seed)
    losses = [shape((i + 1) / count) for i in range(count)]
    return [
        Point(100 * (i + 1), train * math.exp(rng.gauss(0, noise)), held_out * math.exp(rng.gauss(0, noise)))
        for i, (train, held_out) in enumerate(losses)
    ]


@pytest.mark.parametrize("count", [8, 20, 60])
@pytest.mark.parametrize("name", SHAPES)
def test_clean_curves(name, count):
    shape, outcome = SHAPES[name]
    assert verdict(curve(shape, count)).outcome is outcome


@pytest.mark.parametrize(("count", "noise"), [(8, 0.003), (20, 0.01), (60, 0.02)])
@pytest.mark.parametrize("name", SHAPES)
def test_noise_changes_no_verdict(name, count, noise):
    shape, outcome = SHAPES[name]
    found = [verdict(curve(shape, count, noise, seed)).outcome for seed in range(25)]
    assert found.count(outcome) >= 23, found


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03, 0.1])
def test_noise_is_measured_whatever_the_trend(noise):
    values = [point.held_out_loss for point in curve(lambda t: (1, 1 + math.exp(-5 * t)), 400, noise)]
    level = 1.2  # mean of the curve
    assert Curve(values).noise == pytest.approx(noise * level, rel=0.25, abs=1e-6)


def test_one_outlier_is_no_turn_wherever_it_is():
    for at in range(12):
        points = curve(SHAPES["plateau"][0], 12)
        points[at] = Point(points[at].step, points[at].train_loss, points[at].held_out_loss * 1.5)
        assert verdict(points).outcome is Outcome.CONVERGED, at


def test_the_turn_is_found_where_it_is():
    found = verdict(curve(SHAPES["sharp turn"][0], 20))
    assert found.best_step == 800  # t = 0.4
    assert abs(found.since - 800) <= 100
    assert found.rise == pytest.approx((2.65 - 1.15) / 1.15)  # medians of three: t = 0.95, and beside t = 0.4
    assert found.gap == pytest.approx(2.65 - 2 * math.exp(-5 * 0.95))
    assert str(found).startswith(f"overfitting since step {found.since}: ")
    assert "Stop: checkpoint-800 is the best" in str(found)
    assert f"{found.rise:.0%} above it now" in str(found)


def test_the_best_checkpoint_is_the_lowest_measured_loss():
    points = curve(SHAPES["sharp turn"][0], 20)
    points[5] = Point(600, points[5].train_loss, 0.9)  # a lucky evaluation: what a trainer keeps, but no turn
    found = verdict(points)
    assert found.best_step == 600
    assert abs(found.since - 800) <= 100


@pytest.mark.parametrize(("count", "best"), [(0, None), (1, 100), (2, 100), (4, 200)])
def test_too_few_points(count, best):
    found = verdict(curve(SHAPES["sharp turn"][0], count))
    assert found.outcome is Outcome.TOO_FEW
    assert found.best_step == best
    assert f"{MIN_POINTS} are needed" in str(found)
    assert verdict(curve(SHAPES["sharp turn"][0], MIN_POINTS)).outcome is not Outcome.TOO_FEW


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_loss_that_is_not_finite_is_divergence_however_few_points(count, broken):
    points = curve(SHAPES["steady fall"][0], count)
    for field in ("train", "held_out"):
        last = Point(5000, *((broken, 1.0) if field == "train" else (1.0, broken)))
        found = verdict([*points, last])
        assert (found.outcome, found.since) == (Outcome.DIVERGED, 5000)
        assert "lower learning rate" in found.advice
    assert "Start anew" in verdict([Point(1, broken, broken)]).advice


def test_advice_says_what_to_do_next():
    for name, expected in {
        "steady fall": "Train longer.",
        "flat": "train a larger model",
        "both rise": "Lower the learning rate",
        "slow turn": "more data",
    }.items():
        assert expected in verdict(curve(SHAPES[name][0], 20)).advice
    wide = verdict(curve(lambda t: (0.5, 1.0), 20))
    assert wide.outcome is Outcome.CONVERGED
    assert "more data" in wide.advice


def test_accuracy_that_rises_after_the_turn_is_named():
    points = [
        Point(p.step, p.train_loss, p.held_out_loss, accuracy=0.4 + 0.02 * i)
        for i, p in enumerate(curve(SHAPES["sharp turn"][0], 20))
    ]
    found = verdict(points)
    assert found.outcome is Outcome.OVERFITTING
    assert "checkpoint-800 has the lowest loss, checkpoint-2000 solves the most problems" in found.advice
    assert "to 78%" in found.reason


def test_steps_have_to_increase():
    points = curve(SHAPES["flat"][0], 6)
    with pytest.raises(ValueError, match="do not increase"):
        verdict([points[0], *points])


def test_points_of_a_log():
    records = [
        {"step": 0, "eval_loss": 5.0},  # nothing was trained before it
        {"step": 10, "loss": 9.0, "cross_entropy": 3.0},  # the loss holds more than the cross-entropy
        {"step": 20, "loss": 2.0},
        {"step": 20, "eval_loss": 2.5, "eval_accuracy": 0.25, "eval_illegal_traces": 0.5},
        {"step": 25, "eval_loss": 2.4},  # no log in between: the last one stands
        {"step": 30, "loss": 1.0},
        {"step": 30, "eval_loss": 9.9},
        {"step": 30, "eval_loss": 2.0},  # measured again after a restart
        {"step": 30, "train_runtime": 12.0},
    ]
    assert points_of(records) == [
        Point(20, 2.5, 2.5, 0.25, 0.5),
        Point(25, 2.5, 2.4),
        Point(30, 1.0, 2.0),
    ]


def test_a_loss_next_to_nothing_has_converged_though_it_falls_on():
    losses = [0.5 * 0.25**i for i in range(10)]
    found = verdict([Point(100 * i, 1.1 * loss, loss) for i, loss in enumerate(losses)])
    assert found.outcome is Outcome.CONVERGED
    level = f"{losses[-2]:.4g} nats per token (median of the last 3 evaluations)"  # not that of the best checkpoint
    assert f"the held-out loss is {level}, next to nothing" in str(found) and "checkpoint-900" in str(found)


def test_training_data_known_by_heart_are_not_convergence():
    points = [Point(100 * i, 0.0024, 0.68, accuracy=0.0) for i in range(1, 13)]
    found = verdict(points)
    assert found.outcome is Outcome.OVERFITTING
    assert "by heart (loss 0.0024)" in str(found) and "0.68 nats" in str(found) and "solves 0% of" in str(found)
    assert "more data" in found.advice and "Stop" not in found.advice


def test_convergence_says_what_is_solved():
    points = [Point(100 * i, 0.9, 1.0, accuracy=0.25) for i in range(1, 13)]
    assert "It solves 25% of the held-out problems." in verdict(points).reason


def test_deleted_checkpoints_are_not_advised():
    overfitted = curve(SHAPES["sharp turn"][0], 20)
    assert "step 800 (not kept, see trainer.save_total_limit) is the best" in verdict(overfitted, {1900, 2000}).advice
    assert "checkpoint-800 is the best" in verdict(overfitted, {800, 2000}).advice
    diverged = curve(SHAPES["both rise"][0], 20)
    best = verdict(diverged).best_step
    assert verdict(diverged, {best - 200, 2000}).advice.endswith(f"go on from checkpoint-{best - 200}.")
    assert verdict(diverged, ()).advice == "Lower the learning rate and start anew."
    assert "Start anew" in verdict([*diverged, Point(5000, math.nan, 1.0)], ()).advice
