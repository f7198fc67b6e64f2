"""Proxy (b): how well a linear classifier predicts from a token and the text before it that a neuron is active.

Every token of the neuron's stored windows is an observation. It is active at `Seen.level` or above. Features: the
identity of the token, of each of the `N_ORDERED` tokens before it, and the set of the tokens further back in the
window. A logistic regression with a normal prior is fitted to half 0 of the documents. The number is its AUC on
half 1: the probability that an active token scores higher than another token of the same windows.

Pitfall: the classifier may learn many unrelated tokens, so a neuron of four classes is nearly as predictable as a
neuron of one: the mean AUC of planted neurons is .96 and .99. The AUC says whether text determines when the neuron
is active, and not whether one rule does.

Source: ours, after the linear classifiers of Gurnee et al. 2023, "Finding Neurons in a Haystack".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import expit, log_expit

from soluscope.comparison.auc import auc
from soluscope.proxies import Complete, Proxy, Seen

N_ORDERED = 3
"""Number of tokens before the current one whose distance counts."""
PRIOR_SD = 1.0
"""Standard deviation of the prior of a weight, in log odds."""
MIN_TOKENS = 10
"""Fewest active and fewest other tokens in each half."""

Floats = NDArray[np.float64]
Features = tuple[NDArray[np.int64], NDArray[np.int64]]


def bag_of_context(seen: Seen, _: Complete) -> float | None:
    """Return the AUC on half 1, in [0, 1]; None with fewer than `MIN_TOKENS` tokens of a kind in a half."""
    (tokens, is_active), (others, answers) = (_observations(seen, half) for half in (0, 1))
    counts = [part.sum() for part in (is_active, ~is_active, answers, ~answers)]
    if min(counts) < MIN_TOKENS:
        return None
    columns, indices = np.unique(tokens[1], return_inverse=True)
    train = _matrix(tokens[0], indices, len(is_active), len(columns))
    # A feature that half 0 lacks has no weight.
    at = np.searchsorted(columns, others[1]).clip(max=len(columns) - 1)
    known = columns[at] == others[1]
    test = _matrix(others[0][known], at[known], len(answers), len(columns))
    scores = test @ _weights(train, is_active)
    return auc(scores[answers], scores[~answers])


def _observations(seen: Seen, half: int) -> tuple[Features, NDArray[np.bool_]]:
    """Return the tokens of a half, each once: pairs of observation and feature; and whether each is active."""
    d_vocab = len(seen.vocabulary)
    known: set[tuple[int, int]] = set()
    rows: list[NDArray[np.int64]] = []
    is_active: list[bool] = []
    # The longest text before a token comes first, so that it is the text that counts.
    for window in sorted(
        (each for each in seen.windows if each.half == half), key=lambda w: w.start
    ):
        ordered = np.arange(1 + N_ORDERED) * d_vocab
        for at, value in enumerate(window.activations):
            place = (window.row, window.start + at)
            if place in known:
                continue
            known.add(place)
            near = window.tokens[max(0, at - N_ORDERED) : at + 1][::-1]
            far = np.unique(window.tokens[: max(0, at - N_ORDERED)])
            rows.append(np.concatenate([near + ordered[: len(near)], far + ordered[-1] + d_vocab]))
            is_active.append(bool(value >= seen.level))
    if not rows:
        return (np.zeros(0, np.int64), np.zeros(0, np.int64)), np.zeros(0, bool)
    owners = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
    return (owners, np.concatenate(rows)), np.array(is_active)


def _matrix(
    owners: NDArray[np.int64], columns: NDArray[np.int64], n: int, n_columns: int
) -> csr_array:
    return csr_array((np.ones(len(owners)), (owners, columns)), shape=(n, n_columns))


def _weights(features: csr_array, is_active: NDArray[np.bool_]) -> Floats:
    """Return the weights at the posterior mode, without the intercept, which does not change an order.

    Active and other tokens have equal total weight, because their numbers follow from the choice of windows.
    """
    sign = np.where(is_active, 1.0, -1.0)
    share = np.where(is_active, is_active.sum(), (~is_active).sum())
    weight = len(sign) / (2 * share)

    def loss(parameters: Floats) -> tuple[float, Floats]:
        odds = sign * (features @ parameters[:-1] + parameters[-1])
        slope = -weight * sign * expit(-odds)
        penalty = np.append(parameters[:-1], 0.0) / PRIOR_SD**2
        gradient = np.append(features.T @ slope, slope.sum()) + penalty
        return float(-weight @ log_expit(odds) + penalty @ parameters / 2), gradient

    start = np.zeros(features.shape[1] + 1)
    found: Floats = minimize(loss, start, jac=True, method="L-BFGS-B").x[:-1]
    return found


PROXY = Proxy(label="AUC of a bag-of-context classifier", unit="AUC", measure=bag_of_context)
