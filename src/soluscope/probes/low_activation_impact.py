"""P9: Low activation, high impact

The hackathon study took the lowest 10% of the activations at each position before LayerNorm, set each of
them to 0 after it, and plotted the change of the prompt's loss against the activation, in search of a second
cluster.

This probe uses exact changes of the per-token loss, ranks by |a| within the token and within the neuron, and
the same ablations in the static surrogate: the same model with one gain for all tokens,
c = exp(mean log g). D is the effect in the model minus the effect in the surrogate. For a single neuron D
shows little. To first order dl is linear in the gain, so D is (1 - c/g) dl, which is above 0 at high gains in
every model with an effect. Small effects add up, so the real test is the set curve, which ablates all of a
token's lowest neurons at once.

A set can be ablated in two ways. Setting post to 0 leaves the mean of LayerNorm's output, but also undoes
the -g m that centring gave to neurons at a = 0. In a model with one neuron per class of tokens (the control
`monosemantic`) this costs loss although no small activation carries information. Removal subtracts only
g gamma a, with mean and gain held fixed. It changes nothing where the low activations are 0, whatever the
mean. The loss at removal of the lowest nine tenths therefore measures static smuggling and smearing
together, and its D measures the part due to the gain.

Question:
    Do activations that are small before LayerNorm carry loss after it, and does the per-token gain
    cause this?

Answers:
    above 0.001: Removing the small activations (a token's lowest nine tenths) costs more loss with the
        per-token gain than with one gain for all tokens.
    -0.001 to 0.001: Removing the small activations (a token's lowest nine tenths) changes the loss as much with
        one gain for all tokens as with the per-token gain; fewer neurons than the top tenth may still behave
        differently.
    below -0.001: Removing the small activations (a token's lowest nine tenths) costs less loss with the
        per-token gain than with one gain for all tokens.

Formula:
    dl_tj = l_t(post_tj = 0 or its mean) - l_t;
    lift = E[|dl| | lowest tenth of |a|] / E[|dl|];
    D_tj = dl_tj(g_t) - dl_tj(c), c = exp(mean log g) over tokens that are not BOS;
    sets: the lowest 10% to 90% of a token's |a| at once;
    removed: post_j - g gamma_j a_j for the set's j

Reading:
    Under both static smuggling and smearing, removing a token's lowest nine tenths costs loss, since
    they carry part of the prediction. But so it does in any model whose neurons all work: plain gelu pays more
    than SoLU with LayerNorm (.20 and .18 nats against .09 and .06 in the demo), so the cost is compared with
    that of arms without a per-token gain. D of that removal is the part that one gain for all tokens would not
    have: above 0 at tokens of high gain if their per-token gain makes the low activations matter. A D of 0, or a
    removal that costs nothing, rules nothing out: a diffuse code that is narrower than the top tenth of the
    neurons is not removed (`ceiling`). D is also above 0 where other values of gamma would suffice
    (`disjoint`). The low set costs less than random neurons with as much |n| in both smearing controls, so that
    comparison is not evidence against smearing. The published scatters have the same shape in all cases.

Pitfalls:
    Removal cannot distinguish static smuggling from a code of many equal neurons that is meant to be
    read this way: where all activations matter (`uniform`, `polysemantic`) it costs loss too. Post at
    0 is LayerNorm's mean, not 'off', and undoes centring; the ablation to the mean over other documents
    is reported too. Single neurons cannot show a code spread over many neurons, and their D is above 0 at
    high gain by construction, (1 - c/g) dl to first order: read the set curve. Each change is exact to
    1e-6 nats, so |D| has a floor of that size per neuron. The surrogate is off-distribution, like any
    freeze (P4). It raises the gain of low-gain tokens, so D there measures that error. As published:
    with a constant gain the effect is linear in a, so no cluster can appear; the prompt's mean divides
    each change by the number of targets; the lowest signed activations are negative, not small.

Source:
    Baginski et al. 2023 (hackathon study), part 2, Figures 4 and 5; Nanda's problem 4.39b;
    protocol.md sections 1.6, 7 P9 and 8.2
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.comparison.stats import benjamini_hochberg, mean_p
from soluscope.hooked.ablation import Ablation, disjoint_mean, loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import reading_one_neuron
from soluscope.probes._estimates import correlation, ratio, slope, sums_by_string
from soluscope.probes._tokens import array, arrays, every_nth, scattered

EVERY = 7
"""Step between the tokens at which all neurons are ablated, among tokens that are not BOS and have a target."""
TOLERANCE = 1e-6
"""Largest error of a change of loss, in nats."""
LOWEST = 0.1
"""Share of neurons, or of a neuron's tokens, in the lowest tenth."""
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of a token's neurons that are ablated together."""
MOST = 0.9
"""Share whose removal is the headline: all neurons except the top tenth, so a code on fewer neurons stays."""
REMOVED = f"lowest {MOST:.0%} removed"
N_BINS = 10
"""Number of bins of rank: tenths."""
FLAT = 1e-9
"""Largest spread of log gain that counts as rounding; the surrogate then equals the model."""


