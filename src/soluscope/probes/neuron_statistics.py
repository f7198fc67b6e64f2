"""P13: Neuron statistics

A neuron that answers to one thing is mostly silent: its distribution is skewed, heavy-tailed and sparse,
and which token stands there explains it. A rotation of the same activations has none of that, so the
kurtosis over that of a rotated basis says how far the basis is privileged. But SoLU makes tails out of
Gaussian noise: the kurtosis is also set against Gaussian pre-activations with each neuron's own mean
and variance, sent through the same nonlinearity.

Question:
    Are the neurons a basis in which activations are sparse, heavy-tailed and about tokens, and does
    the norm change that?

Formula:
    median over neurons of skewness, excess kurtosis and density (E|x|)^2 / E x^2;
    mean over neurons of token information, Cov(x, the token's mean in other documents) / Var(x);
    privileged basis = median kurtosis less that of a random rotation;
    by token (sum a^2)^2 / sum a^4, |a|^2 / max a^2, share of |a| > max |a| / 10

Reading:
    With smearing the neurons are aligned before the norm and less so after it: kurtosis, and its
    excess over a rotated basis, fall from mid to post, and the density rises, because distributed
    activations are amplified. A norm whose gain is one constant leaves every neuron's shape as it
    was, up to centring: post less mid is 0. Where the kurtosis of mid is no more than that of
    Gaussian pre-activations, SoLU made it, not the model.

Pitfalls:
    x softmax(x) makes tails out of anything: read no kurtosis without the Gaussian beside it.
    Kurtosis rests on few tokens and, where tails are heavy, grows with their number: compare it on
    the same text only. The three counts of neurons (participation ratio, K_eff, active neurons)
    weigh tails differently and may disagree. post has gamma and beta in it, which change no
    neuron's kurtosis, and the skewness only in sign. In a trained model tokens tell something about
    any direction, rotated ones too.

Source:
    science.md section 7 P13; Elhage et al. 2022, section 3.2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.data.streams import evenly_spaced
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._features import (
    first_half,
    mean_of_defined,
    median_of_defined,
    sums_by_document,
)

Floats = NDArray[np.float64]

STAGES = ("pre", "mid", "post")
ABOVE = 0.1
"""A neuron counts as active where it exceeds this share of the token's largest |activation|."""
MAX_NEURONS = 512
"""Averages are over at most so many neurons, evenly spaced; rotations and the table have all."""
SEED = 0
"""Of the rotation and of the Gaussian pre-activations."""


def measure(run: HookedRun) -> Measured:
    """Return how many neurons carry each token, and the shape of the neurons' distributions."""
    content = run.subset(~run.is_bos)
    values = {stage: _values(content, stage) for stage in STAGES}
    estimates = tuple(_estimates(content, values))
    return Measured(_counts(run), estimates, _by_neuron(content, values))


def _counts(run: HookedRun) -> dict[str, Tensor]:
    """Return how many neurons carry each token, in three counts that need not agree.

    Returns:
        By stage: participation ratio, (sum a^2)^2 / sum a^4; K_eff, |a|^2 / max(a)^2; and the share
        of neurons above a tenth of the token's largest |a|. nan at a token that is 0 everywhere.
    """
    counts = {}
    for stage in STAGES:
        square = getattr(run, stage).double().square()
        largest = square.amax(-1)
        total = square.sum(-1)
        counts[f"participation ratio: {stage}"] = total.square() / square.square().sum(-1)
        counts[f"K_eff: {stage}"] = total / largest
        active = (square > ABOVE**2 * largest[:, None]).double().mean(-1)
        counts[f"active neurons: {stage}"] = active.masked_fill(largest == 0, float("nan"))
    return counts


