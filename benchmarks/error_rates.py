"""Rate at which the confirmatory family finds a change by training where there is none.

    python benchmarks/error_rates.py

Pairs of untrained models that differ only in their seed stand for trained runs and their initialisations. Each
study draws pairs from a pool of models, tests each probe of the family over its seeds, and corrects by Holm's
method. A family is wrong if any corrected p is below .05. No model occurs twice in a study.
"""

from __future__ import annotations

import gc

import numpy as np
from scipy.stats import binomtest

from soluscope import plugins
from soluscope.comparison import stats
from soluscope.evaluation.calibration import _tested, untrained_run

N_MODELS = 160
N_STUDIES = 2000
N_SEEDS = (4, 6, 8)


def numbers(name: str) -> np.ndarray:
    """Return the tested quantity of a probe on each untrained model of the pool; nan where it is undefined."""
    probe = plugins.pick("soluscope.probes", name)
    found = (_tested(probe, untrained_run(seed, probe.streams[0])) for seed in range(N_MODELS))
    return np.array(
        [np.nan if each is None else float(each.value(each.sums.sum(0)[None])[0]) for each in found]
    )


def main() -> None:
    """Print a table of error rates by number of seeds."""
    names = [
        name
        for name in plugins.names("soluscope.probes")
        if plugins.pick("soluscope.probes", name).confirmatory
    ]
    pool = {name: numbers(name) for name in names}
    gc.freeze()  # statsmodels collects garbage at each call, which takes .1 s on the models' objects
    print(f"{N_STUDIES} studies; family: {', '.join(names)}")
    print(
        "| seeds | any corrected p < .05 | 95% interval | single tests, uncorrected |\n| --- | --- | --- | --- |"
    )
    for n_seeds in N_SEEDS:
        generator = np.random.default_rng(n_seeds)
        n_wrong, n_single = 0, 0
        for _ in range(N_STUDIES):
            drawn = generator.choice(N_MODELS, size=(2, n_seeds), replace=False)
            p = {}
            for name, values in pool.items():
                found = stats.paired_seeds(values[drawn[0]] - values[drawn[1]]).p
                p[name] = 1.0 if found is None or np.isnan(found) else found
            n_wrong += min(stats.holm(p).values()) < 0.05
            n_single += sum(each < 0.05 for each in p.values())
        low, high = binomtest(n_wrong, N_STUDIES).proportion_ci()
        single = n_single / N_STUDIES / len(names)
        print(f"| {n_seeds} | {n_wrong / N_STUDIES:.3f} | {low:.3f} to {high:.3f} | {single:.3f} |")


if __name__ == "__main__":
    main()
