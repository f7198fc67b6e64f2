"""Share of intervals that contain the true value, for intervals from resampling documents.

    python benchmarks/coverage.py

Each trial draws documents with sizes and effects, computes the interval of the mean over tokens as the
evaluation does, and asks whether it contains the mean over very many documents. Tokens of one document share an
effect, which has 30% of the variance of a token. The sizes are equal, or as those of the standard library's files,
capped or not. "none": the effective number of documents is below 20, so that there is no interval. The nominal
coverage is 95%.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from soluscope.comparison.stats import Interval, bootstrap_mean, cluster_bootstrap

N_TRIALS = 1000
N_DOCUMENTS = (20, 30, 60, 120)
SHARE = 0.3
"""Variance between documents, as a share of the variance of a token."""

Floats = NDArray[np.float64]
SIZES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "equal": lambda rng, n: np.full(n, 330.0),
    "capped at 500": lambda rng, n: np.ceil(np.minimum(rng.lognormal(7.5, 1.4, n), 500)),
    "not capped": lambda rng, n: np.ceil(np.minimum(rng.lognormal(7.5, 1.4, n), 50_000)),
}
EFFECTS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "lognormal": lambda rng, n: (rng.lognormal(0, 1, n) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e),
}
STATISTICS = ("mean", "median", "sd", "q05", "share above 1")


def contains(found: Interval, truth: float) -> bool | None:
    """Return whether an interval contains the true value; None without an interval."""
    if found.low is None or found.high is None:
        return None
    return found.low <= truth <= found.high


def counted(hits: list[bool | None]) -> str:
    """Return the share of intervals that contain the true value, and how often there was none."""
    given = [hit for hit in hits if hit is not None]
    none = len(hits) - len(given)
    if none > len(hits) / 2:
        return "none"
    return f"{np.mean(given):.3f}" + (f" (none: {none / len(hits):.0%})" if none else "")


def of_mean(size: str, effect: str, n: int) -> str:
    """Return the coverage of the interval of a mean over documents."""
    rng = np.random.default_rng(n)
    hits = []
    for _ in range(N_TRIALS):
        sizes, effects = SIZES[size](rng, n), EFFECTS[effect](rng, n)
        noise = rng.standard_normal(n) * np.sqrt(sizes * (1 - SHARE))
        hits.append(contains(bootstrap_mean(np.sqrt(SHARE) * effects * sizes + noise, sizes), 0))
    return counted(hits)


def of_statistic(statistic: str, n: int, n_tokens: int = 60) -> str:
    """Return the coverage of a statistic of tokens in equal documents with normal values."""
    from scipy.stats import norm

    truth = {"mean": 0, "median": 0, "sd": 1, "q05": norm.ppf(0.05), "share above 1": norm.sf(1)}
    rng = np.random.default_rng(n)
    documents = np.repeat(np.arange(n), n_tokens)
    hits = []
    for _ in range(N_TRIALS):
        values = np.sqrt(SHARE) * rng.standard_normal(n)[documents]
        values += np.sqrt(1 - SHARE) * rng.standard_normal(len(documents))
        hits.append(contains(cluster_bootstrap(values, documents, statistic), truth[statistic]))
    return counted(hits)


def main() -> None:
    """Print a table of coverages by number of documents."""
    head = " | ".join(f"{n} documents" for n in N_DOCUMENTS)
    print(f"{N_TRIALS} trials each; nominal coverage 0.95\n")
    print(f"| sizes, effects | {head} |\n| --- |{' --- |' * len(N_DOCUMENTS)}")
    for size in SIZES:
        for effect in EFFECTS:
            shares = " | ".join(of_mean(size, effect, n) for n in N_DOCUMENTS)
            print(f"| mean, sizes {size}, {effect} effects | {shares} |", flush=True)
    for statistic in STATISTICS:
        shares = " | ".join(of_statistic(statistic, n) for n in N_DOCUMENTS)
        print(f"| {statistic}, equal sizes, normal values | {shares} |", flush=True)


if __name__ == "__main__":
    main()
