"""Intervals and tests against scipy, statsmodels, hand-computed values and simulation."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pytest
from scipy import stats

from hcot_lmeval.report.statistics import (
    Paired,
    estimate,
    holm,
    honest_sentence,
    least_difference,
    mcnemar_exact,
    paired,
    resolution,
)


def keyed(scores) -> dict[int, float]:
    return dict(enumerate(scores))


def test_interval_is_scipys_percentile_bootstrap() -> None:
    scores = [1.0] * 13 + [0.0] * 17
    found = estimate(scores, resamples=2000, seed=4)
    settings = {"n_resamples": 2000, "method": "percentile", "rng": np.random.default_rng(4)}
    expected = stats.bootstrap((np.array(scores),), np.mean, confidence_level=0.95, **settings).confidence_interval
    assert (found.value, found.problems) == (pytest.approx(13 / 30), 30)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_interval_of_equal_scores_is_clopper_and_pearsons() -> None:
    # n right of n: the lower end solves x^n = 0.025
    assert estimate([1.0] * 30).low == pytest.approx(0.025 ** (1 / 30)) and estimate([1.0] * 30).high == 1
    assert estimate([0.0] * 30).high == pytest.approx(1 - 0.025 ** (1 / 30)) and estimate([0.0] * 30).low == 0


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.random((200, 60)) < 0.3
    found = [estimate(row.astype(float), resamples=400) for row in draws]
    assert 0.88 <= np.mean([e.low <= 0.3 <= e.high for e in found]) <= 0.99


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (6, 0), (5, 0), (9, 3), (3, 9), (40, 22), (7, 7)])
def test_mcnemar_is_the_binomial_test(better: int, worse: int) -> None:
    n, k = better + worse, min(better, worse)
    by_hand = min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar_exact(better, worse) == pytest.approx(by_hand)
    assert mcnemar_exact(better, worse) == pytest.approx(stats.binomtest(k, n).pvalue if n else 1.0)


def test_pairs_are_counted_problem_by_problem() -> None:
    first, second = keyed([1, 1, 1, 0, 0, 0, 0, 0, 0, 1]), keyed([1, 0, 1, 1, 1, 1, 1, 1, 0, 1])
    found = paired(first, second)
    assert (found.problems, found.better, found.worse, found.test) == (10, 5, 1, "McNemar, exact")
    assert found.difference == pytest.approx(0.4) and found.p == pytest.approx(stats.binomtest(1, 6).pvalue)
    back = paired(second, first)
    assert (back.better, back.worse, back.p) == (1, 5, found.p) and back.difference == -found.difference


def test_pairs_do_not_depend_on_the_order_of_the_problems() -> None:
    first, second = keyed([1, 0, 0, 1]), keyed([0, 0, 1, 1])
    shuffled = {key: second[key] for key in (2, 0, 3, 1)}
    assert paired(first, second) == paired(first, shuffled)


def test_shares_are_tested_by_the_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    base = rng.integers(0, 9, 40) / 8
    same = np.clip(base + rng.choice([-1, 1], 40) / 8, 0, 1)
    much = np.clip(base + 0.5, 0, 1)
    none, large = paired(keyed(base), keyed(same)), paired(keyed(base), keyed(much))
    assert none.test == large.test == "paired bootstrap"
    assert none.p > 0.05 and none.low < 0 < none.high
    assert large.p == pytest.approx(2 / 10_001) and large.low > 0
    assert large.difference == pytest.approx(float((much - base).mean()))


def test_equal_changes_are_no_certainty() -> None:
    """Of 30 problems all changed alike, so 0.025^(1/30) = 88.4 % of all at least; what the others do is not known."""
    sure = 0.025 ** (1 / 30)
    for a, b, change in ((0, 1, 1), (1, 0, -1), (1, 1, 0), (0.25, 0.5, 0.25)):
        found = paired(keyed([a] * 30), keyed([b] * 30))
        assert found.difference == pytest.approx(change)
        assert (found.low, found.high) == pytest.approx((sure * change - (1 - sure), sure * change + (1 - sure)))
        assert -1 <= found.low < found.high <= 1
    alike = paired(keyed([0.25, 0.75] * 15), keyed([0.25, 0.75] * 15))
    assert alike.p == 1 and "under 11.6 points cannot be told" in honest_sentence(30, [alike])


def test_interval_of_equal_changes_covers_the_truth() -> None:
    """Whatever share of problems differs: runs without a difference in the sample are 1 in 40 at most, or covered."""
    for n, share in itertools.product((10, 30, 100), (0.01, 0.05, 0.1, 0.3)):
        found = paired(keyed([0] * n), keyed([0] * n))
        assert (1 - share) ** n <= 0.025 or found.low <= share <= found.high


def test_shares_of_few_problems_are_no_surer_than_an_exact_test() -> None:
    for n in (1, 2, 5, 6):
        found = paired(keyed([0.25] * n), keyed([0.5 + 0.1 * i / n for i in range(n)]))
        assert found.test == "paired bootstrap" and found.p == pytest.approx(2 / 2**n)
        assert (found.p < 0.05) == (n >= 6)


def test_differences_that_cancel_count_on_both_sides_of_zero() -> None:
    """Thirds do not cancel exactly; tenths of a p value must not hang on that."""
    rng = np.random.default_rng(2)
    base = rng.integers(0, 4, 12)
    other = rng.permutation(base)
    change = other - base
    drawn = change[np.random.default_rng(0).integers(0, 12, (20_000, 12))].sum(axis=1)  # in whole thirds
    expected = min(1.0, 2 * min((drawn <= 0).mean(), (drawn >= 0).mean()))
    assert paired(keyed(base / 3), keyed(other / 3), resamples=20_000).p == pytest.approx(expected, abs=0.02)


def test_bootstrap_p_is_rarely_small_without_a_difference() -> None:
    rng = np.random.default_rng(5)
    ps = []
    for _ in range(200):
        a, b = rng.binomial(4, 0.5, (2, 50)) / 4
        ps.append(paired(keyed(a), keyed(b), resamples=400).p)
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.10


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_least_difference_by_trying_all_outcomes() -> None:
    for differing in range(25):
        rejecting = [
            b - (differing - b)
            for b in range(differing + 1)
            if 2 * b >= differing and differing and stats.binomtest(b, differing).pvalue < 0.05
        ]
        assert least_difference(differing) == (min(rejecting) if rejecting else None)
    assert [least_difference(d) for d in (5, 6)] == [None, 6]


def test_no_outcome_under_the_floor_is_significant() -> None:
    """30 problems: 6 of them are 20 points; whatever the rest does, a smaller difference is never significant."""
    for better, worse in itertools.product(range(31), repeat=2):
        if better + worse <= 30 and abs(better - worse) < 6:
            assert mcnemar_exact(better, worse) >= 0.05


def test_the_honest_sentence() -> None:
    assert honest_sentence(30) == (
        "30 problems: a difference under 20.0 points cannot be told from noise at the 5 % level."
    )
    assert "no difference can be told" in honest_sentence(5)
    test = paired(keyed([0] * 98 + [1, 1]), keyed([1] * 10 + [0] * 90))
    assert honest_sentence(100, [test]).endswith("nor can one under 8.0 points.")  # 10 to 2 of 12: p = 0.039
    assert resolution(test) == pytest.approx(0.08)
    shares = Paired(50, 20, 10, 0.1, 0.02, 0.18, 0.03, "paired bootstrap")
    said = honest_sentence(50, [shares])
    assert said.startswith(
        "50 problems: for runs that differ as much as these, a difference under 8.0 points cannot be told"
    )


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match="no scores"):
        estimate([])
    with pytest.raises(ValueError, match=r"reach from 0\.0 to 55\.0.*--metric"):
        estimate([0, 55])
    with pytest.raises(ValueError, match="doc_id 1, 2"):
        paired({0: 1, 1: 0}, {0: 1, 2: 0})


def test_changes_that_are_equal_but_for_rounding() -> None:
    """0 -> 1/3 and 2/3 -> 1 are the same change; the bootstrap would give it an interval of no width."""
    first = {n: (n % 3) / 3 for n in range(12)}
    found = paired(first, {n: (n % 3 + 1) / 3 for n in range(12)})
    assert found.high - found.low > 0.3 and found.low < found.difference < found.high
    assert estimate([1 / 3, 1 - 2 / 3, 0.1 + 0.7 / 3]).high > 0.4
