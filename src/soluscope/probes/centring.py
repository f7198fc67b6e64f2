"""P21: Centring

In what the MLP writes, centring is not a nonlinearity: other output weights, v_j below, do the same
without it. Only the variance, hence the gain, depends on the mean. The probe leaves the mean in, with the
weights that are there, and measures what that does to the loss.

Question:
    Does the loss need the mid norm to subtract each token's mean over neurons?

Formula:
    dL_t = l_t(gamma g' a + beta') - l_t, g' = g, or (mean a^2 + eps)^(-1/2), or that times a
    constant;
    ((a - m) gamma) W_out = sum_j a_j v_j, v_j = gamma_j W_out[j] - mean_i gamma_i W_out[i]

Reading:
    Smearing is about scale, so it predicts nothing here; but centring gives small activations the
    other sign, which looks like smearing when activations before and after the norm are compared
    (Elhage 6.4). A change within .001 nats and a small angle say that centring is idle, and that
    what LayerNorm does is its gain. A rise where the gain is kept, in a model whose scale hardly
    varies, says that the mean carries it.

Pitfalls:
    The edit is off the training distribution and beta alone is refit: W_out could do the rest
    exactly, so a rise is no proof of need; a trained solu_rms arm is. RMSNorm's gain is lower at
    every token, which gamma would take up: read the matched one.

Source:
    science.md sections 7 P21 and 8.5
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.ablation import disjoint_mean, loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Figure, Gate, Measured, Probe, Quantity

CHANGES = {
    "mean left in": "loss with gamma g a + beta', the gain as it is, less loss as it is",
    "RMS": "the same with the gain of an RMSNorm, (mean a^2 + eps)^(-1/2)",
    "RMS, gain matched": "the same with that gain times one constant, so that its geometric mean is the "
    "LayerNorm's",
}


def measure(run: HookedRun) -> Measured:
    """Change of each token's loss without centring, and how far the mean is from mattering.

    beta' is beta plus the mean of what the edit took away, over all strings but the token's own, as
    retraining beta would; the constant that matches gains is a mean over the others too.

    Returns:
        Changes in nats, nan where the norm does not centre, and for RMS where its gain is one
        constant. Angle between a - m and a in degrees. The residual of the identity above, relative.
    """
    mid, out = run.mid.double(), run.readout
    mean = mid.mean(-1, keepdim=True)
    centred = mid - mean
    size = mid.shape[-1] ** 0.5
    nothing = torch.full_like(mid[:, 0], torch.nan)
    gamma, W_out = out.gamma.double(), out.W_out.double()
    written = (centred * gamma) @ W_out
    v = gamma[:, None] * W_out
    residual = mid @ (v - v.mean(0)) - written
    values = {
        **dict.fromkeys(CHANGES, nothing),
        "angle": torch.atan2(size * mean.abs().squeeze(-1), centred.norm(dim=-1)).rad2deg(),
        "linear residual": residual.norm(dim=-1) / written.norm(dim=-1),
        "mean share": mean.squeeze(-1).square() / mid.square().mean(-1),
    }
    if not run.centres:
        return Measured(values)
    gain = run.gain.double()[:, None]
    values["mean left in"] = _change(run, gain * mid * gamma)
    if run.eps is not None:
        rms = (mid.square().mean(-1, keepdim=True) + run.eps).rsqrt()
        values["RMS"] = _change(run, rms * mid * gamma)
        matched = rms * _mean_of_others(run, (gain / rms).log()).exp()
        values["RMS, gain matched"] = _change(run, matched * mid * gamma)
    return Measured(values)


def _change(run: HookedRun, scaled: Tensor) -> Tensor:
    """Loss with post = scaled + beta' less loss as it is, [token]."""
    refit = scaled + _mean_of_others(run, run.post - scaled)
    return loss_at_post(run, refit.to(run.post.dtype)) - loss_at_post(run, run.post)


def _mean_of_others(run: HookedRun, values: Tensor) -> Tensor:
    """Mean of `values` [token column] over all strings but the token's own, without BOS."""
    return disjoint_mean(replace(run, post=values), "post")


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """a = (3, 1) has mean 2 and deviations (1, -1): tan(angle) = 2. An MLP that writes nothing loses nothing.

    With W_out = [[1, 2], [3, 5]], v = [[-1, -1.5], [1, 1.5]].
    """
    mid = torch.tensor([[[3.0, 1.0], [3.0, 1.0], [2.0, -2.0]]]).expand(2, 3, 2)
    run = planted(mid, eps=1e-12)
    run = replace(
        run, readout=replace(run.readout, W_out=torch.tensor([[1.0, 2.0], [3.0, 5.0]]).double())
    )
    yield (
        run,
        {
            "angle": [math.degrees(math.atan(2))] * 2
            + [0]
            + [math.degrees(math.atan(2))] * 2
            + [0],
            "mean share": [4 / 5, 4 / 5, 0] * 2,
            "linear residual": [0] * 6,
            **dict.fromkeys(CHANGES, [0, 0, math.nan] * 2),  # W_U is zero
        },
    )
    yield (
        planted(mid, gain=2.0),
        {"mean left in": [0, 0, math.nan] * 2, "RMS": [math.nan] * 6},
    )


PROBE = Probe(
    __doc__,
    gates=(
        # The class is read off a sum of 16 neurons, which the mean moves by 4.0825 16 (.4 - .16) / 2 = 7.8 either
        # way from what beta takes up: from -2.9 to 5.0 at A tokens, from 2.6 to -5.2 at B tokens.
        Gate("centring", "mean left in", above=0.1),
        Gate("centring", "RMS, gain matched", above=0.1),
        Gate("uniform", "mean left in", within=0.001),
        Gate("monosemantic", "mean left in", within=0.001),
        Gate("monosemantic", "RMS, gain matched", within=0.001),
        Gate("uniform", "RMS, gain matched", within=0.001),
    ),
    one_layer=True,
    tested="mean left in",
    measure=measure,
    known=known,
    quantities={
        **{name: Quantity("nats", meaning) for name, meaning in CHANGES.items()},
        "angle": Quantity("degrees", "between a - m and a", ("median", "q95")),
        "linear residual": Quantity(
            "relative", "|sum_j a_j v_j - ((a - m) gamma) W_out|: rounding", ("median", "q95")
        ),
        "mean share": Quantity("share", "mean(a)^2 / mean(a^2)", ("median", "q95")),
    },
    streams=("natural",),
    figures=(
        Figure("Loss without centring less loss as it is", tuple(CHANGES)),
        Figure("Angle between a - m and a, median token", ("angle",), statistic="median"),
    ),
)
