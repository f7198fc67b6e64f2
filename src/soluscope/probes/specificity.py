"""P11: Specificity before and after the norm

Elhage et al. looked at tokens across a neuron's range of activations and found that after the
LayerNorm far more of the weakly activating ones had nothing to do with the neuron's feature: "the
signature we'd expect to see if LayerNorm was being used to smuggle" features through. Here the
feature is a label, the levels are ranks, and what the norm does is taken apart: per-token gain,
centring, both.

Bins halve: the lower half of a neuron's positive activations, then the next quarter, and so on up
to the top 1/128. In bins of one size whatever a norm moves up would come down elsewhere, and their
mean would be blind to it; and the bottom of the range is far from any feature before the norm too.

Neurons and their features are chosen on either half of the documents and measured on the other. Ranks
are taken within a half, and a mean over neurons is over the choices of both: a neuron that both halves
chose counts twice, be it with one feature or with two, and one that a single half chose counts once.

Question:
    Do a neuron's weak activations have less to do with its feature after the mid norm than before
    it?

Formula:
    A = mean over neurons of mean over weak bins b of P(f | a_j in b) - P(f | post_j in b), with
    post = g a, a - m or g (a - m);
    weak bins: ranks from the top n/2^b to n/2^(b-1), b = 1..4, n = tokens with a_j > 0;
    f has the highest AUROC for a_j on the other half of the documents;
    both halves' neurons together

Reading:
    Smearing predicts A above 0 by the gain alone: tokens without the feature, amplified, overtake
    tokens that have it weakly beside something stronger. A at 0 by the gain, and above 0 by
    centring alone, is no smearing: the mean re-signs small activations. All at 0: the norm moves
    nothing past anything else.

Pitfalls:
    Elhage et al. set levels by value, and judged the tokens on which the feature had been found.
    Equal values are not comparable before and after a norm that compresses the range: a bin then
    holds other numbers of tokens, and the base rate does the rest. And a feature that was chosen on
    the same data looks too specific. Here levels are ranks, and what is chosen on either half of
    the documents is measured on the other; the figure as published is beside it. Ranks are blind to
    a gain that compresses without changing the order within a neuron: for that read the scale
    freeze. A neuron counts once for each half that chose it, with its best feature, also where that
    is not good: see its AUROC. Gamma and beta are left out.

Source:
    Elhage et al. 2022, section 6.4; science.md section 7 P11
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

Floats = NDArray[np.float64]

N_BINS = 8
"""Of activation; bin 1 is the weakest."""
LOW = slice(0, N_BINS // 2)
"""The weaker half of the bins: all but the top sixteenth of the positive activations."""
N_NEURONS = 32
"""The neurons whose features are clearest are measured, at most so many."""

STAGES = ("before", "gain only", "centring only", "both")
"""a, g a, a - m and g (a - m): mid, and what the norm makes of it; m is 0 where it does not centre."""
PARTS = STAGES[1:]
SHARES = {stage: f"share of weak activations with the feature: {stage}" for stage in STAGES}


@dataclass(frozen=True)
class _Pairs:
    """Neurons, each with the feature that it tells best, and the tokens they are measured on."""

    values: dict[str, Floats]
    """[token pair] by stage."""
    holds: NDArray[np.bool_]
    """[token pair]: whether the token has the pair's feature."""
    string: NDArray[np.int64]
    """[token]"""
    measured: NDArray[np.bool_]
    """Which of the run's tokens these are."""


def measure(run: HookedRun) -> Measured:
    """Return how specific weak activations are before and after the norm, per token and by level."""
    features = label(run)
    halves = _cross_fit(run, features)
    return Measured(_shares(run, halves), tuple(_estimates(run, features, halves)))


