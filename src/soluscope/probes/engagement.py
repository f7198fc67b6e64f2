"""P1: LayerNorm engagement

Question:
    Does the mid LayerNorm scale each token by its own activations, or all tokens by one constant?

Answers:
    above 0.5: At most tokens the norm scales a token mainly by the size of its activations; the spread of the
        log gain shows how much the gain differs between tokens.
    0.05 to 0.5: At the typical token epsilon and the token's activations set the gain together, and epsilon has
        the larger part.
    below 0.05: At most tokens the gain is nearly the same, because epsilon pins it or because the norm has one
        gain; at other tokens it may be far lower.

Formula:
    r = s2 / (s2 + eps) = Vq / (Vq + kappa), s2 the population variance of a = mid over neurons, Vq = s2
    d_mlp^2;
    elasticity of g to s is -r;
    sd of log g over tokens;
    exp(H), H = -sum p log p, p = softmax(x) over neurons;
    share of loss at r above .05 = sum of l where r > .05 / sum of l;
    residual |post - beta - g gamma (a - m)| / |post - beta|, g fitted

Reading:
    r is the share of LayerNorm's log-scale action that epsilon leaves: 0 is a static gain, 1 a true LayerNorm.
    A per-token gain can matter only if it varies. Where r is low the gain is at its ceiling, 1 / sqrt(eps).
    Amplification is relative to other tokens, so a low r at most tokens rules nothing out if some tokens have a
    high one (`ceiling`: r is .04 at three quarters of the tokens and the gain varies 25-fold). The gain counts
    as one constant if the sd of log g is below .01, or if r is below .05 at 99% of the tokens and the others
    have less than 1% of the loss. It varies if the sd of log g is above .1. A gain that varies does not show
    that it matters, or where: `magnitude` has no diffuse code. A model whose gain is one constant has r = 0 by
    construction. The residual of the affine fit tests the probe itself: if it exceeds rounding error, hook_post
    is not a norm of hook_mid.

Pitfalls:
    Compare kappa = eps * d_mlp^2 across sizes, never eps alone. Read BOS separately from all other tokens.
    The variance is the population variance, or the mean square in a norm that does not centre. Epsilon is
    read from the module.

Source:
    protocol.md sections 1.2 (SoLU-1L: r of .01 to .05, .12 at BOS) and 7 P1
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.activations import HookedRun, Text, planted
from soluscope.probes import Estimate, Figure, Gate, Probe, Quantity
from soluscope.probes._estimates import ratio
from soluscope.probes._per_token import PerToken
from soluscope.probes._tokens import array

LOW = 0.05
"""r up to which a token's gain counts as being at its ceiling, 1 / sqrt(eps)."""
SHARE_OF_LOSS = f"share of loss where r is above {LOW}"


def _columns(run: HookedRun) -> dict[str, Tensor]:
    """Return engagement and the quantities that it depends on, per token.

    Returns:
        r = s2 / (s2 + eps), where s2 is the population variance of mid, or its mean square if the norm
        does not centre; 0 where the gain is one constant. gain, 1 / hook_scale. kappa = eps * d_mlp^2,
        nan without an epsilon, and Vq = s2 * d_mlp^2, so that r = Vq / (Vq + kappa). max_p and log_z of
        softmax(pre) and exp_entropy, the exponential of its entropy in nats, nan where the nonlinearity is not
        SoLU. k_eff = |a|^2 / max(a)^2. residual: the
        part of post - beta that the best multiple of gamma * (a - m) does not fit, relative to the norm
        of post - beta; m is 0 where the norm does not centre, and the residual is nan where post =
        beta.
    """
    centred, variance, d_mlp = run.centred, run.s2, run.mid.shape[-1]
    nothing = torch.full_like(variance, torch.nan)
    pre = run.pre.double()
    return {
        "r": run.engagement,
        "gain": run.gain.double(),
        "log gain": run.gain.double().log(),
        "kappa": nothing if run.eps is None else torch.full_like(variance, run.eps * d_mlp**2),
        "vq": variance * d_mlp**2,
        "max_p": pre.softmax(-1).amax(-1) if run.is_solu else nothing,
        "exp_entropy": _exp_entropy(pre) if run.is_solu else nothing,
        "log_z": pre.logsumexp(-1) if run.is_solu else nothing,
        "k_eff": run.k_eff,
        "residual": _residual(run, centred),
    }


