"""P23: a run's numbers at the steps whose weights it kept, from the first step of training to the last.

The tokens are the same few thousand held-out ones at every step and in every run.

Source: protocol.md section 7, P23.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from soluscope.comparison.stats import cluster_bootstrap
from soluscope.config import EvalConfig
from soluscope.data.streams import Stream
from soluscope.hooked.activations import HookedRun, observe_blocks
from soluscope.hooked.convert import load_run
from soluscope.results import CROSSES, UNPINNED, Measurement
from soluscope.runs.folder import Run

N_TOKENS = 4096
"""Number of held-out tokens at each step, about."""
QUANTITIES = {
    "loss": ("nats / token", "mean"), "r": ("share", "median"), "log gain": ("log gain", "sd"),
    "gain": ("1 / activation", "median"), "max_p": ("probability", "median"), "k_eff": ("neurons", "median"),
    "|mlp_out|": ("norm", "median"), "|resid_mid|": ("norm", "median"),
    "|mlp_out| / |resid_mid|": ("ratio", "median"),
}  # fmt: skip
"""Unit and statistic of each quantity."""


def steps_of(run: Run) -> list[int]:
    """Return the steps at which a run's weights are known: before training, the snapshots, and the end."""
    start = [0] if run.config.init_dir is None else []
    return [*start, *run.snapshots(), run.facts.steps]


def dynamics(
    run: Run, stream: Stream, base: Measurement, config: EvalConfig, device: str
) -> tuple[list[Measurement], pd.DataFrame]:
    """Measure a run at each of its steps.

    Args:
        run: a finished run with snapshots.
        stream: the held-out tokens.
        base: fields shared by all measurements.
        config: the bootstrap's settings.
        device: device of the models.

    Returns:
        Measurements of `QUANTITIES` against the number of tokens seen, and the number at which r crosses
        `UNPINNED`; and the losses, one row per step and document: columns tokens, document, loss_sum, n_tokens.
    """
    rows: list[Measurement] = []
    losses = []
    for step in steps_of(run):
        model = load_run(run, device, step)
        table = pd.concat([_columns(block) for block in observe_blocks(model, stream)])
        rows += _summarised(table, replace(base, x=float(model.facts.tokens)), config)
        by_document = table.groupby("document")["loss"]
        sums = pd.DataFrame({"loss_sum": by_document.sum(), "n_tokens": by_document.count()})
        losses.append(sums.reset_index().assign(tokens=model.facts.tokens))
    return [*rows, *_crossing(rows, base)], pd.concat(losses, ignore_index=True)


def _columns(block: HookedRun) -> pd.DataFrame:
    """Return the values of the tokens that are not BOS and have a target."""
    out = block.readout
    mlp_out = (block.post @ out.W_out + out.b_out).double().norm(dim=-1)
    resid = block.resid_mid.double().norm(dim=-1)
    none = torch.full_like(resid, torch.nan)
    has_norm = bool((block.scale != 1).any())
    gain = block.gain.double() if has_norm else none
    values: dict[str, Tensor] = {
        "document": block.string, "loss": block.loss.double(),
        "r": none if block.eps is None else block.engagement,
        "log gain": none if block.eps is None else gain.log(), "gain": gain,
        "max_p": block.pre.double().softmax(-1).amax(-1) if block.is_solu else none,
        "k_eff": block.k_eff, "|mlp_out|": mlp_out, "|resid_mid|": resid,
        "|mlp_out| / |resid_mid|": mlp_out / resid,
    }  # fmt: skip
    return pd.DataFrame({k: v[block.scored].numpy(force=True) for k, v in values.items()})


def _summarised(
    table: pd.DataFrame, base: Measurement, config: EvalConfig
) -> Iterator[Measurement]:
    documents = table["document"].to_numpy()
    for name, (unit, statistic) in QUANTITIES.items():
        values = table[name].to_numpy()
        if np.isnan(values).all():
            continue
        found = cluster_bootstrap(values, documents, statistic, config.n_draws, config.seed)
        yield replace(
            base, quantity=name, unit=unit, statistic=statistic, value=found.value, low=found.low,
            high=found.high, n=found.n, n_clusters=found.n_clusters, n_effective=found.n_effective,
            cluster="document",
        )  # fmt: skip


def _crossing(rows: Sequence[Measurement], base: Measurement) -> Iterator[Measurement]:
    """Yield the number of tokens at which the median r first rises above `UNPINNED`; nothing without an r.

    Between two steps r is taken for linear in the logarithm of the tokens; from the start, in the tokens.
    """
    curve = [(row.x or 0.0, row.value or 0.0) for row in rows if row.quantity == "r"]
    if not curve:
        return
    row = replace(base, quantity=CROSSES, unit="tokens", statistic="", x=None)
    above = next((i for i, (_, r) in enumerate(curve) if r >= UNPINNED), None)
    if above is None:
        yield replace(row, note=f"the median r stays below {UNPINNED}")
    elif above == 0:
        yield replace(row, note=f"the median r is {curve[0][1]:.2g} at the first step already")
    else:
        (x0, r0), (x1, r1) = curve[above - 1 : above + 1]
        share = (UNPINNED - r0) / (r1 - r0)
        at = x0 + share * (x1 - x0) if x0 == 0 else math.exp(_between(x0, x1, share))
        yield replace(row, value=at, n=len(curve))


def _between(low: float, high: float, share: float) -> float:
    return math.log(low) + share * (math.log(high) - math.log(low))
