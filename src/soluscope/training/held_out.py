"""The loss on held-out documents, during and after training."""

from __future__ import annotations

import numpy as np
import torch

from soluscope.config import Config
from soluscope.data.cache import Split, TokenCache, evenly_spaced
from soluscope.model import LanguageModel

N_POINTS = 16
"""Number of points of the held-out curve of a run."""
N_TOKENS = 4096
"""Most tokens of the select split for each point; they are the same for all runs with the same text and ctx."""


def is_point(step: int, config: Config) -> bool:
    """Return whether the held-out loss is logged after `step`, which is one of the steps that are logged."""
    every = config.train.log_every
    apart = max(1, round(config.train.steps / every / N_POINTS)) * every
    return step % apart == 0 or step == config.train.steps


@torch.no_grad()
def mean_loss(
    model: LanguageModel, cache: TokenCache, split: Split, ctx: int, max_tokens: int
) -> float:
    """Return the mean cross-entropy in nats per token, BOS targets left out.

    The rows are spread evenly over the split, at most `max_tokens` tokens in all, but at least one row.
    """
    rows, bos = cache.rows(split, ctx), cache.meta["bos"]
    total, count = 0.0, 0
    for chosen in np.array_split(
        evenly_spaced(len(rows), max_tokens // ctx), max(1, max_tokens // ctx // 16)
    ):
        tokens = torch.from_numpy(rows[chosen])
        losses = model.loss(tokens.to(model.unembed.b_U.device), bos, reduction="none")
        total += float(losses.double().sum())
        count += int((tokens[:, 1:] != bos).sum())
    return total / count
