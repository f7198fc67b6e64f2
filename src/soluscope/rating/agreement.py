"""Agreement: Cohen's kappa between two lists of answers to the same items, and the share of right answers.

Source: Cohen 1960, "A coefficient of agreement for nominal scales"; Clopper and Pearson 1934.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from soluscope.comparison.stats import Interval, bootstrap_sums

Floats = NDArray[np.float64]


def kappa(answers: Sequence[bool], others: Sequence[bool], n_draws: int = 2000) -> Interval:
    """Return Cohen's kappa of two answers per item, with an interval from resampling the items.

    1: all answers agree; 0: they agree as often as answers that are drawn at random at the same rates. nan, as a
    value, if all answers are the same.
    """
    one, two = np.asarray(answers, bool), np.asarray(others, bool)
    table = np.stack([one & two, one & ~two, ~one & two, ~one & ~two], axis=1).astype(float)
    return bootstrap_sums(table, _kappa, n=len(one), n_draws=n_draws)


def _kappa(sums: Floats) -> Floats:
    """Return kappa from the numbers of yes-yes, yes-no, no-yes and no-no, [draw 4]."""
    total = sums.sum(axis=1)
    agreed = (sums[:, 0] + sums[:, 3]) / total
    one, two = (sums[:, 0] + sums[:, 1]) / total, (sums[:, 0] + sums[:, 2]) / total
    by_chance = one * two + (1 - one) * (1 - two)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = (agreed - by_chance) / (1 - by_chance)
    return result


def share(n_of: int, n: int) -> tuple[float, float, float]:
    """Return a share with the exact bounds of its 95% interval."""
    bounds = binomtest(n_of, n).proportion_ci(0.95, "exact")
    return n_of / n, float(bounds.low), float(bounds.high)