def _shares(run: HookedRun, halves: Sequence[_Pairs]) -> dict[str, Tensor]:
    """Of the neurons that a token activates weakly, the share whose feature the token has.

    Weakly: in the weaker half of the neuron's bins of rank, among the tokens of the half of the
    documents that the token is in. One value a token, nan at BOS and where it activates none weakly.
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
    """A by part of the norm, the curves behind it, and both as published."""
    if not halves:
        return
    bins = {stage: [_bins_by_rank(pairs, stage) for pairs in halves] for stage in STAGES}
    for part in PARTS:
        yield _difference(f"A ({part})", halves, bins["before"], bins[part])
    for stage in STAGES:
        yield from _curve("specificity", halves, bins[stage], stage)
    content = ~run.is_bos.numpy()
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
    """The pairs that either half of the documents chose, on the other half; a half may have none."""
    if not features.names:
        return ()
    content = ~run.is_bos.numpy()
    halves = (_matched(run, features, *fold) for fold in folds(run, content))
    return tuple(pairs for pairs in halves if pairs.holds.size)


def _matched(
    run: HookedRun, features: Features, chosen: NDArray[np.bool_], measured: NDArray[np.bool_]
) -> _Pairs:
    """Each neuron's best feature by AUROC of mid, for the neurons where that is highest.

    Args:
        run: activations.
        features: at least one.
        chosen: the tokens on which neurons and features are chosen, [token].
        measured: the tokens to measure, [token].
    """
    mid, gain = run.mid.numpy().astype(np.float64), run.gain.numpy().astype(np.float64)[:, None]
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
        string=run.string.numpy()[measured],
        measured=measured,
    )


def _bins_by_rank(pairs: _Pairs, stage: str) -> Floats:
    """Share of each token in each bin, [token pair bin]; tied tokens share their ranks alike.

    With n tokens above 0 before the norm, bin b holds the ranks from n / 2^b to n / 2^(b-1) from the
    top, and the last bin the rest: as many tokens in each stage, whatever has become of their signs.
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
    """Which of equally wide bins from 0 to the neuron's largest value a token is in, [token pair bin]."""
    values = pairs.values[stage]
    largest = values.max(axis=0, initial=0.0)
    number = np.ceil(values / np.where(largest > 0, largest, 1.0) * N_BINS)
    shares: Floats = (number[:, :, None] == 1 + np.arange(N_BINS)).astype(np.float64)
    return shares