def _estimates(content: HookedRun, values: dict[str, Floats]) -> Iterator[Estimate]:
    """Averages over neurons, BOS left out; neurons that never vary have no shape and are left out."""
    string, n = content.string.numpy(), len(content.pos)
    for stage in STAGES:
        sums = _information_sums(content, _some(values[stage]))
        # A mean: the median of shares that are nothing but noise lies below 0.
        yield Estimate(f"token information: {stage}", sums, _mean_information, n)
    powers = {stage: _power_sums(_some(values[stage]), string) for stage in STAGES}
    for stage in STAGES:
        for name, moment in (("skewness", _skewness), ("excess kurtosis", _kurtosis)):
            yield _median_moment(f"{name}: {stage}", powers[stage], moment, n)
        sums = _density_sums(_some(values[stage]), string)
        yield Estimate(f"density: {stage}", sums, lambda sums: median_of_defined(_density(sums)), n)
    rotation = _rotation(content.mid.shape[1])
    for stage in STAGES:
        rotated = _power_sums(_some(values[stage] @ rotation), string)
        yield _less(f"privileged basis: {stage}", powers[stage], rotated, n, paired=False)
    gaussian = _power_sums(_some(_through_gaussian(content)), string)
    yield _less("kurtosis over Gaussian: mid", powers["mid"], gaussian, n, paired=True)
    yield _less("kurtosis, post less mid", powers["post"], powers["mid"], n, paired=True)


def _median_moment(quantity: str, sums: Floats, moment: Moment, n: int) -> Estimate:
    total = sums.sum(axis=0)
    return Estimate(quantity, sums, lambda drawn: median_of_defined(moment(drawn, total)), n)


def _less(quantity: str, first: Floats, second: Floats, n: int, paired: bool) -> Estimate:
    """Kurtosis less another: the median neuron's difference, or, unpaired, that of two medians."""
    totals = first.sum(axis=0), second.sum(axis=0)

    def value(drawn: Floats) -> Floats:
        halves = np.split(drawn, 2, axis=1)
        left, right = (_kurtosis(*pair) for pair in zip(halves, totals, strict=True))
        if paired:
            return median_of_defined(left - right)
        return median_of_defined(left) - median_of_defined(right)

    return Estimate(quantity, np.concatenate([first, second], axis=1), value, n)


def _by_neuron(content: HookedRun, values: dict[str, Floats]) -> dict[str, Tensor]:
    """Return one row per neuron, over the tokens that are not BOS; nan for a neuron that never varies."""
    string = content.string.numpy()
    columns: dict[str, Floats] = {}
    for stage, activations in values.items():
        total = _power_sums(activations, string).sum(axis=0)
        columns[f"skewness: {stage}"] = _skewness(total[None], total)[0]
        columns[f"excess kurtosis: {stage}"] = _kurtosis(total[None], total)[0]
        density = _density_sums(activations, string).sum(axis=0, keepdims=True)
        columns[f"density: {stage}"] = _density(density)[0]
        information = _information_sums(content, activations).sum(axis=0, keepdims=True)
        columns[f"token information: {stage}"] = _information(information)[0]
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _values(run: HookedRun, stage: str) -> Floats:
    values: Floats = getattr(run, stage).numpy().astype(np.float64)
    return values


def _some(values: Floats) -> Floats:
    """At most MAX_NEURONS columns, evenly spaced."""
    return values[:, evenly_spaced(values.shape[1], MAX_NEURONS)]


def _rotation(n: int) -> Floats:
    """A random orthogonal matrix."""
    rotation: Floats = np.linalg.qr(np.random.default_rng(SEED).standard_normal((n, n)))[0]
    return rotation


def _through_gaussian(run: HookedRun) -> Floats:
    """The nonlinearity of independent Gaussians with each neuron's own mean and variance of pre.

    Whole vectors are drawn: SoLU's softmax runs over all neurons.
    """
    noise = np.random.default_rng(SEED + 1).standard_normal(tuple(run.pre.shape))
    pre = run.pre.mean(0) + run.pre.std(0, correction=0) * torch.from_numpy(noise)
    mid: Floats = run.mlp.nonlinearity(pre.to(run.pre.dtype)).numpy().astype(np.float64)
    return mid


def _power_sums(values: Floats, string: NDArray[np.int64]) -> Floats:
    """Counts and sums of z, z^2, z^3 and z^4, z the standardised values; [document 5*neuron]."""
    sd = _spread(values)
    z = np.where(sd > 0, values - values.mean(axis=0), 0.0) / np.where(sd > 0, sd, 1.0)
    power, sums = np.ones_like(z), []
    for _ in range(5):
        sums.append(sums_by_document(power, string))
        power = power * z
    return np.concatenate(sums, axis=1)


def _spread(values: Floats) -> Floats:
    """Return each neuron's sd, 0 where it is no more than rounding."""
    sd = values.std(axis=0)
    spread: Floats = np.where(sd > 1e-6 * np.abs(values).max(axis=0, initial=0.0), sd, 0.0)
    return spread


