"""P13: Neuron statistics

A neuron that responds to one feature is mostly silent: its distribution is skewed, heavy-tailed and sparse,
and the token's identity explains it. In a random rotation of the same activations these properties vanish,
so the excess kurtosis minus that of a rotated basis measures how privileged the basis is. But SoLU gives
heavy tails even to Gaussian noise. The kurtosis is therefore also compared with that of Gaussian
pre-activations with each neuron's mean and variance, passed through the same nonlinearity.

Question:
    Are the neurons a basis in which activations are sparse, heavy-tailed and explained by the token,
    and does the norm change that?

Answers:
    above 0.5: The current token explains more than half of a neuron's variance before the norm, on average over
        neurons.
    0.01 to 0.5: The current token explains less than half of a neuron's variance before the norm, on average
        over neurons.
    below 0.01: The current token explains less than 1% of a neuron's variance before the norm, on average over
        neurons.

Formula:
    median over neurons of skewness, excess kurtosis and density (E|x|)^2 / E x^2;
    mean over neurons of token information, Cov(x, the token's mean in other documents) / Var(x);
    privileged basis = median kurtosis minus median kurtosis in a random rotation;
    per token (sum a^2)^2 / sum a^4, |a|^2 / max a^2, share of |a| > max |a| / 10

Reading:
    With smearing the neurons are a privileged basis before the norm and less so after it: kurtosis, and its
    excess over a rotated basis, fall from mid to post, and the density rises, because distributed activations
    are amplified. Centring alone changes a neuron's shape too (post minus mid is -.04 to -.16 in the demo's
    static twins), so compare with the static twin and not with 0: only without centring does one constant gain
    leave every shape as it is. Other values of gamma do not show in a neuron's shape, so a change of shape by the
    gain does not show that a per-token gain is needed (`disjoint`). If the kurtosis of mid is no higher than
    that of Gaussian pre-activations, the nonlinearity made it, not the trained weights.

Pitfalls:
    x softmax(x) gives heavy tails to any input: read a kurtosis only together with that of Gaussian
    pre-activations. Kurtosis depends on few tokens and, where tails are heavy, grows with the number
    of tokens: compare it on the same text only. The three counts of neurons (participation ratio,
    K_eff, active neurons) weight tails differently and may disagree. post includes gamma and beta,
    which change no neuron's kurtosis and only the sign of its skewness. In a trained model the token
    partly predicts the activation along any direction, rotated ones too.

Source:
    protocol.md section 7 P13; Elhage et al. 2022, section 3.2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.data.cache import evenly_spaced
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._features import (
    first_half,
    mean_of_defined,
    median_of_defined,
    sums_by_document,
)
from soluscope.probes._tokens import array

Floats = NDArray[np.float64]

STAGES = ("pre", "mid", "post")
ABOVE = 0.1
"""A neuron counts as active where it exceeds this share of the token's largest |activation|."""
MAX_NEURONS = 512
"""Maximum number of neurons in an average, evenly spaced; rotations and the table use all neurons."""
SEED = 0
"""Seed of the rotation; the Gaussian pre-activations use the next one."""


def measure(run: HookedRun) -> Measured:
    """Return effective numbers of neurons per token, and the shapes of the neurons' distributions."""
    content = run.subset(~run.is_bos)
    values = {stage: _values(content, stage) for stage in STAGES}
    estimates = tuple(_estimates(content, values))
    return Measured(_counts(run), estimates, _by_neuron(content, values))


