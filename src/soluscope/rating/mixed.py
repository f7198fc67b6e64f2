"""A mixed logistic model of ratings: cells and raters as fixed effects, neurons as random effects.

A cell is an arm at a stage. The log odds of "interpretable" are the cell's effect plus the rater's effect plus
the neuron's effect, which is normal. Effects are in marginal log odds, see `_stretch`. The neurons are
integrated out on a grid. The share of a cell is its mean over neurons and over these raters,
so it is on the scale of the plain shares. Raters are fixed: two or three people do not determine how much
people differ.

Intervals come from the normal approximation at the posterior mode; protocol.md has their simulated coverage. Of
the variational intervals of statsmodels' BinomialBayesMixedGLM, which treats raters as random, 83% of those of a
difference contained the truth with two raters (60 draws), because they ignore that effects depend on each other.

Source: protocol.md section 9.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp

Floats = NDArray[np.float64]
N_DRAWS = 4000
"""Draws from the posterior for an interval."""
N_NODES, REACH = 401, 6.0
"""Nodes of the integral over neurons, evenly from -REACH to REACH standard deviations. The answers of raters who
always agree give a step, on which the few nodes of Gauss-Hermite quadrature were off by .16 in a share."""
FIXED_SD, LOG_SD = 2.5, 1.0
"""Standard deviations of the priors: of log odds, and of the logarithm of the standard deviation of neurons. They
keep a cell finite in which all answers are equal."""
SLOPE = (16 * np.sqrt(3) / (15 * np.pi)) ** 2
"""The mean of expit(b + sd z) over a normal z is about expit(b / sqrt(1 + SLOPE sd^2)).

Source: Zeger, Liang and Albert 1988, "Models for longitudinal data", section 3.
"""
STEP = 1e-4
"""Step of the second derivatives, in log odds."""


@dataclass(frozen=True)
class Shares:
    """Estimated shares of the cells, and draws from their posterior."""

    cells: list[str]
    value: Floats
    """Shares [cell]."""
    draws: Floats
    """Shares [draw cell]."""
    sd_neurons: float | None
    """Standard deviation of the neurons' log odds. None: no neuron was rated twice."""

    def share(self, cell: str) -> tuple[float, float, float]:
        """Return a cell's share with the bounds of its 95% interval."""
        at = self.cells.index(cell)
        return _bounded(self.value[at], self.draws[:, at])

    def difference(self, cell: str, other: str) -> tuple[float, float, float]:
        """Return the share of a cell minus that of another, with the bounds of its 95% interval."""
        at, minus = self.cells.index(cell), self.cells.index(other)
        return _bounded(
            self.value[at] - self.value[minus], self.draws[:, at] - self.draws[:, minus]
        )


def fit(
    interpretable: Sequence[bool],
    cells: Sequence[str],
    raters: Sequence[str],
    neurons: Sequence[str],
    seed: int = 0,
) -> Shares:
    """Return the shares of cells from ratings, one element per rating."""
    names, cell_of = np.unique(cells, return_inverse=True)
    people, rater_of = np.unique(raters, return_inverse=True)
    distinct, owner = np.unique(neurons, return_inverse=True)
    design = np.concatenate(
        [np.eye(len(names))[cell_of], _contrasts(len(people))[rater_of]], axis=1
    )
    answers = np.where(np.asarray(interpretable, bool), 1.0, -1.0)
    has_neurons = len(distinct) < len(owner)
    model = _Model(answers, design, owner, len(distinct), has_neurons)
    mode = minimize(model, np.zeros(model.n), jac=True, method="BFGS", options={"gtol": 1e-6}).x
    drawn = np.random.default_rng(seed).multivariate_normal(mode, model.covariance(mode), N_DRAWS)
    value, draws = (
        _shares(each, len(names), len(people), has_neurons) for each in (mode[None], drawn)
    )
    sd = float(np.exp(mode[-1])) if has_neurons else None
    return Shares([str(each) for each in names], value[0], draws, sd)


