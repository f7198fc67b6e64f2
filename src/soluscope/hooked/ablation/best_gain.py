"""The one gain for all tokens with the lowest mean loss: on all strings, or for each string on the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from soluscope.hooked.ablation.readout import FinalNorm
from soluscope.hooked.ablation.whole import loss_at_gain
from soluscope.hooked.activations import HookedRun

REACH = 0.7
"""Margin of the search for the best constant beyond the range of the tokens' gains, in log gain."""
N_FAR, N_NEAR = 21, 21
"""Number of constants tried over the whole range, and around the best of these."""


def best_gain(run: HookedRun, final_norm: FinalNorm = "live") -> float:
    """Return the one gain for all tokens with the lowest mean loss over tokens that are not BOS."""
    return float(_lowest(run, final_norm, lambda sums: sums.sum(0, keepdim=True))[0].exp())


def log_best_gain_on_others(run: HookedRun, final_norm: FinalNorm) -> Float[Tensor, " token"]:
    """Return the log of the gain with the lowest mean loss on all strings except the token's.

    If there is one string, the gain is the best one for that string.
    """
    _, owner = run.string.unique(return_inverse=True)
    return _lowest(run, final_norm, lambda sums: sums.sum(0) - sums if len(sums) > 1 else sums)[
        owner
    ]


def _lowest(
    run: HookedRun, final_norm: FinalNorm, gathered: Callable[[Tensor], Tensor]
) -> Float[Tensor, " group"]:
    """Return the log of the gain with the lowest loss in each group of strings.

    The loss is computed at constants from `REACH` below the lowest log gain to `REACH` above the highest,
    then at `N_NEAR` constants around the best of these, and summed by string. The sum of each group is minimised
    over the near constants, and between them by the parabola through the lowest three.

    Args:
        run: activations.
        final_norm: treatment of ln_final after the edit.
        gathered: function from sums of losses [string shift] to sums of groups [group shift].

    Returns:
        The log of the geometric mean gain if no token has a target.
    """
    scored = run.scored
    some = run.subset(scored)
    _, owner = run.string.unique(return_inverse=True)
    n_strings, centre = int(owner.max()) + 1, float(run.mean_log_gain)
    spread = some.gain.double().log() - centre

    def losses_at(shifts: Tensor) -> Tensor:
        gains = (centre + shifts).exp().to(run.post.dtype).expand(len(some.pos), -1)
        losses = loss_at_gain(some, gains, final_norm).double()  # [token shift]
        sums = losses.new_zeros(n_strings, len(shifts))
        return gathered(sums.index_add_(0, owner[scored], losses))

    def evenly(low: float, high: float, n: int) -> Tensor:
        """Return the same values on each device: they are computed on the CPU."""
        return torch.linspace(low, high, n, dtype=torch.float64).to(run.device)

    if not len(some.pos):
        return gathered(spread.new_zeros(n_strings, 1))[:, 0] + centre
    far = evenly(float(spread.min()) - REACH, float(spread.max()) + REACH, N_FAR)
    best = int(losses_at(far).sum(0).argmin())
    low, high = far[max(0, best - 1)], far[min(N_FAR - 1, best + 1)]
    near = evenly(float(low), float(high), N_NEAR)
    sums = losses_at(near)
    lowest = sums.argmin(-1)  # [group]
    inside = lowest.clamp(1, N_NEAR - 2)[:, None]
    left, middle, right = (sums.gather(-1, inside + k).squeeze(-1) for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    vertex = (0.5 * (left - right) / bend).clamp(-1, 1)
    refined = (lowest == inside.squeeze(-1)) & (bend > 0)  # no parabola at an end of the grid
    offset = vertex.where(refined, torch.zeros_like(vertex))
    return centre + (near[lowest] + offset * (near[1] - near[0]))
