"""P3: Causes of the scale

Question:
    Why is a token's gain high: small pre-activations, a flat softmax, or many neurons at once?

Answers:
    above 0.01: The gain is higher at tokens whose activations are spread over more neurons.
    -0.01 to 0.01: The gain is neither higher nor lower at tokens whose activations are spread over more neurons.
    below -0.01: The gain is lower at tokens whose activations are spread over more neurons.

Formula:
    With a = x softmax(x), s the standard deviation of a over N neurons, and xmax > 0 (so that the
    largest a and the largest x are on the same neuron), exactly
    log s = log xmax + log pmax + .5 log K + .5 log(1 - mbar) - .5 log N;
    pmax = e^xmax / Z; K = |a|^2 / max(a)^2; mbar = mean(a)^2 / mean(a^2);
    share = Cov(term, log s) / Var(log s), so that the shares sum to 1.
    For log g each term is weighted by the elasticity -r, averaged between the mean token and this token.

Reading:
    Smearing amplifies a diffuse code. It predicts that the effective number K and the softmax's peak
    carry the variance of log g, and that g is high where K is high (correlation above 0) and xmax
    low. If xmax alone carries the variance, the gain follows how strongly neurons fire and not how
    many fire. Read the amplitude first: with r near 0 the shares of log g divide up almost no
    variance (SoLU-1L: correlation .66, amplitude .4%), and below an sd of log g of .01 no share of log g and no
    correlation is given. Compare with the untrained model: its correlation is already far above 0, because a
    flat softmax makes small activations. A high gain at diffuse codes does not show that it matters there: in
    `disjoint`, where gamma suffices, the gain is high there too.

Pitfalls:
    Shares can be negative or above 1, since terms cancel; the covariances are therefore reported
    too. K, exp(H(p)) and the participation ratio are three different effective numbers. The gain does
    not depend on which neuron holds which value, so swaps exchange magnitude and relative sizes, not
    ranks.

Source:
    protocol.md section 7 P3
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._estimates import correlation, ratio, slope, sums_by_string
from soluscope.probes._tokens import array, arrays

TERMS = {
    "log xmax": "magnitude: the largest pre-activation",
    "log pmax": "peakedness: the softmax weight of the largest",
    "half log K": "effective number of neurons: .5 log(|a|^2 / max(a)^2)",
    "centring": ".5 log(1 - mean(a)^2 / mean(a^2)); 0 where the norm does not centre",
}
"""Terms that sum to log s, up to -.5 log N."""
OTHER_SPLITS = {
    "log amax": "the largest activation, log xmax + log pmax where the nonlinearity is SoLU",
    "log s(q)": "log of the scale of q = x e^x",
    "-log Z": "minus the log of softmax's denominator: log s = log s(q) - log Z",
}
CHANGES = {
    "x halved": "change of log g when the pre-activations are halved",
    "x doubled": "change of log g when the pre-activations are doubled",
    "softmax at temperature 2": "change of log g when only the softmax's argument is halved",
    "softmax at temperature 1/2": "change of log g when only the softmax's argument is doubled",
    "another's magnitude": "change of log g when xmax is taken from another token and every x / xmax is kept",
    "another's shape": "change of log g when every x / xmax is taken from another token and xmax is kept",
    "another's both": "log g of the other token minus log g of the token itself",
}
FLAT = 1e-9
"""Smallest spread of logs that is more than rounding; below it there is no variance to divide into shares."""
STILL = 0.01
"""Standard deviation of log gain below which its causes are not divided: the gain is one constant in effect."""


def measure(run: HookedRun) -> Measured:
    """Return the terms of log s per token, and their shares of the variances of log s and log g."""
    tokens = _terms(run)
    return Measured(tokens, tuple(_estimates(run, tokens)))


def _terms(run: HookedRun) -> dict[str, Tensor]:
    """Return the terms, three effective numbers and the changes of the gain under interventions on x, each [token].

    s is the norm's divisor without epsilon: the root mean square of a about its mean, or about 0 for a
    norm that has an epsilon and does not centre. The interventions recompute the gain by its formula,
    (s^2 + eps)^(-1/2).

    Returns:
        nan where no activation is above 0; where a term needs the softmax and the nonlinearity is
        not SoLU; and, for changes of the gain, where the gain is one constant. BOS has no partner for swaps.
    """
    mid, pre = run.mid.double(), run.pre.double()
    nothing = torch.full_like(mid[:, 0], torch.nan)
    square = mid.square()
    largest = mid.amax(-1)
    largest = largest.where(largest > 0, torch.nan)
    mean_share = mid.mean(-1).square() / square.mean(-1)
    uncentred = run.eps is not None and not run.centres
    k_eff = square.sum(-1) / largest.square()
    centring = torch.zeros_like(largest) if uncentred else 0.5 * torch.log1p(-mean_share)
    log_s = largest.log() + 0.5 * k_eff.log() + centring - 0.5 * math.log(mid.shape[-1])
    values = {
        "log s": log_s,
        "half log K": 0.5 * k_eff.log(),
        "centring": centring.where(largest > 0, torch.nan),
        "log amax": largest.log(),
        "K": k_eff,
        "PR": square.sum(-1).square() / square.square().sum(-1),
    }
    of_softmax = ("log xmax", "log pmax", "log s(q)", "-log Z", "exp(H(p))")
    if not run.is_solu:
        return values | dict.fromkeys((*of_softmax, *CHANGES), nothing)
    xmax, log_z, log_p = pre.amax(-1), pre.logsumexp(-1), pre.log_softmax(-1)
    return {
        **values,
        "log xmax": xmax.where(xmax > 0, torch.nan).log(),
        "log pmax": (xmax - log_z).where(xmax > 0, torch.nan),
        "log s(q)": log_s + log_z,
        "-log Z": -log_z,
        "exp(H(p))": (-(log_p.exp() * log_p).sum(-1)).exp(),
        **(_changes(run) if run.eps is not None else dict.fromkeys(CHANGES, nothing)),
    }


def _changes(run: HookedRun) -> dict[str, Tensor]:
    """Return log gain under each intervention minus log gain without it, both by the norm's formula, [token].

    The gain does not depend on the order of neurons: putting another token's magnitudes into this
    token's ranks gives exactly the other token's gain. The swap therefore separates xmax from the sizes
    relative to xmax, the only pair of factors of x that the gain distinguishes. A token's partner is half
    the stream away.
    """
    pre = run.pre.double()
    log_gain = _log_gain(run, pre)
    changes = {
        "x halved": _log_gain(run, pre / 2) - log_gain,
        "x doubled": _log_gain(run, pre * 2) - log_gain,
        "softmax at temperature 2": _log_gain(run, pre, temperature=2.0) - log_gain,
        "softmax at temperature 1/2": _log_gain(run, pre, temperature=0.5) - log_gain,
    }
    xmax = pre.amax(-1)
    chosen = (~run.is_bos & (xmax > 0)).nonzero().squeeze(-1)
    partner = chosen.roll(len(chosen) // 2)
    factor = (xmax[partner] / xmax[chosen])[:, None]
    swapped = {
        "another's magnitude": _log_gain(run, pre[chosen] * factor) - log_gain[chosen],
        "another's shape": _log_gain(run, pre[partner] / factor) - log_gain[chosen],
        "another's both": log_gain[partner] - log_gain[chosen],
    }
    for name, change in swapped.items():
        changes[name] = torch.full_like(log_gain, torch.nan).index_copy(0, chosen, change)
    return changes


def _log_gain(run: HookedRun, pre: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log of the gain that a norm with an epsilon gives SoLU(pre), [token]."""
    assert run.eps is not None
    mid = pre * (pre / temperature).softmax(-1)
    centre = mid.mean(-1, keepdim=True) if run.centres else 0.0
    return -0.5 * ((mid - centre).square().mean(-1) + run.eps).log()


