"""Common numbers that follow from sums over strings, each as an `Estimate`.

Sums are over tokens, with one row per string. Resampling strings is then a matrix product whose cost does not
depend on the number of tokens. Values that are nan are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from soluscope.comparison.stats import centred, order_of
from soluscope.probes import Estimate

Floats = NDArray[np.float64]


def sums_by_string(parts: Iterable[ArrayLike], string: ArrayLike) -> tuple[Floats, int]:
    """Sum columns over each string's tokens.

    Args:
        parts: columns, each [token]; a token counts if none of its values is nan.
        string: index of each token's string.

    Returns:
        The sums, [string part], and the number of tokens that count.
    """
    table = np.stack([np.asarray(part, dtype=np.float64) for part in parts], axis=1)
    kept = ~np.isnan(table).any(axis=1)
    _, owner = np.unique(np.asarray(string)[kept], return_inverse=True)
    sums = np.zeros((int(owner.max()) + 1 if len(owner) else 0, table.shape[1]))
    np.add.at(sums, owner, table[kept])
    return sums, int(kept.sum())


def mean_over_strings(quantity: str, values: ArrayLike, **fields: object) -> Estimate:
    """Return the mean over strings of one value per string."""
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    sums = np.stack([numbers, np.ones_like(numbers)], axis=1)
    return _estimate(quantity, sums, _quotient, len(numbers), fields)


def ratio(
    quantity: str, top: ArrayLike, bottom: ArrayLike, string: ArrayLike, **fields: object
) -> Estimate:
    """Return the sum of `top` over the sum of `bottom`, both [token]: a ratio of means, not a mean of ratios."""
    sums, n = sums_by_string([top, bottom], string)
    return _estimate(quantity, sums, _quotient, n, fields)


def slope(
    quantity: str, x: ArrayLike, y: ArrayLike, string: ArrayLike, **fields: object
) -> Estimate:
    """Return the least-squares slope of `y` on `x`, both [token], with an intercept."""
    sums, n = sums_by_string(_moments(x, y), string)

    def value(sums: Floats) -> Floats:
        xy, xx, _ = _covariances(sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            result: Floats = np.where(xx > 0, xy / xx, np.nan)
        return result

    return _estimate(quantity, sums, value, n, fields)


def correlation(
    quantity: str, x: ArrayLike, y: ArrayLike, string: ArrayLike, **fields: object
) -> Estimate:
    """Return Pearson's correlation over tokens."""
    sums, n = sums_by_string(_moments(x, y), string)

    def value(sums: Floats) -> Floats:
        xy, xx, yy = _covariances(sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            result: Floats = np.where(xx * yy > 0, xy / np.sqrt(xx * yy), np.nan)
        return result

    return _estimate(quantity, sums, value, n, fields)


def rank_correlation(
    quantity: str,
    x: ArrayLike,
    y: ArrayLike,
    string: ArrayLike,
    given: Iterable[ArrayLike] = (),
    **fields: object,
) -> Estimate:
    """Return Spearman's correlation over tokens; with `given` columns, the partial correlation.

    Ranks are computed once, over all tokens; resampling changes only the weights of strings. The
    partial correlation is the correlation of the residuals of the two columns' ranks, regressed on the
    ranks of the `given` columns.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (x, y, *given)]
    kept = ~np.isnan(np.stack(columns)).any(axis=0)
    ranks = [rankdata(order_of(column[kept])) / max(1, kept.sum()) - 0.5 for column in columns]
    k = len(ranks)
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    parts = [np.ones(kept.sum()), *ranks, *(ranks[i] * ranks[j] for i, j in pairs)]
    sums, n = sums_by_string(parts, np.asarray(string)[kept])

    def value(sums: Floats) -> Floats:
        mean = sums[:, 1 : 1 + k] / sums[:, :1]
        covariance = np.empty((len(sums), k, k))
        for index, (i, j) in enumerate(pairs):
            joint = sums[:, 1 + k + index] / sums[:, 0] - mean[:, i] * mean[:, j]
            covariance[:, i, j] = covariance[:, j, i] = joint
        xy, others = covariance[:, :2, :2], covariance[:, :2, 2:]
        if k > 2:
            xy = xy - others @ np.linalg.pinv(covariance[:, 2:, 2:]) @ others.swapaxes(1, 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = xy[:, 0, 0] * xy[:, 1, 1]
            result: Floats = np.where(scale > 1e-20, xy[:, 0, 1] / np.sqrt(np.abs(scale)), np.nan)
        return result

    return _estimate(quantity, sums, value, n, fields)


def _moments(x: ArrayLike, y: ArrayLike) -> list[Floats]:
    """Return the columns 1, x, y, xy, xx and yy, with x and y centred.

    Without centring, the covariances would be differences of large squares, which lose digits.
    """
    a, b = (np.array(column, dtype=np.float64) for column in (x, y))
    kept = ~(np.isnan(a) | np.isnan(b))
    for column in (a, b):
        column[kept], column[~kept] = centred(column[kept]), np.nan
    return [np.where(kept, 1.0, np.nan), a, b, a * b, a * a, b * b]


def _covariances(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the covariances xy, xx and yy from sums of `_moments`."""
    n, x, y, xy, xx, yy = sums.T
    return xy / n - (x / n) * (y / n), xx / n - (x / n) ** 2, yy / n - (y / n) ** 2


def _quotient(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = sums[:, 0] / sums[:, 1]
    return result


def _estimate(
    quantity: str,
    sums: Floats,
    value: Callable[[Floats], Floats],
    n: int,
    fields: dict[str, object],
) -> Estimate:
    return Estimate(quantity, sums, value, n, **fields)  # type: ignore[arg-type]
