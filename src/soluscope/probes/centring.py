"""P21: Centring

Centring adds no nonlinearity to the MLP's output: an MLP with other output weights (v_j below) gives the same
output without centring. The mean matters only for the variance, and so for the gain. The probe leaves the
mean in, keeps the trained weights, and measures the change of the loss.

Question:
    Does the loss rise if the mid norm does not subtract each token's mean over neurons?

Answers:
    above 0.001: The loss rises when the norm leaves the mean in; a model trained without centring may avoid
        this.
    -0.001 to 0.001: The loss stays the same when the norm leaves the mean in.
    below -0.001: The loss falls when the norm leaves the mean in.

Formula:
    dL_t = l_t(gamma g' a + beta') - l_t, g' = g, or (mean a^2 + eps)^(-1/2), or the latter times a constant;
    ((a - m) gamma) W_out = sum_j a_j v_j, v_j = gamma_j W_out[j] - mean_i gamma_i W_out[i]

Reading:
    Smearing is about scale, so it predicts nothing here. But centring flips the sign of small activations,
    which looks like smearing when activations before and after the norm are compared (Elhage 6.4). A change
    within .001 nats and a small angle show that centring is idle, and that LayerNorm acts through its gain. A
    rise with the gain kept, in a model whose scale hardly varies, shows that the mean causes the rise.

Pitfalls:
    The edited model is off-distribution, and only beta is refit. W_out could absorb the rest exactly, so a
    rise does not prove that centring is needed; a comparison with a trained solu_rms arm can. The gain of an
    RMSNorm is lower at every token, and gamma would absorb the difference: read the matched value.

Source:
    protocol.md sections 7 P21 and 8.5
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
    "mean left in": "loss with post = gamma g a + beta', the gain unchanged, minus the unedited loss",
    "RMS": "the same with the gain of an RMSNorm, (mean a^2 + eps)^(-1/2)",
    "RMS, gain matched": "the same with the RMSNorm's gain times one constant, so that its geometric mean "
    "is the LayerNorm's",
}


def measure(run: HookedRun) -> Measured:
    """Measure the change of each token's loss without centring, and the size of the mean.

    beta' is beta plus the mean of the part of post that the edit removes, over all other strings;
    retraining would move beta likewise. The constant that matches gains is also a mean over all other
    strings.

    Returns:
        Changes of loss in nats: nan where the norm does not centre; for RMS also nan where the gain is
        one constant. The angle between a - m and a, in degrees. The relative residual of the identity
        in the formula. The mean's share of the mean square.
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
    """Return the loss with post = scaled + beta' minus the unedited loss, [token]."""
    refit = scaled + _mean_of_others(run, run.post - scaled)
    return loss_at_post(run, refit.to(run.post.dtype)) - loss_at_post(run, run.post)


def _mean_of_others(run: HookedRun, values: Tensor) -> Tensor:
    """Return the mean of `values` [token column] over all other strings, without BOS."""
    return disjoint_mean(replace(run, post=values), "post")


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a LayerNorm and a constant gain at known angles, with an MLP that no logit reads.

    a = (3, 1) has mean 2 and deviations (1, -1), so tan(angle) = 2. W_U is 0, so no edit changes the
    loss. With W_out = [[1, 2], [3, 5]], v = [[-1, -1.5], [1, 1.5]].
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
        # The logits read the class from a sum of 16 neurons. Beta absorbs the average shift that the mean causes;
        # the rest is 4.0825 16 (.4 - .16) / 2 = 7.8 in either direction: the sum goes from -2.9 to 5.0 at A tokens
        # and from 2.6 to -5.2 at B tokens.
        Gate("centring", "mean left in", above=0.1),
        Gate("centring", "RMS, gain matched", above=0.1),
        Gate("uniform", "mean left in", within=0.001),
        Gate("monosemantic", "mean left in", within=0.001),
        Gate("monosemantic", "RMS, gain matched", within=0.001),
        Gate("uniform", "RMS, gain matched", within=0.001),
    ),
    one_layer=True,
    one_scale=True,
    tested="mean left in",
    measure=measure,
    known=known,
    quantities={
        **{name: Quantity("nats", meaning) for name, meaning in CHANGES.items()},
        "angle": Quantity("degrees", "between a - m and a", ("median", "q95")),
        "linear residual": Quantity(
            "relative",
            "|sum_j a_j v_j - ((a - m) gamma) W_out|, only rounding errors expected",
            ("median", "q95"),
        ),
        "mean share": Quantity("share", "mean(a)^2 / mean(a^2)", ("median", "q95")),
    },
    streams=("natural",),
    figures=(
        Figure("Loss without centring minus the unedited loss", tuple(CHANGES)),
        Figure("Angle between a - m and a, median token", ("angle",), statistic="median"),
    ),
)