@dataclass(frozen=True)
class Ablations:
    """Ablations of every neuron at some of the tokens; each tensor except `tokens` is [t d_mlp]."""

    tokens: Tensor
    live: HookedRun
    """The model at these tokens."""
    fixed: HookedRun
    """The static surrogate at these tokens."""
    post_mean: Tensor
    """Mean of each neuron's post over all strings except the token's."""
    zero: Tensor
    """Change of loss with post_tj at 0."""
    mean: Tensor
    """Change of loss with post_tj at `post_mean`."""
    static: Tensor
    """Change of the static surrogate's loss with post_tj at 0."""
    in_token: Tensor
    """Rank of |a_tj| among the token's neurons, 0 to d_mlp - 1."""
    in_neuron: Tensor
    """Rank of |a_tj| among the neuron's values at these tokens, as a share from 0 to below 1."""


def ablations(run: HookedRun) -> Ablations:
    """Compute the (token, neuron) ablations behind all numbers of the probe."""
    tokens = every_nth(run, EVERY)
    live = run.subset(tokens)
    live = replace(live, loss=loss_at_post(live, live.post))  # run.loss is fp32 for every model
    fixed = surrogate(live, float(run.mean_log_gain.exp()))
    post_mean = disjoint_mean(run, "post")[tokens]
    every = torch.arange(len(tokens), device=run.device)
    ablation = Ablation(live)
    return Ablations(
        tokens=tokens,
        live=live,
        fixed=fixed,
        post_mean=post_mean,
        zero=ablation.post(every, tolerance=TOLERANCE).double(),
        mean=ablation.post(every, post_mean, tolerance=TOLERANCE).double(),
        static=Ablation(fixed).post(every, tolerance=TOLERANCE).double(),
        in_token=_ranks(live.mid.abs(), -1),
        in_neuron=_ranks(live.mid.abs(), 0) / max(1, len(tokens)),
    )


def surrogate(run: HookedRun, gain: float) -> HookedRun:
    """Return the run with the same weights and tokens and one gain for all tokens."""
    factor = (gain * run.scale.double()).to(run.post.dtype)[:, None]
    beta = run.readout.beta
    post = beta + (run.post - beta) * factor
    static = replace(run, post=post, scale=torch.full_like(run.scale, 1 / gain), eps=None)
    return replace(static, loss=loss_at_post(static, post))


def _ranks(sizes: Tensor, dim: int) -> Tensor:
    """Return ranks of `sizes` along `dim`, 0 for the smallest; ties are ordered at random.

    Sizes within a relative distance of about 1e-6 are tied, and so are all sizes below 1e-12 of the largest,
    so that rounding does not order them. The distance is relative because softmax spreads sizes over many
    powers of ten.
    """
    numbers = sizes.double()
    least = 1e-12 * float(numbers.max()) if len(numbers) else 0.0
    steps = (numbers.clamp(min=least).log() / 1e-6).round()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(sizes.shape, generator=generator, dtype=torch.float64)
    drawn = drawn.to(sizes.device).argsort(dim)
    order = drawn.gather(dim, steps.gather(dim, drawn).argsort(dim=dim, stable=True))
    return order.argsort(dim).double()


def _lowest(rank: Tensor, share: float) -> Tensor:
    """Select the `share` of each token's neurons with the lowest rank, at least one neuron: bool [t d_mlp]."""
    return rank < max(1, round(share * rank.shape[-1]))