def _difference(
    quantity: str, halves: Sequence[_Pairs], before: Sequence[Floats], after: Sequence[Floats]
) -> Estimate:
    """Mean over pairs of the mean over weak bins of P(feature | bin), before less after.

    A bin without tokens in one of the stages (by value, or in a resample) is left out there.

    Args:
        quantity: its name.
        halves: disjoint documents, each with its pairs.
        before: bins of each half before the norm, [token pair bin].
        after: and after it.
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
    """Mean over pairs of P(feature | bin), a point a bin."""

    def value(sums: Floats) -> Floats:
        return mean_of_defined(_specificity(sums))

    for b in range(N_BINS):
        here = [half[:, :, b : b + 1] for half in bins]
        if any(half.any() for half in here):
            sums, n = _sums(halves, here), _n_tokens(halves)
            yield Estimate(quantity, sums, value, n, x=float(b + 1), group=stage)


def _sums(halves: Sequence[_Pairs], bins: Sequence[Floats]) -> Floats:
    """By document, pair of either half and bin: tokens with the feature, and all. [document pair*bin*2]

    A document has nothing in the columns of the pairs that it had a part in choosing.
    """
    by_half = []
    for pairs, shares in zip(halves, bins, strict=True):
        parts = np.stack([shares * pairs.holds[:, :, None], shares], axis=3)
        by_half.append(sums_by_document(parts.reshape(len(parts), -1), pairs.string))
    sums: Floats = block_diag(*by_half)
    return sums


def _specificity(sums: Floats) -> Floats:
    """P(feature | bin) from `_sums`, [draw pair*bin]; nan where a bin is empty."""
    having, of_all = np.moveaxis(sums.reshape(len(sums), -1, 2), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = having / np.where(of_all > 1e-9, of_all, np.nan)
    return result


def _n_tokens(halves: Sequence[_Pairs]) -> int:
    return sum(len(pairs.string) for pairs in halves)


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """The signature by hand: by the gain alone, by centring alone, and not at all.

    Each document has, after BOS, 2 tokens `A` that excite neuron 0 strongly, 2 `A` weakly beside a
    strong neuron 1, and 12 `b` that excite it least. Both neurons tell `A` best. Of the 16 tokens,
    all above 0 at neuron 0, the weak bins hold the ranks 9-16, 5-8, 3-4 and 2. Before the norm the
    order is strong, weak, b: P(A) = 0, 0, 1, 1. Where the weak `A` fall below the `b` it is
    2/8, 0, 0, 1. The mean falls by 3/16; at neuron 1, positive at the weak `A` alone, by 0; and the
    mean over both neurons by 3/32.
    """
    n_documents = 12

    def run(strong: list[float], weak: list[float], b: list[float], **norm: float) -> HookedRun:
        document = torch.tensor([[0.0] * 4, *[strong] * 2, *[weak] * 2, *[b] * 12])
        tokens = torch.tensor([0, *[1] * 4, *[2] * 12]).repeat(n_documents)
        made = planted(document.expand(n_documents, -1, -1), **norm)
        return replace(made, tokens=tokens, vocab=("<|BOS|>", "A", "b"))

    shares = ([math.nan] + [1.0] * 4 + [0.0] * 12) * n_documents
    # All means are 0. Gain times neuron 0: 1.63 at strong, .016 at weak, 1.41 at b.
    by_gain = run([8, 0, -4, -4], [1, 100, -50.5, -50.5], [0.05, 0, -0.05, 0], eps=1e-12)
    answers: dict[str, Any] = dict.fromkeys(SHARES.values(), shares)
    # Neurons 2 and 3 never fire, and are left out. At neuron 1 half of the `A` are level with `b`.
    answers["AUROC of the matched neurons"] = (1 + 3 / 4) / 2
    yield by_gain, answers | _signature(gain=3 / 32, centring=0)
    # One gain. Neuron 0 less the mean: 6 at strong, -4 at weak, .04 at b.
    by_centring = run([8, 0, 0, 0], [1, 19, 0, 0], [0.05, 0, 0, 0], gain=1.0)
    yield by_centring, _signature(gain=0, centring=3 / 32)
    # Gains from .2 to 28, and no order changes.
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
        # The gain of `smear_shared` compresses each neuron's range and changes no order in it.
        *(
            Gate(negative, "A (both)", within=0.01)
            for negative in ("smear_shared", "pinned", "monosemantic")
        ),
    ),
    tested="A (gain only)",
    confirmatory=True,
    shuffle="tokens",
    measure=measure,
    known=known,
    quantities={
        name: Quantity(
            "share",
            f"of the neurons that a token activates weakly ({stage}), those whose feature it has",
            more_smeared_when="neither" if stage == "before" else "lower",
        )
        for stage, name in SHARES.items()
    },
    streams=("natural", "code"),
    estimates={
        **{
            f"A ({part})": Quantity(
                "difference of P(feature)",
                f"specificity of weak activations before the norm less after: {part}",
                more_smeared_when="neither" if part == "centring only" else "higher",
            )
            for part in PARTS
        },
        "A by value (as published)": Quantity(
            "difference of P(feature)", "the same, bins by value, feature chosen on the same tokens"
        ),
        "specificity": Quantity("P(feature)", "of the tokens in a bin of ranks, mean over neurons"),
        "specificity by value (as published)": Quantity(
            "P(feature)", "of the tokens in a bin of values, feature chosen on the same tokens"
        ),
        "AUROC of the matched neurons": Quantity(
            "AUROC",
            "how well mid tells the feature that was chosen on the other half of the documents",
        ),
    },
    figures=(
        Figure(
            "A by part of the norm: specificity lost by weak activations",
            tuple(f"A ({part})" for part in PARTS),
        ),
        Figure(
            "Specificity by rank of activation",
            ("specificity",),
            kind="curve",
            x_title="bin of ranks, from the lower half of the positives (1) to their top 1/128 (8)",
        ),
        Figure(
            "Section 6.4 as published: specificity by value",
            ("specificity by value (as published)",),
            kind="curve",
            x_title="bin of value, from 0 to the neuron's largest (8)",
        ),
        Figure("How well the neurons tell their features", ("AUROC of the matched neurons",)),
    ),
)
