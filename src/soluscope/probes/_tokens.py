"""Selection of tokens for probes that are too expensive on all of them, and columns of values per token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from soluscope.hooked.activations import HookedRun
from soluscope.results import DIFFUSE


def diffuse(run: HookedRun) -> Bool[Tensor, " token"]:
    """Return the tokens of diffuse code: those after BOS whose K is at least the median and at least `DIFFUSE`."""
    k, content = run.k_eff, ~run.is_bos
    least = max(DIFFUSE, float(k[content].median())) if content.any() else DIFFUSE
    return content & (k >= least * (1 - 1e-6))  # equal K differ by rounding


def every_nth(run: HookedRun, n: int) -> Int[Tensor, " t"]:
    """Return the row numbers of every `n`-th token that is not BOS and has a target.

    The next larger stride is used where `n` and the number of such tokens in a full row have a common factor:
    otherwise every row would be sampled at the same few positions.
    """
    scored = run.scored.nonzero().squeeze(-1)
    n_in_full_row = int(run.pos[scored].max()) if len(scored) else 1  # BOS is at position 0
    while math.gcd(n, n_in_full_row) > 1:
        n += 1
    return scored[::n]


def start_of_each_part(indices: Int[Tensor, " index"], n_parts: int) -> Int[Tensor, " part"]:
    """Cut `indices` into at most `n_parts` parts of nearly equal length, and return the first index of each."""
    n = min(len(indices), n_parts)
    return indices[torch.arange(n, device=indices.device) * len(indices) // n]


def array(values: Tensor) -> NDArray[Any]:
    """Return the same values as a numpy array, which is on the CPU."""
    return values.numpy(force=True)


def arrays(columns: dict[str, Tensor]) -> dict[str, NDArray[np.floating]]:
    """Return the same columns as numpy arrays."""
    return {name: array(values) for name, values in columns.items()}


def scattered(
    run: HookedRun, tokens: Int[Tensor, " t"], values: Float[Tensor, " t"]
) -> Float[Tensor, " token"]:
    """Return one fp64 value per token from values at `tokens`; nan at all other tokens."""
    full = torch.full(run.pos.shape, torch.nan, dtype=torch.float64, device=run.device)
    full[tokens] = values.double()
    return full