def sets(ablated: Ablations, share: float) -> dict[str, Tensor]:
    """Return the sets of neurons that are ablated together, bool [t d_mlp].

    "lowest": the `share` of neurons with the lowest |a| in the token. "random": as many random neurons.
    "same |n|": random neurons, added in order as long as their sum of |n| is at most that of the lowest set
    (n: the output of the mid norm before gamma and beta). "lowest in neuron": the neurons whose |a| is in the
    lowest `share` of that neuron's values, however many these are.
    """
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.rand(ablated.in_token.shape, generator=generator, dtype=torch.float64)
    order = shuffled.to(ablated.tokens.device).argsort(-1).argsort(-1).double()
    lowest = _lowest(ablated.in_token, share)
    mass = ablated.live.centred.abs()  # |n| divided by the token's gain
    allowed = (mass * lowest).sum(-1, keepdim=True)
    by_order = order.argsort(-1)
    running = mass.gather(-1, by_order).cumsum(-1)
    within = torch.zeros_like(lowest).scatter(-1, by_order, running <= allowed * (1 + 1e-12))
    return {
        "lowest": lowest,
        "random": _lowest(order, share),
        "same |n|": within,
        "lowest in neuron": ablated.in_neuron < share,
    }


def set_effects(ablated: Ablations, share: float) -> dict[str, Tensor]:
    """Return the change of loss when a whole set is ablated, by name as in `SET_CURVES`; each [t], nats."""
    live, fixed = ablated.live, ablated.fixed
    zero, mean = torch.zeros_like(live.post), ablated.post_mean
    chosen = sets(ablated, share)

    def change(of: HookedRun, which: str, to: Tensor) -> Tensor:
        return (loss_at_post(of, to.where(chosen[which], of.post)) - of.loss).double()

    def removed(of: HookedRun) -> Tensor:
        return change(of, "lowest", of.post - of.gain[:, None] * of.mid * of.readout.gamma)

    effects = {
        "lowest": change(live, "lowest", zero),
        "random": change(live, "random", zero),
        "same |n|": change(live, "same |n|", zero),
        "lowest, to the mean": change(live, "lowest", mean),
        "random, to the mean": change(live, "random", mean),
        "lowest, static gain": change(fixed, "lowest", zero),
        "lowest, removed": removed(live),
        "lowest, removed, static gain": removed(fixed),
        "lowest in neuron": change(live, "lowest in neuron", zero),
        "lowest in neuron, static gain": change(fixed, "lowest in neuron", zero),
    }
    for name in ("lowest", "lowest, removed", "lowest in neuron"):
        effects[f"{name}, D"] = effects[name] - effects[f"{name}, static gain"]
    return effects


def measure(run: HookedRun) -> Measured:
    """Return effects of single neurons and of sets of the lowest: per token, by rank, and per neuron."""
    ablated = ablations(run)
    tokens = _effects(run, ablated)
    return Measured(tokens, tuple(_estimates(run, ablated, tokens)), _by_neuron(run, ablated))


def _effects(run: HookedRun, ablated: Ablations) -> dict[str, Tensor]:
    """Return effects of single neurons and of sets of the lowest, and their differences from the surrogate's.

    Returns:
        nan except at every `EVERY`-th token. D where the gain is high (low) is also nan at tokens whose gain
        is not above (is above) the surrogate's.
    """
    low = _lowest(ablated.in_token, LOWEST)
    D = ablated.zero - ablated.static
    half, most = set_effects(ablated, 0.5), set_effects(ablated, MOST)
    above = ablated.live.gain.double() > float(run.mean_log_gain.exp())
    values = {
        "|dl|, all": ablated.zero.abs().mean(-1),
        "|dl|, lowest tenth": (ablated.zero.abs() * low).sum(-1) / low.sum(-1),
        "D": D.sum(-1),
        "D where the gain is high": D.sum(-1).where(above, torch.nan),
        "D where the gain is low": D.sum(-1).where(~above, torch.nan),
        "|D|": D.abs().sum(-1),
        "lowest half ablated": half["lowest"],
        "random half ablated": half["random"],
        "lowest half ablated, D": half["lowest, D"],
        REMOVED: most["lowest, removed"],
        f"{REMOVED}, D": most["lowest, removed, D"],
        f"{REMOVED}, D where the gain is high": most["lowest, removed, D"].where(above, torch.nan),
    }
    columns = {name: scattered(run, ablated.tokens, column) for name, column in values.items()}
    return columns | {"gain": run.gain}


