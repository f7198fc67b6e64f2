"""Effect of choosing the static arm at the seeds that are reported, or at other seeds.

    python benchmarks/selection.py

A study has K static arms with equal true losses and one arm with a per-token norm. Each arm's loss varies between
seeds with an sd of .003 nats. The static arm with the least mean loss is chosen, at the 8 reported seeds or at 3
select seeds, and compared with the other arm at the 8 reported seeds. Documents add no error. The table gives the
mean error of static minus LN, how often it is called equivalent (within .005 nats) if the true difference is .005,
and how often its sign-flip p is below .05 if the true difference is .003. The nominal rate of the second is 5%.
"""

from __future__ import annotations

import numpy as np

from soluscope.comparison.stats import (
    equivalence,
    expected_maximum,
    paired_seeds,
)
from soluscope.results import MARGIN

N_STUDIES = 4000
N_SEEDS, N_SELECT = 8, 3
SEED_SD = 0.003


def study(rng: np.random.Generator, n_arms: int, is_apart: bool) -> np.ndarray:
    """Return static minus LN at the reported seeds, [seed], for a true difference of 0."""
    static = SEED_SD * rng.standard_normal((n_arms, N_SEEDS))
    seen = SEED_SD * rng.standard_normal((n_arms, N_SELECT)) if is_apart else static
    chosen: np.ndarray = static[seen.mean(axis=1).argmin()]
    return chosen - SEED_SD * rng.standard_normal(N_SEEDS)


def main() -> None:
    """Print the table, by number of static arms."""
    print(
        "| static arms | chosen at | error, nats | expected | equivalent at .005 | p < .05 at .003 |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for n_arms in (1, 10, 30):
        for is_apart in (False, True):
            rng = np.random.default_rng(n_arms)
            errors, n_equivalent, n_detected = [], 0, 0
            for _ in range(N_STUDIES):
                numbers = study(rng, n_arms, is_apart)
                errors.append(numbers.mean())
                interval = paired_seeds(numbers + MARGIN, level=0.90)
                n_equivalent += equivalence(interval, MARGIN) == "equivalent"
                n_detected += (paired_seeds(numbers + 0.003).p or 1.0) < 0.05
            expected = 0.0
            if not is_apart:
                expected = -SEED_SD / np.sqrt(N_SEEDS) * expected_maximum(n_arms)
            where = f"{N_SELECT} select seeds" if is_apart else f"the {N_SEEDS} reported seeds"
            print(
                f"| {n_arms} | {where} | {np.mean(errors):+.4f} | {expected:+.4f} | "
                f"{n_equivalent / N_STUDIES:.3f} | {n_detected / N_STUDIES:.3f} |"
            )


if __name__ == "__main__":
    main()