Moment = Callable[..., "Floats"]
"""From weighted power sums [draw 5*neuron] and those of all tokens [5*neuron] to [draw neuron]."""


def _skewness(sums: Floats, total: Floats) -> Floats:
    """To first order in the weights, where z has mean 0 and variance 1 over all tokens."""
    (m1, m2, m3, _), (_, third, _) = _moments(sums), _shape(total)
    return m3 - 3 * m1 - 1.5 * third * (m2 - 1)


def _kurtosis(sums: Floats, total: Floats) -> Floats:
    """Excess kurtosis, to first order in the weights.

    Resamples of a heavy tail have a shorter one, the more so the heavier it is; draws of the kurtosis
    itself would all lie to one side of it.
    """
    (m1, m2, _, m4), (_, third, fourth) = _moments(sums), _shape(total)
    return m4 - 4 * third * m1 - 2 * fourth * (m2 - 1) - 3


def _shape(total: Floats) -> list[Floats]:
    """Variance, third and fourth moment of z over all tokens; nan for a neuron that never varies."""
    _, second, third, fourth = _moments(total[None])
    return [np.where(second > 0, moment, np.nan)[0] for moment in (second, third, fourth)]


def _moments(sums: Floats) -> list[Floats]:
    """Means of z to z^4, [draw neuron] each."""
    n, *powers = np.split(sums, 5, axis=1)
    return [power / n for power in powers]


def _density_sums(values: Floats, string: NDArray[np.int64]) -> Floats:
    """Counts and sums of |x| and x^2, in units of the largest; [document 3*neuron]."""
    size = np.abs(values)
    largest = size.max(axis=0, initial=0.0)
    size = size / np.where(largest > 0, largest, 1.0)
    parts = (np.ones_like(size), size, size * size)
    return np.concatenate([sums_by_document(part, string) for part in parts], axis=1)


