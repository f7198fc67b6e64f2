"""Losses by document, which comparisons resample, and their mean."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch

from soluscope.comparison.stats import bootstrap_mean
from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.data.cache import Split, TokenCache
from soluscope.hooked.activations import rows_at_once
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.results import Measurement


@torch.no_grad()
def document_losses(
    model: SoluscopeTransformer, cache: TokenCache, split: Split, config: EvalConfig
) -> pd.DataFrame:
    """Return the sum of losses and the number of targets per document.

    A target counts for the document that contains it. BOS targets are excluded.
    """
    ctx = model.facts.ctx
    stream = streams.from_cache(cache, split, ctx, config.n_loss_tokens, split)
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    step = rows_at_once(ctx, model.cfg.d_vocab)
    for start in range(0, len(stream.tokens), step):
        tokens = stream.tokens[start : start + step]
        losses = (
            model(tokens.to(model.cfg.device), return_type="loss", loss_per_token=True)
            .double()
            .cpu()
        )
        owner = stream.string[start : start + step, 1:]
        counted = tokens[:, 1:] != stream.bos
        for document in owner[counted].unique().tolist():
            inside = counted & (owner == document)
            sums[document] = sums.get(document, 0.0) + float(losses[inside].sum())
            counts[document] = counts.get(document, 0) + int(inside.sum())
    return pd.DataFrame(
        {"document": sums.keys(), "loss_sum": sums.values(), "n_tokens": counts.values()}
    )


def mean_loss(report: pd.DataFrame, base: Measurement, config: EvalConfig) -> Measurement:
    """Return the mean of `document_losses` of the report split, with its interval."""
    interval = bootstrap_mean(report["loss_sum"], report["n_tokens"], config.n_draws, config.seed)
    return replace(
        base, quantity="loss", unit="nats / token", stream="natural", cluster="document",
        value=interval.value, low=interval.low, high=interval.high, n=interval.n,
        n_clusters=interval.n_clusters, n_effective=interval.n_effective,
    )  # fmt: skip
