"""How sure a number is: intervals, paired tests, and what so many problems can tell at all.

Problems are the units. A score is 1 or 0 where a problem is answered once, and a share where it is answered k times
(avg@k) or under several seeds. Two runs are compared on the same problems, problem by problem, for they differ far less
from each other than problems do. The statistics themselves are those of scipy and statsmodels, imported when needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
"""Significance level of the tests, and one minus the confidence of the intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, within 0..1, and its 95 % confidence interval."""

    value: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class Paired:
    """Two runs on the same problems.

    Attributes:
        problems: their number.
        better: problems with a higher score in the second run.
        worse: problems with a lower one.
        difference: mean of second minus first, within -1..1; `low` and `high` are its 95 % confidence interval
            (percentiles of the paired bootstrap; where all problems change alike, see `paired`).
        p: of the two-sided test, named `test`, that there is no difference.
    """

    problems: int
    better: int
    worse: int
    difference: float
    low: float
    high: float
    p: float
    test: str


def estimate(scores: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Returns the mean of scores with the percentile interval of the bootstrap over problems.

    Where all scores are equal, resampling shows no spread although there is some: the interval is then the exact one of
    Clopper and Pearson for as many right answers (which takes a share of right ones as that share of a problem).

    Raises:
        ValueError: no scores, or one outside 0..1.
    """
    values = _checked(scores)
    mean = float(values.mean())
    if _all_equal(values):
        from statsmodels.stats.proportion import proportion_confint

        low, high = proportion_confint(mean * len(values), len(values), alpha=LEVEL, method="beta")
    else:
        low, high = np.quantile(_resampled_means(values, resamples, seed), [LEVEL / 2, 1 - LEVEL / 2])
    return Estimate(mean, float(low), float(high), len(values))


def paired(
    first: Mapping[int, float], second: Mapping[int, float], *, resamples: int = 10_000, seed: int = 0
) -> Paired:
    """Compares two runs problem by problem.

    Scores of 0 and 1 are tested by McNemar's exact test: among the problems on which the runs differ, each is equally
    often the better one if there is no difference. Shares are tested by the paired bootstrap: p is twice the share of
    resampled differences on the far side of zero, counting the observed one, so never below 2 / (resamples + 1). Nor is
    it below 2 / 2^d for d problems that differ, the least p of any exact paired test: few problems, all changed in one
    direction, look certain to a bootstrap.

    Where all problems change alike, resampling shows no spread either. With 97.5 % confidence at least a share s of all
    problems changes like that (Clopper and Pearson for n of n: s^n = 0.025); the rest may change by anything within
    -1..1, and the interval holds every mean that this allows.

    Raises:
        ValueError: the runs have different problems, or none.
    """
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[:5]
        raise ValueError(
            f"the runs have different problems (doc_id {', '.join(map(str, odd))}, ...); compare equal ones"
        )
    a = _checked([first[key] for key in sorted(first)])
    b = _checked([second[key] for key in sorted(first)])
    change = b - a
    means = _resampled_means(change, resamples, seed)
    low, high = _interval_of_equal(change) if _all_equal(change) else np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    once = bool(np.isin([a, b], [0.0, 1.0]).all())
    p = mcnemar_exact(better, worse) if once else max(_bootstrap_p(means), min(1.0, 2.0 ** (1 - better - worse)))
    test = "McNemar, exact" if once else "paired bootstrap"
    return Paired(len(change), better, worse, float(change.mean()), float(low), float(high), p, test)


def mcnemar_exact(better: int, worse: int) -> float:
    """Returns the two-sided p of McNemar's exact test from the numbers of problems that only one run got right."""
    from statsmodels.stats.contingency_tables import mcnemar

    return float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Returns the p values corrected for their number (Holm 1979): below 0.05 still means 5 % for all together."""
    if not ps:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(ps, alpha=LEVEL, method="holm")[1]]


def least_difference(differing: int) -> int | None:
    """Returns the least ``better - worse`` with which McNemar's exact test rejects at 5 %.

    Args:
        differing: problems on which the runs differ, ``better + worse``.

    Returns:
        the difference in problems, or None if so few cannot tell anything (fewer than 6).
    """
    outcomes = range(differing % 2, differing + 1, 2)
    return next((d for d in outcomes if mcnemar_exact((differing + d) // 2, (differing - d) // 2) < LEVEL), None)


def resolution(test: Paired) -> float | None:
    """Returns the least difference, within 0..1, that could be told from noise given how much these runs differ.

    For single answers by `least_difference`; for shares the half width of the interval. None if nothing could.
    """
    if test.test == "paired bootstrap":
        return (test.high - test.low) / 2
    least = least_difference(test.better + test.worse)
    return None if least is None else least / test.problems


def honest_sentence(problems: int, tests: Sequence[Paired] = ()) -> str:
    """Returns what a reader has to know before believing a difference between runs on so many problems.

    The floor needs no data: 6 problems that differ, all in one direction, have p = 2 / 2^6 = 0.031; 5 have 0.0625.
    """
    if problems < 6:
        return f"{problems} problems: no difference can be told from noise; run more."
    noise = "cannot be told from noise at the 5 % level"
    known = [100 * value for value in map(resolution, tests) if value is not None]
    span = f"{min(known):.1f} to {max(known):.1f}" if len(known) > 1 else f"{known[0]:.1f}" if known else ""
    if any(test.test == "paired bootstrap" for test in tests):
        return f"{problems} problems: for runs that differ as much as these, a difference under {span} points {noise}."
    floor = f"{problems} problems: a difference under {600 / problems:.1f} points {noise}."
    return f"{floor} For runs that differ as much as these, nor can one under {span} points." if known else floor


def _checked(scores: Sequence[float]) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise ValueError("there are no scores; run the task on at least one problem")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"scores reach from {values.min()} to {values.max()}; choose a metric within 0..1 with --metric"
        )
    return values


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of resampled problems, [resamples]; the same seed draws the same problems for every run."""
    if _all_equal(values):
        return np.full(resamples, values[0])
    from scipy.stats import bootstrap

    drawn = bootstrap((values,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed))
    return np.asarray(drawn.bootstrap_distribution)


def _all_equal(values: np.ndarray) -> bool:
    """Whether values are equal but for rounding: 1 - 2/3 and 1/3 are the same change."""
    return bool(np.ptp(values) < 1e-9)


def _interval_of_equal(change: np.ndarray) -> tuple[float, float]:
    """The interval of the mean of changes that are all the same; see `paired`."""
    sure = (LEVEL / 2) ** (1 / len(change))
    middle, rest = sure * float(change[0]), 1 - sure
    return middle - rest, middle + rest


def _bootstrap_p(means: np.ndarray) -> float:
    zero = 1e-9  # sums of thirds that cancel are not always 0 exactly
    tail = min((means <= zero).sum(), (means >= -zero).sum())
    return min(1.0, 2 * float(tail + 1) / (len(means) + 1))