def _density(sums: Floats) -> Floats:
    """(mean |x|)^2 / mean x^2: 1 where all tokens excite alike, p where a share p does."""
    n, size, square = np.split(sums, 3, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = size**2 / (n * square)
    return result


def _information_sums(run: HookedRun, values: Floats) -> Floats:
    """Counts and moments of x and of what the token's identity predicts; [document 5*neuron].

    The prediction is the token's mean over the first half of the documents, the mean of all where it
    does not occur there; the sums are over the second half.
    """
    known, tokens = first_half(run), run.tokens.numpy()
    _, kind = np.unique(tokens, return_inverse=True)
    means = np.broadcast_to(values[known].mean(axis=0), (kind.max() + 1, values.shape[1])).copy()
    seen = np.unique(kind[known])
    counts = np.bincount(kind[known])[seen]
    means[seen] = sums_by_document(values[known], kind[known]) / counts[:, None]
    scale = np.where(_spread(values) > 0, _spread(values), 1.0)
    x = (values[~known] - values.mean(axis=0)) / scale
    predicted = (means[kind[~known]] - values.mean(axis=0)) / scale
    parts, string = (np.ones_like(x), x, predicted, x * predicted, x * x), run.string.numpy()
    return np.concatenate([sums_by_document(part, string[~known]) for part in parts], axis=1)


def _information(sums: Floats) -> Floats:
    """Cov(x, prediction) / Var(x), [draw neuron].

    The prediction's noise is that of other documents, so its covariance with x is the variance between
    tokens without the bias that 1 - residual / variance would have: 0 where tokens tell nothing.
    """
    n, x, predicted, product, square = np.split(sums, 5, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = square / n - (x / n) ** 2
        covariance = product / n - x / n * predicted / n
    result: Floats = covariance / np.where(variance > 1e-9, variance, np.nan)
    return result


def _mean_information(sums: Floats) -> Floats:
    return mean_of_defined(_information(sums))


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Four neurons and four tokens, each neuron at 3 on its own token and 0 elsewhere.

    A neuron is on with p = 1/4: skewness (1 - 2p) / sqrt(pq), excess kurtosis (1 - 6pq) / (pq),
    density p. The mean over neurons is one constant, so centring changes no shape. Where the tokens
    are dealt so that each stands once on each neuron, they tell nothing.
    """
    bos = torch.tensor([[2.0, 2.0, 1.0, 0.0]])
    document = torch.cat([bos, 3 * torch.eye(4)[[0, 1, 2, 3] * 4]])
    run = planted(document.expand(6, -1, -1), gain=2.0)
    tokens = torch.tensor([4, *[0, 1, 2, 3] * 4]).repeat(6)
    shape: dict[str, Any] = {
        f"{name}: {stage}": answer
        for stage in ("pre", "mid", "post")
        for name, answer in (
            ("skewness", 0.5 / 0.1875**0.5),
            ("excess kurtosis", (1 - 6 * 0.1875) / 0.1875),
            ("token information", 1.0),
        )
    }
    counts = {
        "participation ratio: mid": ([81 / 33] + [1] * 16) * 6,
        "K_eff: mid": ([9 / 4] + [1] * 16) * 6,
        "active neurons: mid": ([3 / 4] + [1 / 4] * 16) * 6,
        # 2 (a - m): (1.5, 1.5, -.5, -2.5) at BOS; (4.5, -1.5, -1.5, -1.5) in some order elsewhere.
        "K_eff: post": ([11 / 6.25] + [27 / 20.25] * 16) * 6,
        "active neurons: post": [1] * 102,
    }
    after = {"density: mid": 1 / 4, "density: post": 3 / 4, "kurtosis, post less mid": 0.0}
    yield replace(run, tokens=tokens), shape | counts | after
    dealt = torch.tensor([4, *[0] * 4, *[1] * 4, *[2] * 4, *[3] * 4]).repeat(6)
    yield replace(run, tokens=dealt), {f"token information: {stage}": 0.0 for stage in STAGES}


def _of_stages(unit: str, name: str, meaning: str, **how: Any) -> dict[str, Quantity]:
    return {f"{name}: {stage}": Quantity(unit, f"{meaning}, {stage}", **how) for stage in STAGES}


PROBE = Probe(
    __doc__,
    gates=(
        Gate("monosemantic", "privileged basis: mid", above=1.0),
        Gate("monosemantic", "token information: mid", above=0.5, truth=1.0),
        # 29.7 in the classes' own basis; two bases of no meaning differ by about .3 (controls/rotated.py).
        *(Gate("rotated", f"privileged basis: {stage}", within=1.0) for stage in STAGES),
        Gate("monosemantic", "kurtosis, post less mid", within=0.01),
        Gate("uniform", "kurtosis, post less mid", within=0.01),
        Gate("smear_shared", "kurtosis, post less mid", below=-1.0),
    ),
    tested="token information: mid",
    shuffle="tokens",
    measure=measure,
    known=known,
    quantities={
        **_of_stages(
            "neurons", "participation ratio", "(sum a^2)^2 / sum a^4", statistics=("median",)
        ),
        **_of_stages("neurons", "K_eff", "|a|^2 / max(a)^2", statistics=("median",)),
        **_of_stages("share", "active neurons", "above a tenth of the token's largest |a|"),
    },
    streams=("natural", "code"),
    estimates={
        **_of_stages(
            "share of variance", "token information", "what the token's identity explains"
        ),
        **_of_stages("sd^3", "skewness", "median neuron's"),
        **_of_stages("sd^4", "excess kurtosis", "median neuron's; 0 for a Gaussian"),
        **_of_stages("share", "density", "(mean |x|)^2 / mean x^2 of the median neuron"),
        **_of_stages("sd^4", "privileged basis", "median kurtosis less that of a rotated basis"),
        "kurtosis over Gaussian: mid": Quantity(
            "sd^4", "median neuron's kurtosis less what Gaussian pre-activations give it"
        ),
        "kurtosis, post less mid": Quantity(
            "sd^4", "what the norm does to the median neuron's tails", more_smeared_when="lower"
        ),
    },
    figures=(
        Figure(
            "Kurtosis of the median neuron, less that of a rotated basis",
            tuple(f"privileged basis: {stage}" for stage in STAGES),
        ),
        Figure(
            "What the nonlinearity and the norm do to the tails",
            ("kurtosis over Gaussian: mid", "kurtosis, post less mid"),
        ),
        Figure(
            "Share of a neuron's variance that the token explains",
            tuple(f"token information: {stage}" for stage in STAGES),
        ),
        Figure(
            "Participation ratio of the median token",
            tuple(f"participation ratio: {stage}" for stage in STAGES),
            statistic="median",
            log_y=True,
        ),
    ),
)