def _estimates(run: HookedRun, ablated: Ablations, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield lifts, curves over ranks and over sets, and the published figures."""
    if not len(ablated.tokens):
        return
    string = array(run.string[ablated.tokens])
    yield from _lifts(ablated, string)
    yield from _deciles(ablated, string)
    yield from _residual(run, tokens)
    for share in SHARES:
        for name, effect in set_effects(ablated, share).items():
            values = array(effect)
            yield ratio(f"set: {name}", values, values * 0 + 1, string, x=share)
    yield from _published(run, ablated, string)


def _lifts(ablated: Ablations, string: NDArray[np.int64]) -> Iterator[Estimate]:
    """Yield E[|dl| | lowest tenth of |a|] / E[|dl|], a ratio of two means over (token, neuron) pairs."""
    n_neurons = ablated.zero.shape[1]
    low_sets = {
        "in token": _lowest(ablated.in_token, LOWEST),
        "in neuron": ablated.in_neuron < LOWEST,
    }
    for to, effect in (("", ablated.zero), (", to the mean", ablated.mean)):
        size = effect.abs()
        for within, low in low_sets.items():
            parts = [
                array((size * low).sum(-1)), array(low.sum(-1)),
                array(size.sum(-1)), array(low.sum(-1)) * 0.0 + n_neurons,
            ]  # fmt: skip
            sums, n = sums_by_string(parts, string)
            yield Estimate(f"lift, lowest {within}{to}", sums, _ratio_of_means, n)


def _ratio_of_means(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        value: NDArray[np.float64] = (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3])
    return value


def _deciles(ablated: Ablations, string: NDArray[np.int64]) -> Iterator[Estimate]:
    """Yield by tenth of |a|: mean |dl|, its upper quantiles, and the density of high |dl| over the surrogate's."""
    n_neurons = ablated.zero.shape[1]
    size, static = array(ablated.zero.abs()), array(ablated.static.abs())
    tenths = {
        "in token": array((ablated.in_token / n_neurons * N_BINS).long()),
        "in neuron": array((ablated.in_neuron * N_BINS).long()),
    }
    for tenth in range(N_BINS):
        x = (tenth + 0.5) / N_BINS
        for within, bins in tenths.items():
            inside = bins == tenth
            yield ratio(
                f"mean |dl| by rank {within}",
                (size * inside).sum(-1), inside.sum(-1), string, x=x,
            )  # fmt: skip
        inside = tenths["in token"] == tenth
        owner = np.repeat(string, inside.sum(-1))
        for q in (0.95, 0.99):
            yield _quantile(f"{q:.0%} quantile of |dl| by rank", size[inside], owner, q, x)
        high = np.quantile(static[inside], 0.99) if inside.any() else np.inf
        expected = (inside & (static > high)).sum(-1)
        if expected.any():
            yield ratio(
                "density of high |dl| over surrogate's by rank",
                (inside & (size > high)).sum(-1), expected, string, x=x,
            )  # fmt: skip


def _quantile(
    quantity: str, values: NDArray[np.float64], string: NDArray[np.int64], q: float, x: float
) -> Estimate:
    """Return a quantile as a function of sums: cumulative counts at edges, interpolated linearly.

    The edges are quantiles of all values. They cover the upper tail of size 4 (1 - q), in steps of
    (1 - q) / 100.
    """
    ranks = 1 - (1 - q) * np.linspace(4, 0, 401)
    edges = np.quantile(values, ranks) if len(values) else np.zeros(1)
    names, owner = np.unique(string, return_inverse=True)
    counts = np.zeros((len(names), len(edges) + 1))
    np.add.at(counts, (owner, np.searchsorted(edges, values)), 1)
    sums = counts.cumsum(axis=1)  # counts up to each edge, then of all values

    def value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        wanted = q * sums[:, -1:]
        after = np.minimum((sums[:, :-1] < wanted).sum(1), len(edges) - 1)
        before = np.maximum(after - 1, 0)
        rows = np.arange(len(sums))
        low, high = sums[rows, before], sums[rows, after]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(high > low, (wanted[:, 0] - low) / (high - low), 1.0)
        result: NDArray[np.float64] = edges[before] + part.clip(0, 1) * (
            edges[after] - edges[before]
        )
        return result

    return Estimate(quantity, sums, value, len(values), x=x)


def _residual(run: HookedRun, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield the size of D relative to the effects, and its dependence on the gain."""
    n_neurons = run.mid.shape[1]
    string, columns = array(run.string), arrays(tokens)
    yield ratio("|D| over |dl|", columns["|D|"], columns["|dl|, all"] * n_neurons, string)
    log_gain = array(run.gain.double().log())
    if np.ptp(log_gain[~np.isnan(columns["D"])]) > FLAT:
        yield correlation("correlation of D and log gain", log_gain, columns["D"], string)
        yield slope("slope of D on log gain", log_gain, columns["D"], string)


def _published(run: HookedRun, ablated: Ablations, string: NDArray[np.int64]) -> Iterator[Estimate]:
    """Yield Figures 4 and 5: change of the prompt's mean loss against signed activation, over pairs."""
    row = run.is_bos.cumsum(0)
    n_targets = torch.bincount(row, weights=(run.target >= 0).double())[row][ablated.tokens]
    change = array(ablated.zero / n_targets[:, None])
    activation = array(run.mid[ablated.tokens].double())
    signed = run.mid[ablated.tokens].argsort(stable=True).argsort().double()
    for figure, kept in (("Figure 4", _lowest(signed, LOWEST)), ("Figure 5", signed >= 0)):
        inside = array(kept)
        a, y = activation[inside], change[inside]
        owner = np.repeat(string, inside.sum(-1))
        yield correlation(f"{figure} (as published): correlation", a, y, owner)
        bins = (_rank(a) * N_BINS // len(a)).astype(int)
        for number in range(N_BINS):
            in_bin = bins == number
            if in_bin.any():
                yield ratio(
                    f"{figure} (as published)", y[in_bin], np.ones(in_bin.sum()), owner[in_bin],
                    x=float(a[in_bin].mean()),
                )  # fmt: skip


def _rank(values: NDArray[np.float64]) -> NDArray[np.intp]:
    ranks: NDArray[np.intp] = np.argsort(np.argsort(values, kind="stable"))
    return ranks


def _by_neuron(run: HookedRun, ablated: Ablations) -> dict[str, Tensor]:
    """Return for each neuron its mean |dl|, its mean D and the p-value of that mean D.

    The p-value is two-sided, over strings, for a true mean of 0, and adjusted over neurons after Benjamini
    and Hochberg: of the neurons with an adjusted p below q, an expected share of at most q is false.
    """
    D = ablated.zero - ablated.static
    string = array(run.string[ablated.tokens])
    sums, _ = sums_by_string([*array(D.T), array(D[:, 0]) * 0 + 1], string)
    return {
        "mean |dl|": ablated.zero.abs().mean(0),
        "mean D": D.mean(0),
        "adjusted p of mean D": torch.from_numpy(
            benjamini_hochberg(mean_p(sums[:, :-1], sums[:, -1]))
        ),
    }


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield two neurons, of which the first writes x = post as logits -x and x, under a norm and one gain.

    S is 1: an epsilon of 1e24 with weights 1e12 times as large makes it one number. The loss is
    log(1 + e^(-2x)), and log 2 without the neuron. Gains of 1/3 and 3 have the geometric mean 1. The probe
    reads only the token after BOS, one of three tokens. There a = (2, -4), a minus its mean is (3, -3), and
    post is 1, or 3 under the surrogate's gain. The first neuron is the lowest tenth and half; nine tenths
    round to both neurons, but no logit reads the second. Removal of the first leaves a - m = 1, so post is
    1/3, or 1 in the surrogate. The second run has one gain for all tokens, so D is 0.
    """

    def loss(x: float) -> float:
        return math.log1p(math.exp(-2 * x))

    a = torch.tensor([[[1.0, -1.0], [3.0, -3.0], [1 / 3, -1 / 3]]]) - 1
    nan, effect, at_constant = math.nan, loss(0) - loss(1), loss(0) - loss(3)
    yield (
        reading_one_neuron(planted(a, eps=1e-14)),
        {
            "|dl|, all": [nan, effect / 2, nan],
            "|dl|, lowest tenth": [nan, effect, nan],
            "D": [nan, effect - at_constant, nan],
            "lowest half ablated": [nan, effect, nan],
            "lowest half ablated, D": [nan, effect - at_constant, nan],
            "lowest 90% removed": [nan, loss(1 / 3) - loss(1), nan],
            "lowest 90% removed, D": [nan, loss(1 / 3) - loss(1) - (loss(1) - loss(3)), nan],
            "|D| over |dl|": (at_constant - effect) / effect,
            "lift, lowest in token": 2,
            "lift, lowest in neuron": 1,
        },
    )
    yield (
        reading_one_neuron(planted(a, gain=2.0)),
        {
            "D": [nan, 0, nan],
            "lowest half ablated": [nan, loss(0) - loss(6), nan],
            "lowest 90% removed": [nan, loss(2) - loss(6), nan],
            "lowest 90% removed, D": [nan, 0, nan],
            "|D| over |dl|": 0,
        },
    )


SET_CURVES = {
    "lowest": "neurons with the lowest |a|, post set to 0",
    "random": "as many random neurons, post set to 0",
    "same |n|": "random neurons with at most as much |n| as the lowest set, post set to 0",
    "lowest, to the mean": "neurons with the lowest |a|, each set to its mean over all other documents",
    "random, to the mean": "as many random neurons, each set to its mean over all other documents",
    "lowest, static gain": "neurons with the lowest |a|, post set to 0 under one gain for all tokens",
    "lowest, D": "neurons with the lowest |a|, post set to 0: the model minus the static surrogate",
    "lowest, removed": "g gamma a of the neurons with the lowest |a| subtracted from post, mean and gain held",
    "lowest, removed, static gain": "the same removal under one gain for all tokens",
    "lowest, removed, D": "the same removal: the model minus the static surrogate",
    "lowest in neuron": "neurons whose |a| is among the lowest of that neuron's values, post set to 0",
    "lowest in neuron, static gain": "the same neurons, post set to 0 under one gain for all tokens",
    "lowest in neuron, D": "the same neurons: the model minus the static surrogate",
}
_BY_REMOVAL = (REMOVED, f"{REMOVED}, D", f"{REMOVED}, D where the gain is high")
_AT = f"at every {EVERY}th token"

PROBE = Probe(
    __doc__,
    gates=(
        *(
            Gate(positive, quantity, above=0.1)
            for positive in ("smear_shared", "smear_graded")
            for quantity in (REMOVED, f"{REMOVED}, D where the gain is high")
        ),
        Gate("smear_shared", f"{REMOVED}, D", above=0.1),
        # Other values of gamma would suffice here, so D does not prove that a per-token gain is needed.
        Gate("disjoint", f"{REMOVED}, D", above=0.05),
        Gate("pinned", REMOVED, above=0.1),
        Gate("monosemantic", REMOVED, within=0.001),
        *(
            Gate(negative, f"{REMOVED}, D", within=0.001)
            for negative in ("pinned", "monosemantic", "uniform")
        ),
        Gate("smear_shared", "|D| over |dl|", above=0.1),
        *(
            Gate(negative, "|D| over |dl|", within=0.01)
            for negative in ("pinned", "uniform", "monosemantic")
        ),
    ),
    one_scale=True,
    tested=f"{REMOVED}, D",
    measure=measure,
    known=known,
    quantities={
        "|dl|, all": Quantity("nats / neuron", f"size of a neuron's effect |dl|, mean over all neurons, {_AT}"),
        "|dl|, lowest tenth": Quantity(
            "nats / neuron", f"the same over the tenth of the token's neurons with the lowest |a|, {_AT}"
        ),
        "D": Quantity(
            "nats", f"effects of single neurons minus their effects under one gain, summed over neurons, {_AT}",
            split_by=("gain",),
        ),
        "D where the gain is high": Quantity(
            "nats", "D at tokens whose gain is above the surrogate's, where (1 - c/g) is above 0",
        ),
        "D where the gain is low": Quantity(
            "nats", "D at the other tokens, whose gain the surrogate raises: off-distribution"
        ),
        "|D|": Quantity("nats", f"size of D of single neurons, summed over neurons, {_AT}"),
        f"{REMOVED}, D where the gain is high": Quantity(
            "nats", f"{REMOVED}, D, at tokens whose gain is above the surrogate's", more_smeared_when="higher"
        ),
        "lowest half ablated": Quantity(
            "nats", f"change of loss with post at 0 for the half of the neurons with the lowest |a|, {_AT}",
            split_by=("gain",),
        ),
        "random half ablated": Quantity("nats", f"the same with a random half, {_AT}"),
        "lowest half ablated, D": Quantity(
            "nats", f"lowest half: the model's change minus the static surrogate's, {_AT}",
            split_by=("gain",),
        ),
        REMOVED: Quantity(
            "nats", f"change of loss without g gamma a of the 90% of neurons with the lowest |a|, {_AT}",
            split_by=("gain",),
        ),
        f"{REMOVED}, D": Quantity(
            "nats", f"the same removal: the model's change minus the static surrogate's, {_AT}",
            split_by=("gain",), more_smeared_when="higher",
        ),
    },
    estimates={
        **{
            f"lift, lowest in {place}{to}": Quantity(
                "ratio", f"E[|dl| | lowest tenth of |a| in the {place}] / E[|dl|]; post set to {what}",
            )
            for place in ("token", "neuron")
            for to, what in (("", "0"), (", to the mean", "its mean over other documents"))
        },
        **{
            f"mean |dl| by rank in {place}": Quantity(
                "nats / neuron", f"size of the effect by tenth of |a| within the {place}"
            )
            for place in ("token", "neuron")
        },
        **{
            f"{q}% quantile of |dl| by rank": Quantity(
                "nats / neuron", f"{q}% quantile of the size of effects, by tenth of |a| within the token"
            )
            for q in (95, 99)
        },
        "density of high |dl| over surrogate's by rank": Quantity(
            "ratio",
            "pairs with |dl| above the surrogate's 99% quantile in that tenth of |a|, over the surrogate's pairs",
        ),
        "|D| over |dl|": Quantity(
            "ratio", "sum of |D| over sum of |dl|: share of the effects that one gain for all does not reproduce",
        ),
        "correlation of D and log gain": Quantity(
            "correlation", "correlation over tokens, D summed over neurons; above 0 by construction"
        ),
        "slope of D on log gain": Quantity("nats", "the same association as a slope"),
        **{
            f"set: {name}": Quantity("nats", f"change of loss: {meaning}")
            for name, meaning in SET_CURVES.items()
        },
        **{
            f"{figure} (as published)": Quantity(
                "nats of a prompt's mean loss", f"mean change by activation, {which}"
            )
            for figure, which in (("Figure 4", "lowest tenth of signed a"), ("Figure 5", "all activations"))
        },
        **{
            f"{figure} (as published): correlation": Quantity(
                "correlation", "correlation of activation and change of the prompt's mean loss, over pairs"
            )
            for figure in ("Figure 4", "Figure 5")
        },
    },
    streams=("natural",),
    figures=(
        Figure(
            "Set curve: a share of each token's neurons ablated at once",
            tuple(f"set: {name}" for name in SET_CURVES),
            kind="curve", x_title="share of the token's neurons",
        ),
        Figure("Lowest nine tenths removed: change of loss, and its D", _BY_REMOVAL),
        Figure("D of the removal of the lowest nine tenths, by quartile of gain", (f"{REMOVED}, D",), group="gain"),
        Figure(
            "D of single neurons and of the lowest half, post set to 0",
            ("D where the gain is high", "D where the gain is low", "lowest half ablated, D", "|D| over |dl|"),
        ),
        Figure(
            "Lift of the lowest tenth of |a|",
            tuple(f"lift, lowest in {place}{to}" for place in ("token", "neuron") for to in ("", ", to the mean")),
        ),
        Figure(
            "Effect of a neuron by rank of its |a|",
            (
                "mean |dl| by rank in token", "mean |dl| by rank in neuron",
                "95% quantile of |dl| by rank", "99% quantile of |dl| by rank",
                "density of high |dl| over surrogate's by rank",
            ),
            kind="curve", x_title="rank of |a|, as a share",
        ),
        Figure(
            "Figures 4 and 5 as published: change of the prompt's loss against the activation",
            ("Figure 4 (as published)", "Figure 5 (as published)"),
            kind="curve", x_title="activation before LayerNorm",
        ),
    ),
)  # fmt: skip
