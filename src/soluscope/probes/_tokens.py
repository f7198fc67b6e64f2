"""Which tokens a probe looks at, where it cannot look at all of them; columns of values per token."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
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


def arrays(columns: dict[str, Tensor]) -> dict[str, NDArray[np.floating]]:
    """Return the same columns as numpy arrays."""
    return {name: values.numpy() for name, values in columns.items()}


def scattered(
    run: HookedRun, tokens: Int[Tensor, " t"], values: Float[Tensor, " t"]
) -> Float[Tensor, " token"]:
    """Return one fp64 value per token from values at `tokens`; nan at all others."""
    full = torch.full(run.pos.shape, torch.nan, dtype=torch.float64)
    full[tokens] = values.double().cpu()
    return full
