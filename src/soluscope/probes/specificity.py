"""P11: Specificity before and after the norm

Elhage et al. looked at tokens across a neuron's range of activations. After the LayerNorm far more of the
tokens with weak activations were unrelated to the neuron's feature: "the signature we'd expect to see if
LayerNorm was being used to smuggle" features through. In this probe the feature is a label, the levels are
ranks, and the effect of the norm is split into that of the per-token gain, that of centring, and both.

Bins halve: the lower half of a neuron's positive activations, then the next quarter, and so on up to the
top 1/128. In bins of equal size a token that the norm moves to a higher bin would move another token to a
lower one, and the mean over bins would miss both. The bottom of the range is also unrelated to any feature
before the norm.

Neurons and their features are chosen on either half of the documents and measured on the other half. Ranks
are taken within a half, and a mean over neurons runs over the choices of both halves: a neuron that both
halves chose counts twice, with one feature or with two, and a neuron that a single half chose counts once.

Question:
    Are a neuron's weak activations less related to its feature after the mid norm than before it?

Answers:
    above 0.01: The gain alone makes a neuron's weak activations less related to its feature.
    -0.01 to 0.01: The gain alone makes a neuron's weak activations neither less nor more related to its
        feature.
    below -0.01: The gain alone makes a neuron's weak activations more related to its feature.

Formula:
    A = mean over neurons of mean over weak bins b of P(f | a_j in b) - P(f | post_j in b), with
    post = g a, a - m or g (a - m);
    weak bins: ranks from the top n/2^b to n/2^(b-1), b = 1..4, n = tokens with a_j > 0;
    f has the highest AUROC for a_j on the other half of the documents;
    the neurons of both halves are pooled

Reading:
    Smearing can give A above 0 for the gain alone (`smear_graded`): tokens without the
    feature, amplified, overtake tokens that have the feature weakly beside something stronger. It need not:
    smearing that re-orders no tokens on a neuron has A = 0 (`smear_shared`, `ceiling`), and a gain that
    re-orders some has A above 0 whether or not their codes are diffuse (`magnitude`). If A is 0 for the gain
    and above 0 for centring alone, this is not smearing: subtracting the mean changes the sign of small
    activations. If every A is 0, the norm changes no order of activations.

Pitfalls:
    Elhage et al. set levels by value, and judged the tokens on which the feature had been found.
    Equal values are not comparable before and after a norm that compresses the range: a bin then
    contains a different number of tokens, and A follows the base rate. A feature that was chosen on
    the same data also looks too specific. Here levels are ranks, and pairs that are chosen on either
    half of the documents are measured on the other; the figure as published is shown beside it. Ranks
    do not detect a gain that compresses without changing the order within a neuron: for that read the
    scale freeze. A neuron counts once for each half that chose it, with its best feature, even if that
    feature is not good: see its AUROC. Gamma and beta are left out.

Source:
    Elhage et al. 2022, section 6.4; protocol.md section 7 P11
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag
from scipy.stats import rankdata
from torch import Tensor

from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._features import (
    Features,
    auroc,
    auroc_of,
    auroc_sums,
    folds,
    label,
    levels,
    mean_of_defined,
    sums_by_document,
)
from soluscope.probes._tokens import array

Floats = NDArray[np.float64]

N_BINS = 8
"""Number of bins of activation; bin 1 is the weakest."""
LOW = slice(0, N_BINS // 2)
"""The weaker half of the bins: all but the top sixteenth of the positive activations."""
N_NEURONS = 32
"""Maximum number of neurons per half, in descending order of the AUROC of their best feature."""

STAGES = ("before", "gain only", "centring only", "both")
"""a (mid), g a, a - m and g (a - m), the steps of the norm without gamma and beta; m is 0 if it does not centre."""
PARTS = STAGES[1:]
SHARES = {stage: f"share of weak activations with the feature: {stage}" for stage in STAGES}


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a neuron and the feature that it detects best, and the tokens on which they are measured."""

    values: dict[str, Floats]
    """Activations by stage, [token pair]."""
    holds: NDArray[np.bool_]
    """True at tokens that have the pair's feature, [token pair]."""
    string: NDArray[np.int64]
    """Document of each measured token, [token]."""
    measured: NDArray[np.bool_]
    """Mask of the measured tokens among all tokens of the run."""


