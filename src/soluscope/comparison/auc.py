"""The AUC of two groups of numbers, with an interval that also holds where the groups hardly overlap.

Source: Hanley and McNeil 1982; Newcombe 2006, "Confidence intervals for an effect size measure based on the
Mann-Whitney statistic, part 2", method 5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import rankdata

from soluscope.comparison.stats import Interval

MIN_OF_GROUP = 5
"""Fewest numbers in each group for an interval."""
TINY = 1e-12


def auc(upper: ArrayLike, lower: ArrayLike) -> float:
    """Return the probability that one of `upper` exceeds one of `lower`; ties count as one half.

    nan if a group is empty.
    """
    groups = [np.asarray(each, np.float64) for each in (upper, lower)]
    n, m = map(len, groups)
    if not n or not m:
        return float("nan")
    ranks = rankdata(np.concatenate(groups))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def interval(upper: ArrayLike, lower: ArrayLike, level: float = 0.95) -> Interval:
    """Return the AUC with its interval; without bounds if a group has fewer than `MIN_OF_GROUP` numbers.

    The bounds are the values whose distance from the AUC is z standard errors, with the standard error that Hanley
    and McNeil derive for exponential groups, at that value.
    """
    value = auc(upper, lower)
    n, m = np.size(upper), np.size(lower)
    if min(n, m) < MIN_OF_GROUP:
        return Interval(value, None, None, n + m, n + m)
    z, pairs = float(ndtri((1 + level) / 2)), n * m
    more = (n + m) / 2 - 1

    def distance(at: float) -> float:
        """Return how many standard errors too far `at` is from the AUC, squared and scaled."""
        spread = 1 + more * ((1 - at) / (2 - at) + at / (1 + at))
        return (value - at) ** 2 - z**2 * at * (1 - at) * spread / pairs

    # At 0 and 1 the distance is 0 for a value there, which is not the bound on the other side.
    low = float(brentq(distance, 0.0, min(value, 1 - TINY))) if value > 0 else 0.0
    high = float(brentq(distance, max(value, TINY), 1.0)) if value < 1 else 1.0
    return Interval(value, low, high, n + m, n + m)
