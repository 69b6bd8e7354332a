"""Estimates from the grades of many responses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from statistics import fmean, variance

logger = logging.getLogger(__name__)

LEVELS = ("low", "medium", "high", "top")
"""The levels of PolyMath, easiest first."""

LEVEL_WEIGHTS = {"low": 1, "medium": 2, "high": 4, "top": 8}
"""Weight of each level in the difficulty-weighted accuracy (PolyMath, arXiv 2504.18428): doubled at each step."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k samples is right, given c right ones among n.

    That is 1 − C(n−c, k) / C(n, k), the share of the k-subsets of the samples with a right one (arXiv 2107.03374).

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n={n}, c={c}, k={k}: 0 <= c <= n and 1 <= k <= n are needed; draw at least k samples")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_ks(n: int) -> list[int]:
    """Returns the k for which n samples give a pass@k: the powers of two and n; not 1, for pass@1 is avg@n."""
    powers = (2**i for i in range(1, n.bit_length()))
    return sorted({k for k in (*powers, n) if 2 <= k <= n})


def majority(answers: Sequence[str | None], right: Sequence[bool], same: Callable[[str, str], bool]) -> float:
    """Returns the chance that a vote over the samples of one problem elects a right answer.

    Equal answers vote together: all right ones by being equal to the gold, the others by `same`. A sample without an
    answer does not vote. The largest group wins; groups of one size win with equal chance (the mean over all orders of
    "first come wins ties"), so the value does not depend on the order of the samples.

    Args:
        answers: the extracted answer of each sample, None for none.
        right: whether each sample is right.
        same: tells whether two answers mean the same; asked only where its word decides.
    """
    mine = sum(right)
    others = [answer for answer, ok in zip(answers, right, strict=True) if answer is not None and not ok]
    if not mine or mine > len(others):
        return float(mine > 0)
    sizes = _group_sizes(others, same)
    top = max(sizes)
    return 0.0 if mine < top else 1.0 / (1 + sizes.count(top) * (mine == top))


def _group_sizes(answers: Sequence[str], same: Callable[[str, str], bool]) -> list[int]:
    """Sizes of the groups of answers that mean the same; each newcomer is compared with one member of each group."""
    counts: dict[str, int] = {}
    leader: dict[str, str] = {}
    for answer in answers:
        if answer not in leader:
            leader[answer] = next((head for head in counts if same(answer, head)), answer)
        counts[leader[answer]] = counts.get(leader[answer], 0) + 1
    return list(counts.values())


def difficulty_weighted(items: Sequence[tuple[str, float]]) -> float:
    """Returns the mean over levels of the levels' accuracies, weighted by `LEVEL_WEIGHTS`.

    Args:
        items: (level, accuracy of one problem in 0..1).

    Returns:
        A number in 0..1; NaN if a level has no problem (a low ``--limit``), for the mean of fewer levels would be
        another metric under the same name.
    """
    by_level = _by_level(items)
    missing = [level for level in LEVELS if not by_level[level]]
    if missing:
        logger.warning("dw_acc is not defined without problems of level %s; raise the limit to 4 or more", missing)
        return math.nan
    return sum(LEVEL_WEIGHTS[level] * fmean(by_level[level]) for level in LEVELS) / sum(LEVEL_WEIGHTS.values())


def difficulty_weighted_stderr(items: Sequence[tuple[str, float]]) -> float | str:
    """Returns the standard error of `difficulty_weighted`, the levels being independent samples.

    It is sqrt( Σ_level (w_level / Σw)² · s²_level / n_level ) with the sample variances s².

    Returns:
        A number, or lm-eval's "N/A" if a level has fewer than two problems.
    """
    by_level = _by_level(items)
    if any(len(values) < 2 for values in by_level.values()):
        return "N/A"
    squares = (LEVEL_WEIGHTS[level] ** 2 * variance(values) / len(values) for level, values in by_level.items())
    return math.sqrt(sum(squares)) / sum(LEVEL_WEIGHTS.values())


def _by_level(items: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    by_level: dict[str, list[float]] = {level: [] for level in LEVELS}
    for level, value in items:
        by_level[level].append(value)
    return by_level


def count(items: Sequence[Sequence[object]]) -> int:
    """Returns how many entries the lists hold together."""
    return sum(map(len, items))