def measure(run: HookedRun) -> Measured:
    """Return how specific weak activations are before and after the norm, per token and by level."""
    features = label(run)
    halves = _cross_fit(run, features)
    return Measured(_shares(run, halves), tuple(_estimates(run, features, halves)))


def _shares(run: HookedRun, halves: Sequence[_Pairs]) -> dict[str, Tensor]:
    """Return the share of the neurons that a token activates weakly whose feature the token has, [token].

    A weak activation is in the weaker half of the neuron's bins of rank, among the tokens of the same half
    of the documents. nan at BOS and at tokens without a weak activation.
    """
    columns = {name: np.full(len(run.pos), np.nan) for name in SHARES.values()}
    for pairs in halves:
        for stage, name in SHARES.items():
            weak = _bins_by_rank(pairs, stage)[:, :, LOW].sum(axis=2)  # [token pair]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = (weak * pairs.holds).sum(axis=1) / weak.sum(axis=1)
            columns[name][pairs.measured] = share
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _estimates(run: HookedRun, features: Features, halves: Sequence[_Pairs]) -> Iterator[Estimate]:
    """Yield A by part of the norm, the curves of specificity behind it, and both as published."""
    if not halves:
        return
    bins = {stage: [_bins_by_rank(pairs, stage) for pairs in halves] for stage in STAGES}
    for part in PARTS:
        yield _difference(f"A ({part})", halves, bins["before"], bins[part])
    for stage in STAGES:
        yield from _curve("specificity", halves, bins[stage], stage)
    content = ~array(run.is_bos)
    whole = _matched(run, features, chosen=content, measured=content)
    before, both = ([_bins_by_value(whole, stage)] for stage in ("before", "both"))
    yield _difference("A by value (as published)", [whole], before, both)
    for stage, by_value in (("before", before), ("both", both)):
        yield from _curve("specificity by value (as published)", [whole], by_value, stage)
    by_half = [
        np.concatenate(
            [
                auroc_sums(values[:, None], holds, pairs.string)
                for values, holds in zip(pairs.values["before"].T, pairs.holds.T, strict=True)
            ],
            axis=1,
        )
        for pairs in halves
    ]
    sums = block_diag(*by_half)
    total = sums.sum(axis=0)
    yield Estimate(
        "AUROC of the matched neurons",
        sums,
        lambda drawn: mean_of_defined(auroc_of(drawn, total)),
        _n_tokens(halves),
    )


def _cross_fit(run: HookedRun, features: Features) -> tuple[_Pairs, ...]:
    """Return the pairs chosen on each half of the documents, measured on the other half; a half may have none."""
    if not features.names:
        return ()
    content = ~array(run.is_bos)
    halves = (_matched(run, features, *fold) for fold in folds(run, content))
    return tuple(pairs for pairs in halves if pairs.holds.size)


def _matched(
    run: HookedRun, features: Features, chosen: NDArray[np.bool_], measured: NDArray[np.bool_]
) -> _Pairs:
    """Return the neurons whose best feature has the highest AUROC of mid, each paired with that feature.

    Args:
        run: activations.
        features: labels of at least one feature.
        chosen: mask of the tokens on which neurons and features are chosen, [token].
        measured: mask of the tokens to measure, [token].
    """
    mid, gain = array(run.mid).astype(np.float64), array(run.gain).astype(np.float64)[:, None]
    scores = np.nan_to_num(auroc(mid[chosen], features.holds[:, chosen]))  # [feature neuron]
    fires = np.flatnonzero((levels(mid[chosen]) > 0).any(axis=0))
    clearest = np.argsort(-scores.max(axis=0)[fires], kind="stable")[:N_NEURONS]
    neurons = fires[clearest]
    best = scores.argmax(axis=0)[neurons]
    a, g = mid[measured][:, neurons], gain[measured]
    m = mid[measured].mean(axis=1, keepdims=True) * run.centres
    return _Pairs(
        values=dict(zip(STAGES, (a, g * a, a - m, g * (a - m)), strict=True)),
        holds=features.holds[best][:, measured].T,
        string=array(run.string)[measured],
        measured=measured,
    )