def _counts(run: HookedRun) -> dict[str, Tensor]:
    """Return three effective numbers of neurons per token, which need not agree.

    Returns:
        By stage: participation ratio, (sum a^2)^2 / sum a^4; K_eff, |a|^2 / max(a)^2; and the share
        of neurons above a tenth of the token's largest |a|. nan at a token where all neurons are 0.
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
    """Yield averages over neurons at tokens that are not BOS; neurons that never vary are left out."""
    string, n = array(content.string), len(content.pos)
    for stage in STAGES:
        sums = _information_sums(content, _some(values[stage]))
        # The mean over neurons, since the median is below 0 where the shares are pure noise.
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
    """Return the difference of two kurtoses: the median difference if `paired`, else the difference of medians."""
    totals = first.sum(axis=0), second.sum(axis=0)

    def value(drawn: Floats) -> Floats:
        halves = np.split(drawn, 2, axis=1)
        left, right = (_kurtosis(*pair) for pair in zip(halves, totals, strict=True))
        if paired:
            return median_of_defined(left - right)
        return median_of_defined(left) - median_of_defined(right)

    return Estimate(quantity, np.concatenate([first, second], axis=1), value, n)


def _by_neuron(content: HookedRun, values: dict[str, Floats]) -> dict[str, Tensor]:
    """Return columns with one row per neuron, over tokens that are not BOS; nan for a neuron that never varies."""
    string = array(content.string)
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
    values: Floats = array(getattr(run, stage)).astype(np.float64)
    return values


def _some(values: Floats) -> Floats:
    """Select at most MAX_NEURONS columns, evenly spaced."""
    return values[:, evenly_spaced(values.shape[1], MAX_NEURONS)]


def _rotation(n: int) -> Floats:
    """Draw a random orthogonal matrix, [n n]."""
    rotation: Floats = np.linalg.qr(np.random.default_rng(SEED).standard_normal((n, n)))[0]
    return rotation


def _through_gaussian(run: HookedRun) -> Floats:
    """Pass independent Gaussians, with each neuron's mean and variance of pre, through the nonlinearity.

    All neurons are drawn, since SoLU's softmax runs over all of them.
    """
    noise = np.random.default_rng(SEED + 1).standard_normal(tuple(run.pre.shape))
    pre = run.pre.mean(0) + run.pre.std(0, correction=0) * torch.from_numpy(noise).to(run.device)
    mid: Floats = array(run.mlp.nonlinearity(pre.to(run.pre.dtype))).astype(np.float64)
    return mid


def _power_sums(values: Floats, string: NDArray[np.int64]) -> Floats:
    """Return counts and sums of z, z^2, z^3 and z^4, z the standardised values; [document 5*neuron]."""
    sd = _spread(values)
    z = np.where(sd > 0, values - values.mean(axis=0), 0.0) / np.where(sd > 0, sd, 1.0)
    power, sums = np.ones_like(z), []
    for _ in range(5):
        sums.append(sums_by_document(power, string))
        power = power * z
    return np.concatenate(sums, axis=1)


def _spread(values: Floats) -> Floats:
    """Return each neuron's sd, or 0 where the sd is only rounding error."""
    sd = values.std(axis=0)
    spread: Floats = np.where(sd > 1e-6 * np.abs(values).max(axis=0, initial=0.0), sd, 0.0)
    return spread


Moment = Callable[..., "Floats"]
"""A function of weighted power sums [draw 5*neuron] and the sums of all tokens [5*neuron]; gives [draw neuron]."""


def _skewness(sums: Floats, total: Floats) -> Floats:
    """Return the skewness to first order in the weights; z has mean 0 and variance 1 over all tokens."""
    (m1, m2, m3, _), (_, third, _) = _moments(sums), _shape(total)
    return m3 - 3 * m1 - 1.5 * third * (m2 - 1)


def _kurtosis(sums: Floats, total: Floats) -> Floats:
    """Return the excess kurtosis to first order in the weights.

    A resample of a heavy tail has a shorter tail, and the effect grows with the weight of the tail. Draws of
    the kurtosis itself would therefore all lie below the estimate.
    """
    (m1, m2, _, m4), (_, third, fourth) = _moments(sums), _shape(total)
    return m4 - 4 * third * m1 - 2 * fourth * (m2 - 1) - 3


def _shape(total: Floats) -> list[Floats]:
    """Return variance, third and fourth moment of z over all tokens; nan for a neuron that never varies."""
    _, second, third, fourth = _moments(total[None])
    return [np.where(second > 0, moment, np.nan)[0] for moment in (second, third, fourth)]


def _moments(sums: Floats) -> list[Floats]:
    """Return the means of z, z^2, z^3 and z^4, each [draw neuron]."""
    n, *powers = np.split(sums, 5, axis=1)
    return [power / n for power in powers]


