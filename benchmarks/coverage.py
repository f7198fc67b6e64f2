"""Share of intervals that contain the true value, for intervals from resampling documents.

    python benchmarks/coverage.py
    python benchmarks/coverage.py runs/demo/solu_ln-s0-kappa4e-5

Each trial draws documents with sizes and effects, computes the interval of the mean over tokens as the
evaluation does, and asks whether it contains the mean over very many documents. Tokens of one document share an
effect, which has 30% of the variance of a token. The sizes are equal, or as those of the standard library's files,
capped at 500 tokens as in every evaluation. "none": the effective number of documents is below 30, so that there is
no interval. The nominal coverage is 95%.

With the folder of a run, a trial draws documents of that run's held-out text, with replacement, and the true value
is that of all its documents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from soluscope.comparison.stats import (
    Interval,
    bootstrap_mean,
    cluster_bootstrap,
    statistic_difference,
)

N_TRIALS = {"mean": 4000, "statistic": 1000}
"""Trials per cell of a mean or a difference of two, and of another statistic, which takes longer."""
N_DOCUMENTS = (20, 30, 60, 120)
SHARE = 0.3
"""Variance between documents, as a share of the variance of a token."""

Floats = NDArray[np.float64]
SIZES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "equal": lambda rng, n: np.full(n, 330.0),
    "capped at 500": lambda rng, n: np.ceil(np.minimum(rng.lognormal(7.5, 1.4, n), 500)),
}
EFFECTS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "lognormal": lambda rng, n: (rng.lognormal(0, 1, n) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e),
}
TRUTH = {
    "median": 0, "sd": 1, "q01": norm.ppf(0.01), "q05": norm.ppf(0.05), "q25": norm.ppf(0.25),
    "share above 1": norm.sf(1),
}  # fmt: skip
"""Values of standard normal tokens."""
OF_RUN = ("mean", "median", "sd", "q01", "q05", "q95", "q99")
N_TRIALS_OF_RUN = 500
N_TOKENS = 400_000


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
    for _ in range(N_TRIALS["mean"]):
        sizes, effects = SIZES[size](rng, n), EFFECTS[effect](rng, n)
        noise = rng.standard_normal(n) * np.sqrt(sizes * (1 - SHARE))
        hits.append(contains(bootstrap_mean(np.sqrt(SHARE) * effects * sizes + noise, sizes), 0))
    return counted(hits)


def of_statistic(statistic: str, n: int, n_tokens: int = 60) -> str:
    """Return the coverage of a statistic of tokens in equal documents with normal values."""
    rng = np.random.default_rng(n)
    documents = np.repeat(np.arange(n), n_tokens)
    hits = []
    for _ in range(N_TRIALS["statistic"]):
        values = np.sqrt(SHARE) * rng.standard_normal(n)[documents]
        values += np.sqrt(1 - SHARE) * rng.standard_normal(len(documents))
        hits.append(contains(cluster_bootstrap(values, documents, statistic), TRUTH[statistic]))
    return counted(hits)


def of_difference(effect: str, n: int, n_tokens: int = 60) -> str:
    """Return the coverage of a difference of two models' means; the models share one of the documents' effects."""
    rng = np.random.default_rng(n)
    documents = np.repeat(np.arange(n), n_tokens)
    hits = []
    for _ in range(N_TRIALS["mean"]):
        shared, own = EFFECTS[effect](rng, n), EFFECTS[effect](rng, n)
        left, right = (np.sqrt(1 - SHARE) * rng.standard_normal(len(documents)) for _ in range(2))
        left += np.sqrt(SHARE) * (shared + own)[documents]
        right += np.sqrt(SHARE) * shared[documents]
        hits.append(contains(statistic_difference(left, right, documents), 0))
    return counted(hits)


def of_run(folder: Path) -> None:
    """Print a table of coverages for documents of a run's held-out text, by number of documents."""
    from soluscope.data.streams import from_cache
    from soluscope.evaluation.one_run import tokens_of
    from soluscope.hooked.activations import observe
    from soluscope.hooked.convert import load_run
    from soluscope.runs.folder import Run

    run = Run(folder)
    model, cache = load_run(run), tokens_of(run)
    observed = observe(model, from_cache(cache, "report", model.facts.ctx, N_TOKENS, "report"))
    content = ~observed.is_bos
    owner = np.unique(observed.string[content].numpy(), return_inverse=True)[1]
    places = [np.flatnonzero(owner == document) for document in range(owner.max() + 1)]
    columns = {"log gain": observed.gain.log(), "r": observed.engagement, "loss": observed.loss}
    print(
        f"{folder}: {len(places)} documents, {len(owner)} tokens; {N_TRIALS_OF_RUN} trials each\n"
    )
    for name, column in columns.items():
        values = column[content].double().numpy()
        values = np.where(np.isfinite(values), values, np.nan)
        for statistic in OF_RUN:
            truth = cluster_bootstrap(values, owner, statistic, n_draws=1).value
            shares = [of_drawn(values, places, statistic, truth, n) for n in (40, 60)]
            print(f"| {statistic} of {name} | {' | '.join(shares)} |", flush=True)


def of_drawn(
    values: Floats, places: list[NDArray[np.intp]], statistic: str, truth: float, n: int
) -> str:
    """Return the coverage of a statistic of `n` documents drawn from those whose values lie at `places`."""
    rng = np.random.default_rng(n)
    hits = []
    for _ in range(N_TRIALS_OF_RUN):
        drawn = [places[document] for document in rng.choice(len(places), n)]
        names = np.repeat(np.arange(n), [len(each) for each in drawn])
        found = cluster_bootstrap(values[np.concatenate(drawn)], names, statistic, 1000)
        hits.append(contains(found, truth))
    return counted(hits)


def main() -> None:
    """Print a table of coverages by number of documents."""
    if len(sys.argv) > 1:
        of_run(Path(sys.argv[1]))
        return
    head = " | ".join(f"{n} documents" for n in N_DOCUMENTS)
    print(f"{N_TRIALS} trials; nominal coverage 0.95\n")
    print(f"| sizes, effects | {head} |\n| --- |{' --- |' * len(N_DOCUMENTS)}")
    for size in SIZES:
        for effect in EFFECTS:
            shares = " | ".join(of_mean(size, effect, n) for n in N_DOCUMENTS)
            print(f"| mean, sizes {size}, {effect} effects | {shares} |", flush=True)
    for effect in EFFECTS:
        shares = " | ".join(of_difference(effect, n) for n in N_DOCUMENTS)
        print(f"| difference of two means, sizes equal, {effect} effects | {shares} |", flush=True)
    for statistic in TRUTH:
        shares = " | ".join(of_statistic(statistic, n) for n in N_DOCUMENTS)
        print(f"| {statistic}, equal sizes, normal values | {shares} |", flush=True)


if __name__ == "__main__":
    main()
