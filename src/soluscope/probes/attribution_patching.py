"""P18: Attribution patching against exact ablation

Attribution patching replaces an ablation by the gradient times the change of the activation. The
approximation fails where the loss is curved: in the softmax over the vocabulary, in ln_final and, for
activations before the mid norm, in the gain of that norm. Holding the gain fixed in the gradient separates
the last source from the other two.

Question:
    How well does the gradient predict the effect of ablating a neuron on the loss, and does its error come
    from the mid norm's gain?

Answers:
    above 0.01: A part of the gradient's prediction passes through the mid norm's gain; the errors with the gain
        live and detached show if that part helps.
    below 0.01: The gradient's error does not come from the mid norm's gain: with the gain detached, the
        gradient predicts nearly the same effects.

Formula:
    After the norm: -h_j dl/dh_j (first order) or E_p[delta] - delta_y + Var_p[delta] / 2 (second order),
    delta the change of the logits, against l(post_j = 0) - l;
    before the norm: -a_j dl/da_j, gain live or detached, against l(mid_j = 0) - l;
    NMAE = sum |approximation - exact| / sum |exact|

Reading:
    An error of 0 is exact; an error of 1 is as large as that of predicting 0 everywhere. If detaching the
    gain changes nothing, the gain depends on no neuron: epsilon pins it, or it is a constant. With an active
    LayerNorm, detaching the gain changes the approximation by the share shown. Removing LayerNorm is expected
    to help little (Baroni et al.), because the softmax over the vocabulary is the most strongly curved part.

Pitfalls:
    The few large effects dominate the error: read it by size of the effect. Signs are compared only where the
    loss changes by more than 1e-6 nats. The overlap is between the ten largest effects, whatever their size.
    Setting mid_j to 0 is not the same as setting post_j to 0: LayerNorm still subtracts the mean from a
    neuron that is 0 before it.

Source:
    Nanda 2023, Attribution Patching; Baroni et al. 2025 (arXiv 2507.02559); protocol.md sections 7 P18 and
    8.3
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soluscope.hooked.ablation import Ablation
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Claim, Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import reading_one_neuron
from soluscope.probes._estimates import correlation, ratio
from soluscope.probes._tokens import array, arrays, every_nth, scattered

EVERY = 7
"""Stride: all neurons are ablated at every 7th token that is not BOS and has a target."""
TOLERANCE = 1e-6
"""Precision of an ablation, in nats. Signs of smaller changes are not compared."""
N_TOP = 10
N_BINS = 10

METHODS = {
    "first order": "-h_j dl/dh_j, against setting post_j to 0",
    "second order": "first two cumulants of the change of logits, against setting post_j to 0",
    "before the norm": "-a_j dl/da_j, gradient through the gain, against setting mid_j to 0",
    "before the norm, gain detached": "-a_j dl/da_j, gain fixed in the gradient, against setting mid_j to 0",
}
OF_POST = ("first order", "second order")


@dataclass(frozen=True)
class Approximations:
    """Approximate and exact effects of every neuron at some of the tokens; changes of loss, [t d_mlp], in nats."""

    tokens: Tensor
    exact: dict[str, Tensor]
    """By method: the exact effect that the method approximates."""
    found: dict[str, Tensor]
    """By method: the approximate effect."""


def approximations(run: HookedRun) -> Approximations:
    """Return the approximate and exact effects of all (token, neuron) pairs that the probe uses."""
    tokens = every_nth(run, EVERY)
    ablation = Ablation(run)
    gradient = ablation.gradient(tokens).double()
    bounds = ablation.bounds(tokens)
    post, mid = (
        edit(tokens, tolerance=TOLERANCE).double() for edit in (ablation.post, ablation.mid)
    )
    through, detached = gradients_of_mid(run, tokens, gradient)
    a = run.mid[tokens].double()
    by_method = {
        "first order": -run.post[tokens].double() * gradient,
        "second order": (bounds.first + bounds.second / 2).double(),
        "before the norm": -a * through,
        "before the norm, gain detached": -a * detached,
    }
    exact = {name: post if name in OF_POST else mid for name in METHODS}
    return Approximations(tokens, exact, by_method)


def gradients_of_mid(run: HookedRun, tokens: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return dl/da_j with the gain following a_j, and with the gain held fixed; both [t d_mlp].

    post = g gamma (a - m) + beta gives dl/da_j = g (G_j - mean G) + dg/da_j sum_i (a_i - m) G_i with
    G_i = gamma_i dl/dh_i, and g = (s2 + eps)^(-1/2) gives dg/da_j = -(a_j - m) g^3 / N. Without
    centring, m and mean G are 0. With a constant gain, dg/da_j is 0.
    """
    G = gradient * run.readout.gamma.double()
    a, gain = run.centred[tokens], run.gain[tokens, None].double()
    if run.centres:
        G = G - G.mean(-1, keepdim=True)
    detached = gain * G
    if run.eps is None:
        return detached, detached
    slope = -a * gain.pow(3) / a.shape[-1]
    return detached + slope * (a * G).sum(-1, keepdim=True), detached