def _density_sums(values: Floats, string: NDArray[np.int64]) -> Floats:
    """Return counts and sums of |x| and x^2, in units of the largest |x|; [document 3*neuron]."""
    size = np.abs(values)
    largest = size.max(axis=0, initial=0.0)
    size = size / np.where(largest > 0, largest, 1.0)
    parts = (np.ones_like(size), size, size * size)
    return np.concatenate([sums_by_document(part, string) for part in parts], axis=1)


def _density(sums: Floats) -> Floats:
    """Return (mean |x|)^2 / mean x^2: 1 if |x| is equal at all tokens, p if equal at a share p and 0 elsewhere."""
    n, size, square = np.split(sums, 3, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = size**2 / (n * square)
    return result


def _information_sums(run: HookedRun, values: Floats) -> Floats:
    """Return counts and moments of x and of its prediction from the token's identity; [document 5*neuron].

    The prediction is the token's mean over the first half of the documents, or the mean over all tokens of
    that half if the token does not occur there. The sums are over the second half.
    """
    known, tokens = first_half(run), array(run.tokens)
    _, kind = np.unique(tokens, return_inverse=True)
    means = np.broadcast_to(values[known].mean(axis=0), (kind.max() + 1, values.shape[1])).copy()
    seen = np.unique(kind[known])
    counts = np.bincount(kind[known])[seen]
    means[seen] = sums_by_document(values[known], kind[known]) / counts[:, None]
    scale = np.where(_spread(values) > 0, _spread(values), 1.0)
    x = (values[~known] - values.mean(axis=0)) / scale
    predicted = (means[kind[~known]] - values.mean(axis=0)) / scale
    parts, string = (np.ones_like(x), x, predicted, x * predicted, x * x), array(run.string)
    return np.concatenate([sums_by_document(part, string[~known]) for part in parts], axis=1)


def _information(sums: Floats) -> Floats:
    """Return Cov(x, prediction) / Var(x), [draw neuron].

    The prediction comes from other documents, so its noise is independent of x. Its covariance with x
    therefore estimates the variance between tokens without the bias of 1 - residual / variance, and is 0 where
    tokens predict nothing.
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
    """Yield four neurons and four tokens, each neuron at 3 on one token and 0 elsewhere.

    A neuron is on with p = 1/4, so with q = 1 - p it has skewness (1 - 2p) / sqrt(pq), excess kurtosis
    (1 - 6pq) / (pq) and density p. The mean over neurons is one constant, so centring changes no shape. The
    second run pairs every token with every neuron equally often, so that tokens predict nothing.
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
        # It is 29.7 in the classes' basis; two random bases differ by about .3 (controls/rotated.py).
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
        **_of_stages(
            "share", "active neurons", "share of neurons above a tenth of the token's largest |a|"
        ),
    },
    streams=("natural", "code"),
    estimates={
        **_of_stages(
            "share of variance",
            "token information",
            "share explained by the token's identity, mean over neurons",
        ),
        **_of_stages("sd^3", "skewness", "skewness of the median neuron"),
        **_of_stages(
            "sd^4", "excess kurtosis", "excess kurtosis of the median neuron, 0 for a Gaussian"
        ),
        "excess kurtosis: mid": Quantity(
            "sd^4",
            "excess kurtosis of the median neuron, 0 for a Gaussian, mid",
            on_ladders="proxy",
        ),
        **_of_stages("share", "density", "(mean |x|)^2 / mean x^2 of the median neuron"),
        **_of_stages(
            "sd^4", "privileged basis", "median kurtosis minus median kurtosis in a rotated basis"
        ),
        "kurtosis over Gaussian: mid": Quantity(
            "sd^4",
            "kurtosis minus that with Gaussian pre-activations, median neuron",
            on_ladders="proxy",
        ),
        "kurtosis, post less mid": Quantity(
            "sd^4",
            "change of a neuron's kurtosis from mid to post, median neuron",
            more_smeared_when="lower",
        ),
    },
    figures=(
        Figure(
            "Kurtosis of the median neuron minus that in a rotated basis",
            tuple(f"privileged basis: {stage}" for stage in STAGES),
        ),
        Figure(
            "Effect of the nonlinearity and of the norm on the kurtosis",
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