def _estimates(run: HookedRun, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield shares of the variance of log s and of log g, over tokens that are not BOS.

    For log g the chain rule involves epsilon. Along the straight line from the mean terms to a token's
    terms, log g changes by the elasticity -r times the change of log s. Each term therefore contributes
    its change times the elasticity averaged along this line, and the contributions sum exactly to
    the change of log g. A pair of tokens with swapped magnitude and shape belongs to the string of the first.
    """
    columns = arrays(tokens)
    kept = ~array(run.is_bos) & np.isfinite(columns["log s"])  # -inf: all activations equal
    if not kept.any():
        return
    columns = {name: values[kept] for name, values in columns.items()}
    string, log_s = array(run.string)[kept], columns["log s"]
    names = [name for name in (*TERMS, *OTHER_SPLITS) if not np.isnan(columns[name]).all()]
    varies = np.ptp(log_s) > FLAT
    for name in names:
        term = columns[name]
        yield _covariance(f"covariance with log s: {name}", term, log_s, string)
        if varies:
            yield slope(f"share of log s: {name}", log_s, term, string)
    if run.eps is None or not varies:
        return
    log_g = -0.5 * np.logaddexp(2 * log_s, np.log(run.eps))
    if log_g.std() < STILL:
        return
    if np.ptp(log_g) > FLAT:
        elasticity = _mean_elasticity(log_s, run.eps)
        for name in names:
            term = columns[name]
            yield slope(f"share of log g: {name}", log_g, elasticity * (term - term.mean()), string)
    log_k = 2 * columns["half log K"]
    if np.ptp(log_k) > FLAT:
        log_gain = array(run.gain.double().log())[kept]
        yield correlation("corr(log g, log K)", log_gain, log_k, string)
    total = columns["another's both"]
    if run.is_solu and np.nanmax(np.abs(total)) > FLAT:
        magnitude, shape = (columns[f"another's {what}"] for what in ("magnitude", "shape"))
        both_orders = 0.5 * (magnitude + total - shape)
        yield ratio("swap share: magnitude", both_orders * total, total**2, string)
        yield ratio("swap share: shape", (total - both_orders) * total, total**2, string)


def _mean_elasticity(log_s: NDArray[np.floating], eps: float) -> NDArray[np.float64]:
    """Return d log g / d log s, averaged between the mean log s and each token's log s; from -1 to 0."""

    def log_g(log_s: Any) -> Any:
        return -0.5 * np.logaddexp(2 * log_s, np.log(eps))

    middle = log_s.mean()
    step = log_s - middle
    near = np.abs(step) < 1e-6  # the quotient would be rounding error there
    local = -1 / (1 + eps * np.exp(-2 * middle))
    result: NDArray[np.float64] = np.where(
        near, local, (log_g(log_s) - log_g(middle)) / np.where(near, 1.0, step)
    )
    return result


def _covariance(
    quantity: str, x: NDArray[np.floating], y: NDArray[np.floating], string: NDArray[np.int64]
) -> Estimate:
    """Return the covariance over tokens; sums are about the means, so that no digits are lost."""
    x, y = x - x.mean(), y - y.mean()
    sums, n = sums_by_string([np.ones_like(x), x, y, x * y], string)

    def value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        n, x, y, xy = sums.T
        return np.asarray(xy / n - (x / n) * (y / n))

    return Estimate(quantity, sums, value, n)


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield four neurons through SoLU, of which one or two are on, and two neurons without a softmax.

    x = (log 3, 0, 0, 0): Z = 6, p = (1/2, 1/6, 1/6, 1/6), a = (log 3 / 2, 0, 0, 0), entropy
    .5 log 2 + .5 log 6. x = (1, 1, 0, 0): Z = 2e + 2, p = e / Z on the two neurons that are on. With two of
    four neurons equally on, mean(a)^2 / mean(a^2) = 1/2 and s = max(a) / 2; with one on, 1/4 and
    s = sqrt(3)/4 max(a).
    """
    log3, z = math.log(3), 2 * math.e + 2
    pre = torch.tensor([[log3, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.float64)
    run = replace(planted((pre * pre.softmax(-1))[None], eps=1e-5), pre=pre)
    yield (
        run,
        {
            "log s": [math.log(math.sqrt(3) / 4 * log3 / 2), math.log(math.e / z / 2)],
            "log xmax": [math.log(log3), 0],
            "log pmax": [math.log(0.5), math.log(math.e / z)],
            "half log K": [0, 0.5 * math.log(2)],
            "centring": [0.5 * math.log(3 / 4), 0.5 * math.log(1 / 2)],
            "-log Z": [-math.log(6), -math.log(z)],
            "K": [1, 2],
            "PR": [1, 2],
            "exp(H(p))": [
                math.sqrt(12),
                math.exp(math.log(z) - 2 * math.e / z),  # entropy is log Z - E x
            ],
        },
    )
    run = planted(torch.tensor([[[4.0, 0.0], [-1.0, -3.0]]]), gain=2.0)
    yield (
        run,
        {
            "log s": [math.log(2), math.nan],
            "log amax": [math.log(4), math.nan],
            "log xmax": [math.nan] * 2,
            "x doubled": [math.nan] * 2,
        },
    )


PROBE = Probe(
    __doc__,
    gates=(
        # There are two kinds of tokens, so a share is a term at A minus the same term at B, divided by the
        # difference of log s, 4.396. The terms at A and at B are log 12 and 0; -.0002 and 1 - log(8e + 24);
        # 0 and .5 log 8; .5 log(31/32) and .5 log(3/4).
        Gate("smear_shared", "share of log s: log xmax", above=0.5, truth=0.5652),
        Gate("smear_shared", "share of log g: log pmax", above=0.6, truth=0.6422),
        Gate("smear_shared", "share of log g: half log K", below=-0.2, truth=-0.2365),
        Gate("smear_shared", "corr(log g, log K)", above=0.9, truth=1.0),
        *(Gate("uniform", f"covariance with log s: {name}", within=0.01) for name in TERMS),
    ),
    one_scale=True,
    tested="corr(log g, log K)",
    confirmatory=True,
    shuffle="scale",
    measure=measure,
    known=known,
    quantities={
        "log s": Quantity(
            "log activation", "log of the standard deviation of a over neurons", ("mean", "sd")
        ),
        **{
            name: Quantity("log", meaning, ("mean", "sd"))
            for name, meaning in (TERMS | OTHER_SPLITS).items()
        },
        "K": Quantity("neurons", "|a|^2 / max(a)^2", ("median",)),
        "exp(H(p))": Quantity("neurons", "exponential of the softmax's entropy", ("median",)),
        "PR": Quantity("neurons", "participation ratio, (sum a^2)^2 / sum a^4", ("median",)),
        **{name: Quantity("log gain", meaning) for name, meaning in CHANGES.items()},
    },
    estimates={
        **{
            f"{what} log s: {name}": Quantity(unit, meaning)
            for what, unit in (("share of", "share of variance"), ("covariance with", "log^2"))
            for name, meaning in (TERMS | OTHER_SPLITS).items()
        },
        **{
            f"share of log g: {name}": Quantity("share of variance", meaning)
            for name, meaning in (TERMS | OTHER_SPLITS).items()
        },
        "corr(log g, log K)": Quantity(
            "correlation",
            "over tokens; above 0 if the gain is high where many neurons share the norm of a",
            more_smeared_when="higher",
        ),
        "swap share: magnitude": Quantity(
            "share of squared difference",
            "part of two tokens' difference in log g that follows xmax, averaged over both orders of swapping",
        ),
        "swap share: shape": Quantity(
            "share of squared difference",
            "part of the same difference that follows the sizes relative to xmax",
            more_smeared_when="higher",
        ),
    },
    streams=("natural",),
    figures=(
        Figure(
            "Shares of the variance of log s", tuple(f"share of log s: {name}" for name in TERMS)
        ),
        Figure(
            "Shares of the variance of log g", tuple(f"share of log g: {name}" for name in TERMS)
        ),
        Figure(
            "Difference of two tokens' gains: parts that follow magnitude and shape",
            ("swap share: magnitude", "swap share: shape"),
        ),
        Figure("Correlation of log gain with log K", ("corr(log g, log K)",)),
        Figure(
            "Effective number of neurons", ("K", "exp(H(p))", "PR"), statistic="median", log_y=True
        ),
    ),
)
