"""What a few runs with different seeds say: means with intervals, paired differences, and how many comparisons allow.

Plain functions on numbers; accuracies are in per cent, so differences are in percentage points.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

NO_SPREAD = 1e-9
"""A deviation below it is rounding error: the values are the same."""


class Estimate(NamedTuple):
    """A mean, and how far it is known."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the values (n - 1 in the denominator); None of one value."""
    low: float | None
    high: float | None
    """Interval of the mean by Student's t; None where the values have no spread that could give one."""


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean, standard deviation and interval of the mean: mean +- t(n - 1) sd / sqrt(n).

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("an estimate needs one value or more")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(n, mean, None, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if sd < NO_SPREAD:
        return Estimate(n, mean, 0.0, None, None)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - half, mean + half)


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's paired t-test that the mean difference is 0; None where there is no spread."""
    found = estimate(differences)
    if found.low is None:
        return None
    return float(2 * stats.t.sf(abs(found.mean) / (found.sd / math.sqrt(found.n)), found.n - 1))


def sign_flip_test(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of the sign-flip test: if the pairs' order meant nothing, each sign could be the other.

    It is the share of the 2^n ways to choose the signs whose sum is as far from 0 as the observed one or farther,
    2 / 2^n at the least. Sums are counted, not enumerated: accuracies are whole numbers of images, so few sums differ.
    """
    sums = Counter({0.0: 1})
    for difference in differences:
        following: Counter[float] = Counter()
        for value, count in sums.items():
            for signed in (difference, -difference):
                following[round(value + signed, 6)] += count
        sums = following
    observed = abs(math.fsum(differences)) - 1e-4  # for rounding: an image of a million
    return sum(count for value, count in sums.items() if abs(value) >= observed) / 2 ** len(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: with a limit on them, the chance of one false finding or more is below the limit."""
    order, adjusted, largest = sorted(range(len(p_values)), key=lambda i: p_values[i]), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def binomial_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy (per cent) from having so many test images and no others: sqrt(p (1 - p) / n)."""
    share = accuracy / 100
    return 100 * math.sqrt(share * (1 - share) / images)