def measure(run: HookedRun) -> Measured:
    """Return errors of attribution patching, per token and as shares of the exact effects."""
    at = approximations(run)
    tokens = _errors(run, at)
    return Measured(tokens, tuple(_estimates(run, at, tokens)))


def _errors(run: HookedRun, at: Approximations) -> dict[str, Tensor]:
    """Return, per token, errors and effects summed over neurons, sign agreement and top-10 overlap.

    All values are nan except at every `EVERY`-th scored token.
    """
    values: dict[str, Tensor] = {
        "effect after the norm": at.exact["first order"].abs().sum(-1),
        "effect before the norm": at.exact["before the norm"].abs().sum(-1),
    }
    for name, approximate in at.found.items():
        exact = at.exact[name]
        counted = exact.abs() > TOLERANCE
        same = (approximate.sign() == exact.sign()) & counted
        k = min(N_TOP, exact.shape[-1])
        best, guessed = (
            torch.zeros_like(counted).scatter(-1, part.abs().topk(k).indices, True)
            for part in (exact, approximate)
        )
        values[f"error: {name}"] = (approximate - exact).abs().sum(-1)
        values[f"sign agreement: {name}"] = same.sum(-1) / counted.sum(-1)
        values[f"top-10 overlap: {name}"] = (best & guessed).sum(-1) / k
    through, detached = (at.found[n] for n in METHODS if n not in OF_POST)
    values["error of detaching the gain"] = (through - detached).abs().sum(-1)
    return {name: scattered(run, at.tokens, column) for name, column in values.items()}