def _estimates(text: Text, columns: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield the share of the loss of the tokens whose gain is below its ceiling, without BOS."""
    loss = text.loss.double().where(text.scored, torch.nan)
    above = loss.where(columns["r"] > LOW, 0.0 * loss)
    yield ratio(SHARE_OF_LOSS, array(above), array(loss), array(text.string))


def _exp_entropy(pre: Tensor) -> Tensor:
    """Return exp(H) of the softmax over neurons: n if n neurons share it equally and no other does. [token]"""
    log_p = pre.log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1)).exp()


def _residual(run: HookedRun, centred: Tensor) -> Tensor:
    """Return the norm of post - beta outside the line along gamma * (a - m), as a share of its norm. [token]"""
    line = run.readout.gamma * centred
    post = run.post.double() - run.readout.beta
    slope = (post * line).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True)
    residual: Tensor = (post - slope * line).norm(dim=-1) / post.norm(dim=-1)
    return residual


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield runs of two neurons: with an epsilon, uncentred, off the line, with SoLU, and with a constant gain.

    Neurons at +1 and -1 have mean 0 and variance 1; at +3 and +1 they have mean 2 and variance 1. A
    norm that does not centre uses the mean squares, 1 and 5. Where a - m is (1, -1), a post of (.4, 0)
    lies as far off that line as along it.
    """
    mid = torch.tensor([[[1.0, -1.0], [3.0, 1.0]]])
    with_eps = planted(mid, eps=3.0)
    yield (
        with_eps,
        {
            "r": [0.25, 0.25],
            "gain": [0.5, 0.5],
            "kappa": [12, 12],
            "vq": [4, 4],
            "k_eff": [2, 10 / 9],
            "residual": [0, 0],
        },
    )
    scale = torch.tensor([4.0, 8.0]).double().sqrt()  # from mean squares 1 and 5
    uncentred = replace(with_eps, scale=scale, post=with_eps.mid / scale[:, None], centres=False)
    yield uncentred, {"r": [1 / 4, 5 / 8], "vq": [4, 20], "residual": [0, 0]}
    bent = replace(with_eps, post=torch.tensor([[0.5, -0.5], [0.4, 0.0]]).double())
    yield bent, {"residual": [0, 0.5**0.5]}
    # p is (3/4, 1/4) and (1/2, 1/2)
    pre = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]], dtype=torch.float64)
    solu = replace(planted((pre * pre.softmax(-1))[None]), pre=pre)
    yield solu, {"max_p": [3 / 4, 1 / 2], "exp_entropy": [(4 / 3) ** 0.75 * 4**0.25, 2]}
    yield planted(mid, gain=7.0), {"r": [0, 0], "gain": [7, 7], "kappa": [math.nan, math.nan]}


PROBE = Probe(
    __doc__,
    one_scale=True,
    tested="r",
    gates=(
        Gate("smear_shared", "r", above=0.5, statistic="median", truth=1.0),
        Gate("uniform", "r", above=0.5, statistic="median", truth=1.0),
        Gate("ceiling", "r", above=0.5, statistic="q99"),
        Gate("ceiling", SHARE_OF_LOSS, above=0.05),
        *(
            Gate(varied, "log gain", above=0.5, statistic="sd")
            for varied in ("smear_shared", "ceiling", "magnitude")
        ),
        *(
            Gate(constant, "log gain", within=0.01, statistic="sd")
            for constant in ("pinned", "uniform", "bos_gain")
        ),
        Gate("pinned", "r", within=0.01),
        Gate("pinned", SHARE_OF_LOSS, within=0.01),
        *(Gate(control, "residual", within=1e-5) for control in ("smear_shared", "pinned")),
    ),
    measure=PerToken(_columns, _estimates),
    known=known,
    quantities={
        "r": Quantity(
            "share",
            "var / (var + eps) of mid",
            (
                "median",
                *("q01", "q05", "q25", "q75", "q95", "q99"),
                *("share above 0.05", "share above 0.5"),
            ),
            more_smeared_when="higher",
            on_ladders="number",
        ),
        "gain": Quantity("1 / activation", "1 / hook_scale", ("median", "q05", "q95")),
        "log gain": Quantity("log gain", "spread of the log of the gain over tokens", ("sd",)),
        "kappa": Quantity("eps * d_mlp^2", "the dose of epsilon", ("median",)),
        "vq": Quantity(
            "var * d_mlp^2",
            "variance on the scale of kappa: r = vq / (vq + kappa)",
            ("median", "q05", "q95"),
        ),
        "max_p": Quantity(
            "probability",
            "largest softmax weight over neurons",
            ("median", "q95"),
            on_ladders="number",
        ),
        "exp_entropy": Quantity(
            "neurons",
            "exp of the softmax's entropy, the number of neurons that share it",
            ("median",),
            on_ladders="number",
        ),
        "log_z": Quantity("nats", "log of the softmax's denominator", ("median", "q05", "q95")),
        "k_eff": Quantity(
            "neurons",
            "|a|^2 / max(a)^2, the number of neurons that share the norm of a",
            ("median",),
            on_ladders="number",
        ),
        "residual": Quantity(
            "share of norm",
            "part of post - beta that no multiple of gamma (a - m) fits",
            ("median", "q99"),
        ),
    },
    estimates={
        SHARE_OF_LOSS: Quantity(
            "share", "loss of the tokens whose gain is below its ceiling, over all loss"
        )
    },
    streams=("natural", "prose", "code", "sentences", "repeated", "random"),
    figures=(
        Figure("Engagement r, median token", ("r",), statistic="median"),
        Figure("Spread of log gain over tokens", ("log gain",), statistic="sd"),
        Figure("Gain, median token", ("gain",), statistic="median", log_y=True),
        Figure("Largest softmax weight, median token", ("max_p",), statistic="median", log_y=True),
    ),
)
