"""Which tokens a probe looks at, where it cannot look at all of them, and how values return to their places."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.hooked.activations import HookedRun


def every_nth(run: HookedRun, n: int) -> Int[Tensor, " t"]:
    """Return the row numbers of every `n`-th token, of those that are not BOS and have a target.

    With a prime that is not 2, rows whose width is a power of 2 are met at all their positions.
    """
    return run.scored.nonzero().squeeze(-1)[::n]


def start_of_each_part(indices: Int[Tensor, " index"], n_parts: int) -> Int[Tensor, " part"]:
    """Cut `indices` into at most `n_parts` parts of nearly one length, and return the first of each."""
    n = min(len(indices), n_parts)
    return indices[torch.arange(n) * len(indices) // n]


def scattered(
    run: HookedRun, tokens: Int[Tensor, " t"], values: Float[Tensor, " t"]
) -> Float[Tensor, " token"]:
    """Return one fp64 value per token from values at `tokens`; nan at all others."""
    full = torch.full(run.pos.shape, torch.nan, dtype=torch.float64)
    full[tokens] = values.double().cpu()
    return full