def _estimates(run: HookedRun, at: Approximations, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield normalised errors, over all pairs and by size of the effect, and Pearson's correlation over pairs."""
    if not len(at.tokens):
        return
    string, columns = array(run.string), arrays(tokens)
    here = array(run.string[at.tokens])
    owner = np.repeat(here, run.mid.shape[1])
    for name, approximate in at.found.items():
        effect = "effect after the norm" if name in OF_POST else "effect before the norm"
        exact = array(at.exact[name])
        yield ratio(f"NMAE: {name}", columns[f"error: {name}"], columns[effect], string)
        yield correlation(f"Pearson: {name}", array(approximate).ravel(), exact.ravel(), owner)
        size, error = np.abs(exact), np.abs(array(approximate) - exact)
        edges = np.quantile(size, np.linspace(0, 1, N_BINS + 1)[1:-1])
        bins = np.searchsorted(edges, size)
        for number in range(N_BINS):
            inside = bins == number
            yield ratio(
                f"NMAE by |dl|: {name}", (error * inside).sum(-1), (size * inside).sum(-1), here,
                x=(number + 0.5) / N_BINS,
            )  # fmt: skip
    yield ratio(
        "share of detaching the gain",
        columns["error of detaching the gain"], columns["effect before the norm"], string,
    )  # fmt: skip


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a run with a constant gain and a run with a LayerNorm, each of two neurons.

    The first neuron writes x = post, the logits are -x and x, and x = 1. S is constant at 1, because
    ln_final's epsilon is 1e24 and W_U is 1e12 times as large. The loss f(x) = log(1 + e^(-2x)) has
    slope -2q, q = 1 / (1 + e^2), and the logits, which differ by 2x, have variance 4q(1 - q) under p.

    In the first run a = (3/2, 1/2) and the gain is 2, so x is the difference of the two activations:
    dl/da is (-2q, 2q). Setting the first activation to 0 gives x = -1/2; setting the second to 0 gives
    x = 3/2.

    A LayerNorm of two neurons gives 1 for the larger and -1 for the smaller, whatever their values. So
    in the second run the gradient through the gain is 0, setting the first activation to 0 swaps the
    two outputs, and setting the second to 0 changes nothing.
    """

    def loss(x: float) -> float:
        return math.log1p(math.exp(-2 * x))

    a = torch.tensor([[[1.5, 0.5]] * 3])
    nan, q = math.nan, 1 / (1 + math.exp(2))
    removed, first, second = (loss(x) - loss(1) for x in (0, -0.5, 1.5))
    yield (
        reading_one_neuron(planted(a, gain=2.0)),
        {
            "effect after the norm": [nan, removed, nan],
            "error: first order": [nan, removed - 2 * q, nan],
            "error: second order": [nan, abs(removed - 2 * q - 2 * q * (1 - q)), nan],
            "sign agreement: first order": [nan, 1, nan],
            "top-10 overlap: first order": [nan, 1, nan],
            "effect before the norm": [nan, first - second, nan],
            "error: before the norm": [nan, abs(3 * q - first) + abs(-q - second), nan],
            "sign agreement: before the norm": [nan, 1, nan],
            "NMAE: first order": (removed - 2 * q) / removed,
            "share of detaching the gain": 0,
        },
    )
    yield (
        reading_one_neuron(planted(a, eps=1e-16)),
        {
            "effect before the norm": [nan, loss(-1) - loss(1), nan],
            "error: before the norm": [nan, loss(-1) - loss(1), nan],
            "error: before the norm, gain detached": [nan, 2 - 3 * q + q, nan],
        },
    )


_AT = f"at every {EVERY}th token"

PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_shared", "share of detaching the gain", above=0.1),
        Gate("pinned", "share of detaching the gain", within=0.01),
        # `absorbed` is near-linear: no edit of its MLP changes a loss by 1e-5 nats. In `lateral`, eight neurons
        # produce logits of standard deviation 4, so one neuron moves them by more than 1, where softmax is curved.
        *(
            gate
            for order in ("first order", "second order")
            for gate in (
                Gate("absorbed", f"NMAE: {order}", within=0.01),
                Gate("lateral", f"NMAE: {order}", above=0.1),
            )
        ),
    ),
    one_scale=True,
    tested="share of detaching the gain",
    claims=tuple(
        Claim(f"NMAE: {name}", f"Attribution patching is not more accurate: {stage}.")
        for name, stage in (
            ("first order", "of activations after the mid norm"),
            ("before the norm", "of activations before the mid norm"),
        )
    ),
    measure=measure,
    known=known,
    quantities={
        "effect after the norm": Quantity(
            "nats", f"sum over neurons of |change of loss| with post_j set to 0, {_AT}"
        ),
        "effect before the norm": Quantity(
            "nats", f"sum over neurons of |change of loss| with mid_j set to 0, {_AT}"
        ),
        "error of detaching the gain": Quantity(
            "nats", f"sum over neurons of |gradient through the gain - detached|, {_AT}"
        ),
        **{
            f"{what}: {name}": Quantity(unit, f"{meaning}, {_AT}; {method}")
            for name, method in METHODS.items()
            for what, unit, meaning in (
                ("error", "nats", "sum over neurons of |approximation - exact|"),
                ("sign agreement", "share of neurons", "approximate and exact effect have the same sign"),
                (
                    "top-10 overlap",
                    "share of 10",
                    "of the ten largest effects, the share in the ten largest approximations",
                ),
            )
        },
    },
    estimates={
        **{
            f"{what}: {name}": Quantity(unit, f"{meaning}; {method}")
            for name, method in METHODS.items()
            for what, unit, meaning in (
                ("NMAE", "share of the effect", "sum of |approximation - exact| over sum of |exact|"),
                ("Pearson", "correlation", "of approximate and exact effects, over pairs"),
                ("NMAE by |dl|", "share of the effect", "NMAE by tenth of |exact|, the smallest first"),
            )
        },
        "share of detaching the gain": Quantity(
            "share of the effect",
            "sum of |gradient through the gain - detached| over sum of |exact|, before the norm",
        ),
    },
    streams=("natural",),
    figures=(
        Figure("Error of attribution patching", tuple(f"NMAE: {name}" for name in METHODS)),
        Figure("Effect of detaching the gain", ("share of detaching the gain",)),
        Figure(
            "Correlation with exact ablation, over (token, neuron) pairs",
            tuple(f"Pearson: {name}" for name in METHODS),
        ),
        Figure(
            "Sign agreement and top-10 overlap",
            tuple(f"{what}: {name}" for what in ("sign agreement", "top-10 overlap") for name in METHODS),
        ),
        Figure(
            "Error by size of the effect", tuple(f"NMAE by |dl|: {name}" for name in METHODS),
            kind="curve", x_title="rank of |exact effect|, as a share",
        ),
    ),
)  # fmt: skip