def _bins_by_rank(pairs: _Pairs, stage: str) -> Floats:
    """Return the share of each token in each bin of rank, [token pair bin]; tied tokens share their ranks equally.

    With n tokens above 0 before the norm, bin b holds the ranks from n / 2^b to n / 2^(b-1) from the top,
    and the last bin holds all remaining top ranks. A bin holds equally many tokens in every stage, even if
    the norm changed their signs.
    """
    n = (levels(pairs.values["before"]) > 0).sum(axis=0)  # [pair]
    values = levels(pairs.values[stage])
    start = len(values) - rankdata(values, "max", axis=0)  # tokens above, [token pair]
    end = len(values) - rankdata(values, "min", axis=0) + 1
    upper = n[:, None] / 2.0 ** np.arange(N_BINS)  # [pair bin]
    lower = np.append(upper[:, 1:], np.zeros((len(n), 1)), axis=1)
    inside = np.minimum(end[:, :, None], upper) - np.maximum(start[:, :, None], lower)
    shares: Floats = inside.clip(0) / (end - start)[:, :, None]
    return shares


def _bins_by_value(pairs: _Pairs, stage: str) -> Floats:
    """Return 1 at each token's bin and 0 elsewhere, [token pair bin].

    Bins are equally wide, from 0 to the neuron's largest value.
    """
    values = pairs.values[stage]
    largest = values.max(axis=0, initial=0.0)
    number = np.ceil(values / np.where(largest > 0, largest, 1.0) * N_BINS)
    shares: Floats = (number[:, :, None] == 1 + np.arange(N_BINS)).astype(np.float64)
    return shares


