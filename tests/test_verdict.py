"""Verdicts on made-up curves, clean and noisy."""

import math
import random
import re

import pytest

from hcot_lmeval.training.verdict import FEWEST, Levels, Point, points_of, verdict

SHAPES = {
    "steady fall": (lambda t: (2 - t, 2.05 - t), "still learning"),
    "exponential fall": (lambda t: (1 + 2 * math.exp(-2 * t), 1.02 + 2 * math.exp(-2 * t)), "still learning"),
    "fall by half each": (lambda t: (2 ** (-8 * t), 2 ** (1 - 8 * t)), "still learning"),
    "plateau": (lambda t: (1 + 2 * math.exp(-20 * t), 1.02 + 2 * math.exp(-20 * t)), "converged"),
    "flat": (lambda t: (1.0, 1.0), "converged"),
    "solved": (lambda t: (3 * math.exp(-25 * t) + 1e-4, 3 * math.exp(-25 * t) + 2e-4), "converged"),
    "slow turn": (
        lambda t: (2 * math.exp(-3 * t) + 0.1, 1 + math.exp(-12 * t) + 0.35 * max(0.0, t - 0.3)),
        "overfitting",
    ),
    "sharp turn": (lambda t: (2 * math.exp(-5 * t), 1 + 3 * abs(t - 0.4)), "overfitting"),
    "turn of small losses": (lambda t: (0.1 * math.exp(-5 * t), 0.02 + 0.1 * abs(t - 0.4)), "overfitting"),
    "both rise": (
        lambda t: (1 + math.exp(-10 * t) + 3 * max(0.0, t - 0.6), 1.1 + math.exp(-10 * t) + 3 * max(0.0, t - 0.6)),
        "diverged",
    ),
    "held-out rise with a smaller one of training": (
        lambda t: (1 + 0.3 * abs(t - 0.5), 1 + 0.4 * abs(t - 0.5)),
        "diverged",
    ),
}


def curve(name, count, noise=0.0, seed=0):
    """Records of `count` evaluations over t in (0, 1], 100 steps apart, each loss times a log-normal error."""
    shape, rng = SHAPES[name][0], random.Random(seed)
    records = []
    for number in range(1, count + 1):
        trained, held_out = (loss * math.exp(rng.gauss(0, noise)) for loss in shape(number / count))
        records += [{"step": 100 * number, "loss": trained}, {"step": 100 * number, "eval_loss": held_out}]
    return records


@pytest.mark.parametrize("count", [8, 20, 60])
@pytest.mark.parametrize("name", SHAPES)
def test_clean_curves(name, count):
    assert verdict(curve(name, count)).startswith(SHAPES[name][1])


@pytest.mark.parametrize(("count", "noise"), [(8, 0.003), (20, 0.01), (60, 0.02)])
@pytest.mark.parametrize("name", SHAPES)
def test_noise_changes_no_verdict(name, count, noise):
    found = [verdict(curve(name, count, noise, seed)) for seed in range(25)]
    assert sum(said.startswith(SHAPES[name][1]) for said in found) >= 23, found


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03, 0.1])
def test_noise_is_measured_whatever_the_trend(noise):
    rng, level = random.Random(0), 1.2  # mean of the curve
    values = [(1 + math.exp(-5 * n / 400)) * math.exp(rng.gauss(0, noise)) for n in range(400)]
    assert Levels(values).noise == pytest.approx(noise * level, rel=0.25, abs=1e-6)


def test_one_outlier_is_no_turn_wherever_it_is():
    for at in range(12):
        records = curve("plateau", 12)
        records[2 * at + 1]["eval_loss"] *= 1.5
        assert verdict(records).startswith("converged"), at


def test_the_turn_is_found_where_it_is_and_told_with_what_to_do():
    solved = [{"step": step, "eval_accuracy": 1 - step / 4000} for step in range(100, 2001, 100)]
    said = verdict([*curve("sharp turn", 20), *solved])
    turn = re.match(r"overfitting since step (700|800|900): the held-out loss turned there at 1.15 ", said)
    assert turn, said
    rise = (2.65 - 1.15) / 1.15  # medians of three: t = 0.95, and beside t = 0.4
    assert f"is {rise:.0%} above it now, {2.65 - 2 * math.exp(-5 * 0.95):.2g} nats above the training loss" in said
    assert f"It solves 50% of the held-out problems, {1 - int(turn[1]) / 4000:.0%} at step {turn[1]}." in said
    assert "Stop: step 800 has the lowest held-out loss, 1; for more, train on more data" in said


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("steady fall", "Train longer."),
        ("flat", "train a larger model"),
        ("both rise", "Start anew with a lower learning rate"),
        ("slow turn", "train on more data"),
    ],
)
def test_advice_says_what_to_do_next(name, advice):
    assert advice in verdict(curve(name, 20))


def test_data_known_by_heart_call_for_more_of_them():
    records = [{"step": n, "loss": 0.0024, "eval_loss": 0.68, "eval_accuracy": 0.25} for n in range(1, 13)]
    said = verdict(records)
    assert said.startswith("converged") and "It solves 25% of the held-out problems." in said
    assert "0.68 nats above the training loss" in said and "more data would help more than more steps" in said


@pytest.mark.parametrize("count", range(FEWEST))
def test_too_few_evaluations(count):
    assert f"too few evaluations to tell: {count}, and {FEWEST} are needed" in verdict(curve("sharp turn", count))
    assert not verdict(curve("sharp turn", FEWEST)).startswith("too few")


@pytest.mark.parametrize("broken", [{"loss": math.nan}, {"eval_loss": math.nan}, {"eval_loss": math.inf}])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_loss_that_is_not_finite_is_divergence_however_few_evaluations(count, broken):
    last = {"step": 5000, "loss": 1.0, "eval_loss": 1.0} | broken
    said = verdict([*curve("steady fall", count), last])
    assert said.startswith("diverged by step 5000: a loss is not finite") and "lower learning rate" in said


def test_a_loss_next_to_nothing_has_converged_though_it_falls_on():
    records = [{"step": n, "loss": 0.5 * 0.25**n, "eval_loss": 0.5 * 0.25**n} for n in range(12)]
    assert verdict(records).startswith("converged")


def test_points_of_a_log():
    records = [
        {"step": 0, "eval_loss": 5.0},  # nothing was trained before it
        {"step": 10, "loss": 9.0, "cross_entropy": 3.0},  # the loss holds more than the cross-entropy
        {"step": 20, "loss": 2.0},
        {"step": 20, "eval_loss": 2.5, "eval_accuracy": 0.25},
        {"step": 25, "eval_loss": 2.4},  # no log in between: the last one stands
        {"step": 30, "loss": 1.0},
        {"step": 30, "eval_loss": 9.9},
        {"step": 30, "eval_loss": 2.0},  # measured again after a restart
        {"step": 30, "train_runtime": 12.0},
    ]
    assert points_of(records) == [Point(20, 2.5, 2.5, 0.25), Point(25, 2.5, 2.4), Point(30, 1.0, 2.0)]
