"""Share of intervals of blind ratings that contain the true value, and how often they find a difference of shares.

    python benchmarks/rating_coverage.py

Each trial draws the ratings of two arms from known shares and analyses them as `soluscope rate --analyse` does. The
log odds of a neuron are normal with standard deviation `sd`. Every rater judges every neuron once and a tenth of
them twice. *Kappa* is the agreement of two raters on an arm with the first share. The nominal coverage is 95%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from soluscope.rating import mixed, power

N_TRIALS = 200
N_RATERS = (1, 2, 3)
REPEATED = 0.1
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(200)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """The truth from which ratings are drawn."""

    shares: tuple[float, float]
    sd: float
    n_neurons: int = 60
    strictness: float = 0.0
    """Distance of two neighbouring raters in log odds."""


CASES = (
    Case((0.4, 0.6), 0.5), Case((0.4, 0.6), 1.5), Case((0.4, 0.6), 4.0), Case((0.05, 0.25), 1.5),
    Case((0.4, 0.6), 1.5, strictness=1.0), Case((0.4, 0.6), 1.5, n_neurons=20),
)  # fmt: skip


class Trial(NamedTuple):
    """Outcome of one trial."""

    difference: bool
    """True if the interval of the difference contains the true difference."""
    share: bool
    """True if the interval of the first arm's share contains the true share."""
    found: bool
    """True if the interval of the difference lies above 0."""


def mean_share(odds: float, sd: float) -> float:
    """Return the mean share of neurons whose log odds have this mean and standard deviation."""
    return float(expit(odds + sd * NODES) @ WEIGHTS / WEIGHTS.sum())


def odds_of(share: float, sd: float) -> float:
    """Return the mean log odds that give a share."""
    return float(brentq(lambda odds: mean_share(odds, sd) - share, -40, 40))


def kappa_of(share: float, sd: float) -> float:
    """Return Cohen's kappa of two raters of equal strictness."""
    squared = float(expit(odds_of(share, sd) + sd * NODES) ** 2 @ WEIGHTS / WEIGHTS.sum())
    return (squared - share**2) / (share * (1 - share))


def trial(rng: np.random.Generator, case: Case, n_raters: int) -> Trial:
    """Draw the ratings of one study and analyse them."""
    strict = case.strictness * (np.arange(n_raters) - (n_raters - 1) / 2)
    levels = [odds_of(share, case.sd) for share in case.shares]
    answers, cells, raters, neurons = [], [], [], []
    for cell, level in zip("ab", levels, strict=True):
        for i in range(case.n_neurons):
            effect = level + case.sd * rng.normal()
            for rater in range(n_raters):
                for _ in range(2 if i < REPEATED * case.n_neurons else 1):
                    answers.append(bool(rng.random() < expit(effect - strict[rater])))
                    cells.append(cell)
                    raters.append(str(rater))
                    neurons.append(f"{cell}{i}")
    fitted = mixed.fit(answers, cells, raters, neurons)
    low_true, high_true = (
        np.mean([mean_share(level - each, case.sd) for each in strict]) for level in levels
    )
    _, low, high = fitted.difference("b", "a")
    _, share_low, share_high = fitted.share("a")
    return Trial(
        difference=bool(low <= high_true - low_true <= high),
        share=bool(share_low <= low_true <= share_high),
        found=bool(low > 0),
    )


def main() -> None:
    """Print the tables of docs/intervals.md."""
    for case in CASES:
        cells = []
        for n_raters in N_RATERS:
            rng = np.random.default_rng(n_raters)
            done = np.array([trial(rng, case, n_raters) for _ in range(N_TRIALS)])
            cells.append("{:.3f}, {:.3f}, {:.2f}".format(*done.mean(axis=0)))
        kappa = kappa_of(case.shares[0], case.sd)
        predicted = ", ".join(
            f"{power.power(case.n_neurons, case.shares[1] - case.shares[0], n, kappa):.2f}"
            for n in N_RATERS
        )
        print("|", " | ".join([str(case), f"{kappa:.2f}", *cells, predicted]), "|", flush=True)


if __name__ == "__main__":
    main()