def _difference(
    quantity: str, halves: Sequence[_Pairs], before: Sequence[Floats], after: Sequence[Floats]
) -> Estimate:
    """Return A: the mean over pairs and weak bins of P(feature | bin), before minus after the norm.

    A bin without tokens in one of the stages (by value, or in a resample) is left out of that stage's mean.

    Args:
        quantity: name of the estimate.
        halves: pairs of each half, measured on disjoint documents.
        before: bins of each half before the norm, [token pair bin].
        after: bins of each half after the norm, [token pair bin].
    """
    bins = [
        np.concatenate([half[:, :, LOW], other[:, :, LOW]], axis=2)
        for half, other in zip(before, after, strict=True)
    ]
    shape = (sum(half.shape[1] for half in bins), 2, bins[0].shape[2] // 2)

    def value(sums: Floats) -> Floats:
        inside = _specificity(sums).reshape(len(sums), *shape)
        return mean_of_defined(np.subtract(*np.moveaxis(mean_of_defined(inside), -1, 0)))

    return Estimate(quantity, _sums(halves, bins), value, _n_tokens(halves))


def _curve(
    quantity: str, halves: Sequence[_Pairs], bins: Sequence[Floats], stage: str
) -> Iterator[Estimate]:
    """Yield the mean over pairs of P(feature | bin), one point per bin."""

    def value(sums: Floats) -> Floats:
        return mean_of_defined(_specificity(sums))

    for b in range(N_BINS):
        here = [half[:, :, b : b + 1] for half in bins]
        if any(half.any() for half in here):
            sums, n = _sums(halves, here), _n_tokens(halves)
            yield Estimate(quantity, sums, value, n, x=float(b + 1), group=stage)


def _sums(halves: Sequence[_Pairs], bins: Sequence[Floats]) -> Floats:
    """Return counts of tokens with the feature, and of all tokens, [document pair*bin*2].

    Pairs are those of both halves. A document has 0 in the columns of the pairs that its half chose.
    """
    by_half = []
    for pairs, shares in zip(halves, bins, strict=True):
        parts = np.stack([shares * pairs.holds[:, :, None], shares], axis=3)
        by_half.append(sums_by_document(parts.reshape(len(parts), -1), pairs.string))
    sums: Floats = block_diag(*by_half)
    return sums


def _specificity(sums: Floats) -> Floats:
    """Return P(feature | bin) from `_sums`, [draw pair*bin]; nan where a bin is empty."""
    having, of_all = np.moveaxis(sums.reshape(len(sums), -1, 2), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = having / np.where(of_all > 1e-9, of_all, np.nan)
    return result


def _n_tokens(halves: Sequence[_Pairs]) -> int:
    return sum(len(pairs.string) for pairs in halves)


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield runs with the signature due to the gain alone, due to centring alone, and without it.

    After BOS each document has 2 tokens `A` that activate neuron 0 strongly, 2 tokens `A` that activate it
    weakly beside a strong neuron 1, and 12 tokens `b` that activate it least. Both neurons detect `A` best.
    All 16 tokens are above 0 at neuron 0, so the weak bins hold the ranks 9-16, 5-8, 3-4 and 2. Before the
    norm the order is strong A, weak A, b, and P(A) = 0, 0, 1, 1. Where the weak `A` fall below the `b`,
    P(A) = 2/8, 0, 0, 1. The mean over bins falls by 3/16 at neuron 0 and by 0 at neuron 1, which is positive
    at the weak `A` only, so the mean over both neurons falls by 3/32.
    """
    n_documents = 12

    def run(strong: list[float], weak: list[float], b: list[float], **norm: float) -> HookedRun:
        document = torch.tensor([[0.0] * 4, *[strong] * 2, *[weak] * 2, *[b] * 12])
        tokens = torch.tensor([0, *[1] * 4, *[2] * 12]).repeat(n_documents)
        observed = planted(document.expand(n_documents, -1, -1), **norm)
        return replace(observed, tokens=tokens, vocab=("<|BOS|>", "A", "b"))

    shares = ([math.nan] + [1.0] * 4 + [0.0] * 12) * n_documents
    # All means are 0. Gain times neuron 0: 1.63 at strong A, .016 at weak A, 1.41 at b.
    by_gain = run([8, 0, -4, -4], [1, 100, -50.5, -50.5], [0.05, 0, -0.05, 0], eps=1e-12)
    answers: dict[str, Any] = dict.fromkeys(SHARES.values(), shares)
    # Neurons 2 and 3 never fire and are left out. At neuron 1 half of the `A` are tied with the `b`.
    answers["AUROC of the matched neurons"] = (1 + 3 / 4) / 2
    yield by_gain, answers | _signature(gain=3 / 32, centring=0)
    # One gain for all tokens. Neuron 0 minus the mean: 6 at strong A, -4 at weak A, .04 at b.
    by_centring = run([8, 0, 0, 0], [1, 19, 0, 0], [0.05, 0, 0, 0], gain=1.0)
    yield by_centring, _signature(gain=0, centring=3 / 32)
    # Gains range from .2 to 28, and no order changes.
    compressed = run([8, 0, -4, -4], [4, 0, -2, -2], [0.05, 0, -0.05, 0], eps=1e-12)
    yield compressed, _signature(gain=0, centring=0)


def _signature(gain: float, centring: float) -> dict[str, Any]:
    return {"A (gain only)": gain, "A (centring only)": centring, "A (both)": gain + centring}


PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_graded", "A (gain only)", above=0.2),
        Gate("smear_graded", "A (centring only)", within=0.01),
        Gate("centring", "A (centring only)", above=0.1),
        Gate("centring", "A (gain only)", within=0.01),
        # The gain of `smear_shared` compresses each neuron's range but leaves its order unchanged.
        *(
            Gate(negative, "A (both)", within=0.01)
            for negative in ("smear_shared", "pinned", "monosemantic")
        ),
    ),
    one_scale=True,
    tested="A (gain only)",
    confirmatory=True,
    shuffle="tokens",
    measure=measure,
    known=known,
    quantities={
        name: Quantity(
            "share",
            f"share of the neurons that a token activates weakly ({stage}) whose feature the token has",
        )
        for stage, name in SHARES.items()
    },
    streams=("natural", "code"),
    estimates={
        **{
            f"A ({part})": Quantity(
                "difference of P(feature)",
                f"specificity of weak activations before the norm minus after it: {part}",
            )
            for part in PARTS
        },
        "A by value (as published)": Quantity(
            "difference of P(feature)",
            "the same with bins by value and features chosen on the same tokens",
        ),
        "specificity": Quantity(
            "P(feature)",
            "share of the tokens in a bin of ranks that have the feature, mean over neurons",
        ),
        "specificity by value (as published)": Quantity(
            "P(feature)", "the same with bins by value and features chosen on the same tokens"
        ),
        "AUROC of the matched neurons": Quantity(
            "AUROC",
            "AUROC of mid for the feature that was chosen on the other half of the documents",
        ),
    },
    figures=(
        Figure(
            "A by part of the norm: loss of specificity of weak activations",
            tuple(f"A ({part})" for part in PARTS),
        ),
        Figure(
            "Specificity by rank of activation",
            ("specificity",),
            kind="curve",
            x_title="bin of ranks, from the lower half of positive activations (1) to their top 1/128 (8)",
        ),
        Figure(
            "Section 6.4 as published: specificity by value",
            ("specificity by value (as published)",),
            kind="curve",
            x_title="bin of value, from 0 to the neuron's largest value (8)",
        ),
        Figure("AUROC of the neurons for their features", ("AUROC of the matched neurons",)),
    ),
)
