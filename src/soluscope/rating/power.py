"""Power: how often a difference of shares is found, before anyone rates.

Answers of several people to one neuron are correlated, and kappa is their correlation. So n neurons with R raters
each are worth n R / (1 + (R - 1) kappa) answers to different neurons.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

BASE = 0.4
"""Lower share of the two. Elhage et al. 2022 found .35 to .4 in models without SoLU."""
LEVEL = 0.95
OFTEN = 0.85
"""Probability with which a difference should be found."""
KAPPA = 0.6
"""Agreement of two raters before any is known: between moderate and substantial (Landis and Koch 1977)."""


def power(n_neurons: int, difference: float, n_raters: int = 1, kappa: float = KAPPA) -> float:
    """Return the probability that the 95% interval of a risk difference does not contain 0.

    Args:
        n_neurons: neurons of each of two arms.
        difference: higher share minus lower share, which is `BASE`.
        n_raters: people who rate every neuron.
        kappa: agreement of two raters on a neuron.

    Source: normal approximation; the probability of a finding with the wrong sign is left out.
    """
    low, high = BASE, BASE + difference
    inflation = (1 + (n_raters - 1) * kappa) / n_raters
    se = np.sqrt((low * (1 - low) + high * (1 - high)) * inflation / n_neurons)
    return float(norm.sf(norm.isf((1 - LEVEL) / 2) - difference / se))


def detectable(n_neurons: int, n_raters: int = 1, kappa: float = KAPPA) -> float | None:
    """Return the least difference that is found in 85% of cases, or None where the share would exceed 1."""
    most = 1 - BASE - 1e-9
    if power(n_neurons, most, n_raters, kappa) < OFTEN:
        return None
    return float(
        brentq(lambda difference: power(n_neurons, difference, n_raters, kappa) - OFTEN, 1e-9, most)
    )


def sentence(n_neurons: int, n_raters: int) -> str:
    """Return the power of a plan in words."""
    people = "one rater" if n_raters == 1 else f"{n_raters} raters"
    found = power(n_neurons, 0.2, n_raters)
    least = detectable(n_neurons, n_raters)
    text = f"{n_neurons} neurons per arm and {people}: a difference of 20 points is found in {found:.0%} of cases"
    return text if least is None else f"{text}, one of {100 * least:.0f} points in {OFTEN:.0%}"