class _Model:
    """The negative log posterior of the log odds and, last, of the log of the neurons' standard deviation."""

    def __init__(
        self,
        answers: Floats,
        design: Floats,
        owner: NDArray[np.intp],
        n_neurons: int,
        has_neurons: bool,
    ) -> None:
        self.answers, self.design, self.owner, self.n_neurons = answers, design, owner, n_neurons
        self.has_neurons = has_neurons
        self.n = design.shape[1] + has_neurons
        self.priors = np.full(self.n, FIXED_SD**-2)
        self.nodes, weights = _grid() if has_neurons else (np.zeros(1), np.ones(1))
        self.log_weights = np.log(weights)
        if has_neurons:
            self.priors[-1] = LOG_SD**-2

    def __call__(self, parameters: Floats) -> tuple[float, Floats]:
        """Return the negative log posterior and its gradient."""
        n_fixed = self.design.shape[1]
        sd = np.exp(parameters[-1]) if self.has_neurons else 0.0
        moves, odds = sd * self.nodes, self.design @ parameters[:n_fixed]  # [node], [rating]
        stretch = float(_stretch(sd))
        signed = self.answers[:, None] * ((stretch * odds)[:, None] + moves)  # [rating node]
        of_neuron = self._by_neuron(log_expit(signed)) + self.log_weights  # [neuron node]
        total = logsumexp(of_neuron, axis=1)
        posterior = np.exp(of_neuron - total[:, None])
        slopes = self.answers[:, None] * expit(-signed) * posterior[self.owner]  # [rating node]
        of_rating = slopes.sum(axis=1)
        of_sd = float((slopes * moves).sum() + of_rating @ odds * SLOPE * sd**2 / stretch)
        gradient = np.append(stretch * of_rating @ self.design, [of_sd] * self.has_neurons)
        penalty = self.priors * parameters
        return float(penalty @ parameters / 2 - total.sum()), penalty - gradient

    def _by_neuron(self, values: Floats) -> Floats:
        """Return the sums over each neuron's ratings, [neuron node]."""
        result = np.zeros((self.n_neurons, values.shape[1]))
        np.add.at(result, self.owner, values)
        return result

    def covariance(self, mode: Floats) -> Floats:
        """Return the inverse of the second derivatives at the mode."""
        second = np.array(
            [
                (self(mode + each)[1] - self(mode - each)[1]) / (2 * STEP)
                for each in np.eye(self.n) * STEP
            ]
        )
        return np.asarray(np.linalg.pinv((second + second.T) / 2, hermitian=True))


def _grid() -> tuple[Floats, Floats]:
    """Return the nodes of a standard normal variable and their weights."""
    nodes = np.linspace(-REACH, REACH, N_NODES)
    weights = np.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


def _stretch(sd: Floats | float) -> Floats:
    """Return the factor from marginal to conditional log odds.

    Marginal log odds describe the share over neurons. They are nearly independent of the neurons' standard
    deviation, which few ratings determine. With conditional log odds, the normal approximation gave intervals
    of shares that were too wide.
    """
    return np.asarray(np.sqrt(1 + SLOPE * np.square(sd)))


def _contrasts(n: int) -> Floats:
    """Return one row per rater, whose columns are orthogonal and sum to 0, so that cells are at the mean rater."""
    vectors = np.linalg.svd(np.eye(n) - 1 / n)[0]
    result: Floats = vectors[:, : n - 1]
    return result


def _shares(parameters: Floats, n_cells: int, n_raters: int, has_neurons: bool) -> Floats:
    """Return the mean over raters and neurons of each cell's share, [draw cell]."""
    sd = np.exp(parameters[:, -1]) if has_neurons else np.zeros(len(parameters))
    nodes, weights = _grid()
    of_rater = (
        parameters[:, n_cells : n_cells + n_raters - 1] @ _contrasts(n_raters).T
    )  # [draw rater]
    result = np.zeros((len(parameters), n_cells))
    for cell in range(
        n_cells
    ):  # one at a time, because [draw cell rater node] would not fit into memory
        for rater in range(n_raters):
            odds = (parameters[:, cell] + of_rater[:, rater]) * _stretch(sd)
            result[:, cell] += expit(odds[:, None] + sd[:, None] * nodes) @ weights / n_raters
    return result


def _bounded(value: float, draws: Floats) -> tuple[float, float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(value), float(low), float(high)
