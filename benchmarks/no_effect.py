"""Count the claims of studies that have no effect to find, because their three arms are one variant.

    python benchmarks/no_effect.py

Many runs of one variant are trained at a tiny size, each with its own seed, by the model, the optimizer, the
schedule and the batches of the ordinary training. The runs are dealt to disjoint studies, and in each study to
plain SoLU, a static arm and LayerNorm, so that the arms of a study differ by their seeds only. The ordinary
comparison then judges each study. A claim is one of its verdicts that calls an effect real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

from soluscope.comparison.compare import Lineage, compare
from soluscope.config import Config, load_config
from soluscope.data.cache import TokenCache, prepare
from soluscope.results import SIGNIFICANT, Comparison, Record, Step, Term, of_kind
from soluscope.runs.weights import build_model
from soluscope.training.batches import batch_rows
from soluscope.training.module import parameter_groups, rate

N_STUDIES = 50
N_SEEDS = (4, 6)
"""Numbers of seeds of a study; the pool of runs has enough for the largest."""
N_STEPS = 20
N_TOKENS = 4000
"""Number of tokens of each held-out split on which a run's losses are measured."""
CHAIN = (
    Step("solu"),
    Step("solu_frozen_ln", "one gain"),
    Step("solu_ln", "a scale for each token"),
)
LINEAGES = {
    step.variant: Lineage(role, "", CHAIN[: i + 1])
    for i, (step, role) in enumerate(zip(CHAIN, ("plain", "static", "per_token"), strict=True))
}
CLAIMS = {
    "LayerNorm lowers or raises the loss": "interval of the benefit without 0",
    "a static arm loses more than LayerNorm": "corrected p below .05 and interval above 0",
    "a static arm loses less than LayerNorm": "interval of static - LN below 0",
}
"""The verdicts that count as claims, and their rules. The nominal rates are 5%, 2.5% and 2.5%."""
NOMINAL = (0.05, 0.025, 0.025)


def run_losses(config: Config, cache: TokenCache, seed: int) -> Iterator[dict[str, object]]:
    """Train one run, and yield its loss sums by split and document."""
    config = replace(config, seed=seed)
    model = build_model(config, cache.meta["d_vocab"])
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), betas=(config.train.beta1, config.train.beta2)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config))
    rows, bos = cache.rows("train", config.model.ctx), cache.meta["bos"]
    for step in range(config.train.steps):
        batch = rows[batch_rows(seed, step, config.train.batch_size, len(rows))]
        model.loss(torch.from_numpy(batch), bos).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for split in ("select", "report"):
        held_out = cache.rows(split, config.model.ctx)
        chosen = held_out.spread(N_TOKENS, 500)
        tokens, owner = torch.from_numpy(held_out[chosen]), held_out.documents(chosen)[:, 1:]
        with torch.no_grad():
            losses = model.loss(tokens, bos, reduction="none").double().numpy()
        counted = tokens[:, 1:].numpy() != bos
        sums = np.bincount(owner[counted], losses[counted])
        counts = np.bincount(owner[counted])
        for document in np.flatnonzero(counts):
            yield {
                "number": seed, "split": split, "document": f"{split}{document:04d}",
                "loss_sum": sums[document], "n_tokens": counts[document],
            }  # fmt: skip


def study(pool: pd.DataFrame, numbers: Sequence[int]) -> list[Record]:
    """Return the comparison of a study whose three arms have these runs, in equal parts."""
    n_seeds = len(numbers) // len(CHAIN)
    placed = pd.DataFrame(
        {"number": number, "variant": CHAIN[i // n_seeds].variant, "seed": i % n_seeds}
        for i, number in enumerate(numbers)
    )
    table = pool.merge(placed, on="number")
    run = table["variant"] + "-s" + table["seed"].astype(str)
    alike = {
        "d_model": 32,
        "d_mlp": 128,
        "n_layers": 1,
        "n_heads": 2,
        "ctx": 32,
        "tokens": 1,
        "lr": 1.0,
    }
    same = table["variant"]
    table = table.assign(run=run, arm=same, config=same, family=same, **alike)
    return compare("no effect", table, "", LINEAGES)


def claims(records: Sequence[Record]) -> list[bool]:
    """Return whether each of `CLAIMS` is made."""
    rows = {
        each.term: each
        for each in of_kind(records, Comparison)
        if each.arm == "solu_ln"
        and each.cluster == "seed"
        and each.term in (Term.BENEFIT, Term.STATIC)
    }
    benefit, static = rows[Term.BENEFIT], rows[Term.STATIC]
    if benefit.low is None or benefit.high is None or static.low is None or static.high is None:
        raise ValueError("a comparison has no interval: it needs more held-out documents")
    is_shown = static.p_adj is not None and static.p_adj < SIGNIFICANT
    return [
        benefit.low > 0 or benefit.high < 0,
        is_shown and static.low > 0,
        static.high < 0,
    ]


def count(pool: pd.DataFrame, n_studies: int, n_seeds: int) -> Counter[str]:
    """Return how many of `n_studies` disjoint studies make each claim."""
    found: Counter[str] = Counter()
    size = len(CHAIN) * n_seeds
    for first in range(0, n_studies * size, size):
        made = claims(study(pool, range(first, first + size)))
        found.update(name for name, is_made in zip(CLAIMS, made, strict=True) if is_made)
    return found


def train_pool(n_runs: int, n_steps: int, folder: str) -> pd.DataFrame:
    """Train runs with the seeds 0, 1, ..., and return the losses of all."""
    config = load_config(
        ["variant=solu_ln", "size=tiny", "corpus.max_mb=2", f"train.steps={n_steps}", f"runs_dir={folder}",
         # an interval takes 20 documents
         "tokens.select_share=.3", "tokens.report_share=.3", f"tokens.cache_dir={folder}/tokens"]
    )  # fmt: skip
    cache = prepare(config)
    return pd.DataFrame(row for seed in range(n_runs) for row in run_losses(config, cache, seed))


def main() -> None:
    """Print a table of claims by number of seeds."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        pool = train_pool(N_STUDIES * len(CHAIN) * max(N_SEEDS), N_STEPS, folder)
    print(
        "| seeds | claim | studies that make it | 95% interval of the rate | nominal | p of more |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for n_seeds in N_SEEDS:
        found = count(pool, N_STUDIES, n_seeds)
        for name, nominal in zip(CLAIMS, NOMINAL, strict=True):
            k = found[name]
            low, high = binomtest(k, N_STUDIES).proportion_ci()
            p = binomtest(k, N_STUDIES, nominal, "greater").pvalue
            print(
                f"| {n_seeds} | {name} | {k} of {N_STUDIES} | {low:.3f} to {high:.3f} | {nominal:.3f} | {p:.2f} |"
            )


if __name__ == "__main__":
    main()
