"""P4: Scale freeze

Question:
    Does the loss rise when every token gets the same gain instead of its per-token gain?

Formula:
    dL_t = l_t(g = c) - l_t(g = g_t), c = exp(mean log g) over tokens that are not BOS, or the
    constant with the lowest mean loss on the other documents;
    ln_final's scale live, or frozen at its value in the unchanged model

Reading:
    Smearing predicts a rise, on tokens with a high gain and activations spread over many neurons. If
    the change is within .001 nats, the per-token scale carries nothing at inference. A model with one
    constant gain is unchanged by construction when frozen at its mean.

Pitfalls:
    A frozen model is off-distribution, so its cost overstates the need for a per-token scale (in a
    pilot twelvefold): only training a static arm decides whether that scale is needed. Freezing also costs
    loss where other values of gamma would suffice (C2 `disjoint`). The best constant is estimated from the other
    documents; the error of that estimate alone costs about 1 / (2 n) nats for n tokens. The final norm
    may absorb the scale, so both versions are shown.

Source:
    protocol.md sections 7 P4 and 8.4; Heimersheim 2024 for freezing
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.ablation import loss_at_gain
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Figure, Gate, Measured, Probe, Quantity

REACH = 0.7
"""Margin of the search for the best constant beyond the range of the tokens' gains, in log gain."""
N_FAR, N_NEAR = 21, 21
"""Number of constants tried over the whole range, and around the best of these."""


def measure(run: HookedRun) -> Measured:
    """Return the change of each token's loss, in nats, when its gain is replaced by a constant.

    The first constant is the geometric mean over tokens that are not BOS. BOS gets it too, since freezing
    BOS at its own gain, which never varies, would change nothing. The second is the constant with the
    lowest mean loss over tokens that are not BOS, chosen for each string on all other strings. Each is
    measured with ln_final live, and with ln_final's scale frozen at its value in the unchanged model.
    """
    log_gain = run.gain.double().log()
    geomean = torch.full_like(log_gain, float(run.mean_log_gain))
    gains = torch.stack([log_gain, geomean, _best_constant(run, geomean)], dim=-1).exp()
    live, frozen = (
        loss_at_gain(run, gains.to(run.post.dtype), final_norm) for final_norm in ("live", "frozen")
    )
    return Measured(
        {
            "frozen at geometric mean": live[:, 1] - live[:, 0],
            "frozen at best constant": live[:, 2] - live[:, 0],
            "geometric mean, final norm frozen": frozen[:, 1] - frozen[:, 0],
            "best constant, final norm frozen": frozen[:, 2] - frozen[:, 0],
            "gain": run.gain,
            "k_eff": run.mid.square().sum(-1) / run.mid.square().amax(-1),
            # Mean of live and frozen loss: sorting by either alone would sort its noise into the change.
            "surprisal": (live[:, 0] + live[:, 1]) / 2,
        }
    )


def _best_constant(run: HookedRun, start: Tensor) -> Tensor:
    """Return the log of the constant with the lowest mean loss on all strings except the token's. [token]

    The loss is computed at constants from `REACH` below the lowest log gain to `REACH` above the highest,
    then at `N_NEAR` constants around the best of these, and summed by string. For each string the sum over
    the other strings is minimised over the near constants, and between them by the parabola through the
    lowest three.
    """
    scored = run.scored
    some = run.subset(scored)
    if not len(some.pos):
        return start
    _, owner = run.string.unique(return_inverse=True)
    centre = float(start[0])
    spread = some.gain.double().log() - centre

    def others(shifts: Tensor) -> Tensor:
        """Return the sum of losses on all other strings, [string shift]."""
        gains = (centre + shifts).exp().to(run.post.dtype).expand(len(some.pos), -1)
        losses = loss_at_gain(some, gains).double()  # [token shift]
        sums = losses.new_zeros(int(owner.max()) + 1, len(shifts))
        sums.index_add_(0, owner[scored], losses)
        return sums.sum(0) - sums if len(sums) > 1 else sums

    far = torch.linspace(
        float(spread.min()) - REACH, float(spread.max()) + REACH, N_FAR, dtype=start.dtype
    )
    best = int(others(far).sum(0).argmin())
    low, high = far[max(0, best - 1)], far[min(N_FAR - 1, best + 1)]
    near = torch.linspace(float(low), float(high), N_NEAR, dtype=start.dtype)
    sums = others(near)
    lowest = sums.argmin(-1)  # [string]
    inside = lowest.clamp(1, N_NEAR - 2)[:, None]
    left, middle, right = (sums.gather(-1, inside + k).squeeze(-1) for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    vertex = (0.5 * (left - right) / bend).clamp(-1, 1)
    refined = (lowest == inside.squeeze(-1)) & (bend > 0)  # no parabola at an end of the grid
    offset = vertex.where(refined, torch.zeros_like(vertex))
    return start + (near[lowest] + offset * (near[1] - near[0]))[owner]


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield an MLP that writes nothing: its gain varies by a factor of 3, and freezing it changes no loss."""
    mid = torch.tensor([[[3.0, -3.0], [1.0, -1.0], [2.0, -2.0]]]).expand(4, 3, 2)
    run = planted(mid, eps=1e-12)
    yield run, {name: [0, 0, math.nan] * 4 for name in _FREEZES} | {"gain": [1 / 3, 1, 1 / 2] * 4}


_FREEZES = {
    "frozen at geometric mean": "loss with one gain for all tokens, exp(mean log gain), minus loss as it is",
    "frozen at best constant": "the same at the constant with the lowest loss on all other documents",
    "geometric mean, final norm frozen": "at the geometric mean, with ln_final's scale frozen as it was",
    "best constant, final norm frozen": "at the best constant, with ln_final's scale frozen as it was",
}

PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_shared", "frozen at geometric mean", above=0.1),
        Gate("smear_shared", "frozen at best constant", above=0.1),
        Gate("disjoint", "frozen at geometric mean", above=0.1),
        Gate("smear_shared", "geometric mean, final norm frozen", above=0.1),
        Gate("smear_shared", "best constant, final norm frozen", above=0.1),
        Gate("pinned", "geometric mean, final norm frozen", within=0.001),
        Gate("uniform", "best constant, final norm frozen", within=0.001),
        *(
            Gate(negative, f"frozen at {constant}", within=0.001)
            for negative in ("pinned", "uniform", "absorbed")
            for constant in ("geometric mean", "best constant")
        ),
    ),
    one_layer=True,
    tested="frozen at best constant",
    measure=measure,
    known=known,
    quantities={
        name: Quantity(
            "nats", meaning, split_by=("gain", "k_eff", "surprisal"), more_smeared_when="higher"
        )
        for name, meaning in _FREEZES.items()
    },
    streams=("natural",),
    figures=(
        Figure("Loss with a frozen gain minus loss of the unchanged model", tuple(_FREEZES)),
        Figure(
            "BOS alone: its loss at the other tokens' geometric mean gain minus its loss at its own gain",
            ("frozen at geometric mean",),
            positions="BOS",
        ),
        Figure(
            "Change of loss at the geometric mean, by quartile of the token's gain",
            ("frozen at geometric mean",),
            group="gain",
        ),
    ),
)
