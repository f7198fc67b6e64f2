"""P14: Two tiers of features

Elhage et al. suspect two tiers of features: some on single neurons, some spread over many neurons. Features
of the second tier would have a large effect only where no feature of the first tier is present and the
LayerNorm amplifies them. Such a feature can be decoded from many neurons together but not from a few, and
occurs on tokens with a high gain. To test whether the model reads the direction that the probe reads, the
direction is removed from post and the change of the loss is measured.

Probes are fitted on either half of the documents and tested on the other half. A feature's AUROC is the
mean over the two halves; its index and its tier follow from that mean, so each feature counts once. A
removal needs a direction and a tier that do not depend on the measured tokens: both come from the other
half of the documents, and the tier is found by splitting that half again. A feature may therefore be
removed from one half and not from the other, or be in another tier there.

Question:
    Are there features that can be decoded only from many neurons together, and do they occur where
    the gain is high?

Answers:
    above 0.01: The features can be decoded from all neurons together; how many neurons they need, and at which
        gain they occur, other numbers show.
    below 0.01: The features cannot be decoded even from all neurons together, so there are no tiers to compare.

Formula:
    distribution index = least k with AUROC_k - 1/2 >= .95 (AUROC_N - 1/2), for probes (C + k/T)^-1
    (difference of class means) on the k neurons with the largest standardised difference; AUROC_k is
    the mean over both halves of the documents, each tested with probes fitted on the other;
    tier gap = share of decoded features with k > 16;
    removal: post - ((post - mean) . w) w, with w and the mean of post from the other half

Reading:
    Smearing predicts a second tier: features that cannot be decoded from a few neurons of mid but can
    be decoded from all of them, that occur on tokens with a high gain (log gain above 0), need fewer
    neurons after the norm than before it, and cost loss when removed. Without smearing the tiers have
    the same gain, and the index is the same in mid and post. A second tier whose removal costs 0 is
    decoded by the probe but not used by the model. A feature of many neurons need not have a diffuse code: a
    class of tokens with one neuron each needs as many (`magnitude`). And a high gain at the second tier does not
    show that a per-token gain is needed, since other values of gamma may suffice (`disjoint`).

Pitfalls:
    A probe reads directions that the model does not use. The removal tests use, next to the removal
    of as much of a random direction from the same tokens. Features that are unions of other features
    (all capitals) need many neurons in any model: compare kinds, and look at tokens' identities first.
    The index requires 95% of the AUROC above chance of all neurons, and moves in powers of two. The
    ridge grows with the number of neurons, so with few tokens a probe on all neurons may be worse than
    a probe on some of them. Intervals are for other documents at the same probes, and as wide as those
    of one half: too wide where probes are good. The features to remove are chosen on quarters of the
    documents, where fewer features are decoded.

Source:
    Elhage et al. 2022, section 6.4; Gurnee et al. 2023 for sparse probing; protocol.md section 7 P14
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag, solve
from torch import Tensor

from soluscope.data.cache import evenly_spaced
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._features import (
    Features,
    auroc_of,
    auroc_sums,
    folds,
    label,
    mean_of_defined,
    median_of_defined,
    sums_by_document,
)
from soluscope.probes._tokens import array

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

STAGES = ("mid", "post")
ENOUGH = 0.95
"""Share of the full probe's AUROC above chance that a smaller probe must reach to count as decoding the feature."""
DECODED = 0.75
"""Least AUROC of the full probe of a feature that counts as decoded: half way from chance to 1."""
FEW = 16
"""Largest number of neurons needed by a feature of the first tier; the second tier needs more."""
MAX_REMOVED = 200
"""Maximum number of tokens per half at which a feature's direction is removed, evenly spaced."""
MATRIX_NUMBERS = 1_000_000
"""Largest number of entries of the correlation matrices that are solved at once (8 MB)."""
HALVES_AGREE = 2**0.5
"""Factor on the spread of the mean of two AUROCs, which treats the two as one number.

If a feature cannot be decoded, the two AUROCs are nearly one number: both grow with D'(C^-1)E, for the
differences D and E between the classes in the two halves. Resampling at fixed probes treats them as
independent, and would give false positives at a rate of 2 Phi(-1.96 / sqrt 2) = 17%. If probes are good,
that treatment is right, and intervals are too wide by up to this factor: as wide as those of one half.
"""

REMOVED = {
    "few": f"removed: features in at most {FEW} neurons",
    "many": f"removed: features in more than {FEW} neurons",
    "random": "removed: as much of a random direction",
}


@dataclass(frozen=True)
class _CrossFit:
    """Probes of each feature from its best k neurons, fitted on either half of some documents."""

    sizes: NDArray[np.int64]
    """Numbers of neurons k, ascending; the last is all neurons."""
    directions: Floats
    """Directions of the probes on all neurons, in units of the activations, [fold feature neuron]."""
    sums: Floats
    """Sums from which `auroc_of` computes AUROCs on the other half, [document fold feature size 4]; 0 in the
    fold whose probes a document was used to fit."""

    def index(self, aurocs: Floats) -> Floats:
        """Return the distribution index [draw feature] from AUROCs [draw feature size]; nan where not decoded."""
        above_chance = aurocs - 0.5
        full: Floats = above_chance[:, :, -1]
        least = (above_chance >= ENOUGH * full[:, :, None]).argmax(axis=2)
        result: Floats = np.where(full >= DECODED - 0.5, self.sizes[least], np.nan)
        return result

    def index_of_all(self) -> Floats:
        """Return the distribution index of all documents, without resampling, [feature]."""
        index: Floats = self.index(_mean_aurocs(self.sums.sum(axis=0)[None], self.sums))[0]
        return index


def measure(run: HookedRun) -> Measured:
    """Return the loss that removing features costs per token, and the number of neurons that decode a feature."""
    features = label(run)
    fits = _cross_fits(run, features)
    return Measured(_costs(run, features, fits), tuple(_estimates(run, features, fits)))


def _costs(run: HookedRun, features: Features, fits: dict[str, _CrossFit]) -> dict[str, Tensor]:
    """Return the change of a token's loss, in nats, when the directions of its features are removed from post.

    Features that are decoded from post are removed one at a time, and the change is averaged over the
    features that the token has: over features that few neurons of mid decode, over features that need more,
    and over both when a random direction of equal length is removed instead. Computed at some of the
    tokens that have a target; nan elsewhere. ln_final is live.
    """
    generator = np.random.default_rng(0)
    nothing = torch.zeros(len(run.pos), 2, dtype=torch.float64, device=run.device)
    totals = {tier: nothing.clone() for tier in REMOVED}
    for tier, tokens, mean, direction in _removals(run, features, fits):
        some = evenly_spaced(len(tokens), MAX_REMOVED)
        chosen = torch.from_numpy(tokens[some]).to(run.device)
        here = run.subset(chosen)
        read, elsewhere = (
            torch.from_numpy(vector / np.linalg.norm(vector)).to(run.post)
            for vector in (direction, generator.standard_normal(len(direction)))
        )
        length = (here.post - mean) @ read  # [token]
        loss = loss_at_post(here, here.post)
        for name, removed in ((tier, read), ("random", elsewhere)):
            change = loss_at_post(here, here.post - length[:, None] * removed) - loss
            totals[name][chosen] += torch.stack([change, torch.ones_like(change)], -1).double()
    return {name: totals[tier][:, 0] / totals[tier][:, 1] for tier, name in REMOVED.items()}


def _removals(
    run: HookedRun, features: Features, fits: dict[str, _CrossFit]
) -> Iterator[tuple[str, NDArray[np.int64], Tensor, Floats]]:
    """Yield the directions to remove and their tokens, all chosen on the half without these tokens.

    Yields:
        For each half and each feature that is decoded from post: its tier by mid, the indices of the
        tokens that have the feature and a target, the mean of post [d_mlp], and the direction [d_mlp].
    """
    if not fits:
        return
    content, has_target = ~array(run.is_bos), array(run.target >= 0)
    for fold, (chosen_on, measured_on) in enumerate(folds(run, content)):
        of_mid, of_post = (
            _cross_fit(run, stage, features, chosen_on, most=FEW).index_of_all() for stage in STAGES
        )
        mean = run.post[torch.from_numpy(chosen_on).to(run.device)].mean(0)
        for feature in np.flatnonzero(~np.isnan(of_post)):
            tier = "few" if of_mid[feature] <= FEW else "many"
            tokens = np.flatnonzero(features.holds[feature] & measured_on & has_target)
            yield tier, tokens, mean, fits["post"].directions[fold, feature]


def _estimates(
    run: HookedRun, features: Features, fits: dict[str, _CrossFit]
) -> Iterator[Estimate]:
    """Yield the numbers of neurons that decode features from post and from mid, and the gain of the second tier."""
    if not fits:
        return
    content = ~array(run.is_bos)
    log_gain, string = array(run.gain.double().log()), array(run.string)
    by_fold = []
    for _, measured in folds(run, content):
        has = features.holds[:, measured].T  # [token feature]
        at_feature = np.stack([has * log_gain[measured, None], has], axis=2)  # [token feature 2]
        by_fold.append(sums_by_document(at_feature.reshape(len(has), -1), string[measured]))
    gains = np.concatenate(by_fold).reshape(-1, len(features.names), 2)
    for stage in reversed(STAGES):
        yield from _tiers(stage, fits[stage], gains, features, int(content.sum()))


def _tiers(
    stage: str, decoding: _CrossFit, gains: Floats, features: Features, n: int
) -> Iterator[Estimate]:
    """Yield the estimates that are functions of the AUROCs of one stage.

    Args:
        stage: mid or post.
        decoding: cross-fitted probes of that stage.
        gains: sums of log gain over the tokens of a feature, and the number of these, [document feature 2].
        features: labels of the features.
        n: number of tokens that are not BOS.
    """

    def mean_auroc(aurocs: Floats) -> Floats:
        return mean_of_defined(aurocs[:, :, -1])

    def above_chance(aurocs: Floats) -> Floats:
        return mean_auroc(aurocs) - 0.5

    def median_index(aurocs: Floats) -> Floats:
        return median_of_defined(decoding.index(aurocs))

    def second_tier(aurocs: Floats) -> Floats:
        index = decoding.index(aurocs)
        return mean_of_defined(np.where(np.isnan(index), np.nan, index > FEW))

    def tier_gain(aurocs: Floats, gains: Floats) -> Floats:
        index = decoding.index(aurocs)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.divide(*np.moveaxis(gains.reshape(*index.shape, 2), -1, 0))
        many, few = (np.where(tier, mean, np.nan) for tier in (index > FEW, index <= FEW))
        return mean_of_defined(many) - mean_of_defined(few)

    full = decoding.sums[:, :, :, -1:]
    yield _from_aurocs(f"AUROC above chance: {stage}", full, above_chance, n)
    for kind in ("", *dict.fromkeys(features.kinds)):
        selected = np.array([kind in ("", feature_kind) for feature_kind in features.kinds])
        sums = decoding.sums[:, :, selected]
        for quantity, number in (
            (f"distribution index: {stage}", median_index),
            (f"tier gap: {stage}", second_tier),
        ):
            yield _from_aurocs(quantity, sums, number, n, group=kind)
        yield _from_aurocs(
            f"log gain of the second tier: {stage}",
            sums,
            tier_gain,
            n,
            gains[:, selected],
            group=kind,
        )
    for position, size in enumerate(decoding.sizes):
        sums = decoding.sums[:, :, :, position : position + 1]
        x = float(size)
        yield _from_aurocs("AUROC by neurons", sums, mean_auroc, n, x=x, group=stage)


def _from_aurocs(
    quantity: str,
    sums: Floats,
    number: Callable[..., Floats],
    n: int,
    more: Floats | None = None,
    **fields: Any,
) -> Estimate:
    """Return an Estimate that is a function of AUROCs [draw feature size].

    Args:
        quantity: name of the estimate.
        sums: sums behind the AUROCs, [document fold feature size 4].
        number: function of the AUROCs, and of the weighted sums of `more` if that is given.
        n: number of tokens.
        more: other sums that `number` needs, [document ...].
        fields: `x` and `group` of the Estimate.
    """
    flat = sums.reshape(len(sums), -1)
    width = flat.shape[1]

    def value(drawn: Floats) -> Floats:
        aurocs = _mean_aurocs(drawn[:, :width].reshape(-1, *sums.shape[1:]), sums)
        return number(aurocs) if more is None else number(aurocs, drawn[:, width:])

    together = flat if more is None else np.concatenate([flat, more.reshape(len(more), -1)], 1)
    return Estimate(quantity, together, value, n, **fields)


def _mean_aurocs(drawn: Floats, sums: Floats) -> Floats:
    """Return the mean of a feature's two AUROCs, [draw feature size]; resampled deviations times `HALVES_AGREE`.

    A fold is left out where a draw has no token with the feature, or no token without it.

    Args:
        drawn: weighted sums over documents, [draw fold feature size 4].
        sums: sums of each document, [document fold feature size 4].
    """
    total = sums.sum(axis=0)
    shape = total.shape[:-1]
    observed, resampled = (
        auroc_of(each.reshape(len(each), -1), total.ravel()).reshape(-1, *shape)
        for each in (total[None], drawn)
    )  # [1 or draw, fold feature size]
    mean, deviation = (
        mean_of_defined(np.moveaxis(each, 1, -1)) for each in (observed, resampled - observed)
    )
    spread: Floats = mean + HALVES_AGREE * deviation
    return spread


def _cross_fits(run: HookedRun, features: Features) -> dict[str, _CrossFit]:
    """Return the probes of each stage on all documents; no stage if no feature can be labelled."""
    if not features.names:
        return {}
    content = ~array(run.is_bos)
    return {stage: _cross_fit(run, stage, features, content) for stage in STAGES}


def _cross_fit(
    run: HookedRun, stage: str, features: Features, among: Bools, most: int | None = None
) -> _CrossFit:
    """Return the probes of one stage, fitted on either half of some documents and tested on the other half.

    Args:
        run: activations.
        stage: mid or post.
        features: labels of at least one feature.
        among: mask of the tokens of the documents to split, [token].
        most: largest number of neurons of a probe, apart from the probe on all neurons; if None, every
            power of 2 is used.
    """
    values = array(getattr(run, stage)).astype(np.float64)
    n_neurons = values.shape[1]
    powers = 2 ** np.arange((n_neurons - 1).bit_length())
    sizes = np.array([*powers[powers <= (most or n_neurons)], n_neurons])
    directions, sums = [], []
    for fitted_on, tested_on in folds(run, among):
        weights, unit = _fit(values[fitted_on], features.holds[:, fitted_on], sizes)
        tested, string = values[tested_on] / unit, array(run.string)[tested_on]
        by_feature = [
            auroc_sums(tested @ weight, holds, string)
            for weight, holds in zip(weights, features.holds[:, tested_on], strict=True)
        ]
        directions.append(weights[:, :, -1] / unit)
        sums.append(np.concatenate(by_feature, axis=1))
    by_document = block_diag(*sums).reshape(-1, 2, len(features.names), len(sizes), 4)
    return _CrossFit(sizes, np.stack(directions), by_document)


def _fit(values: Floats, holds: Bools, sizes: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Fit least-squares probes of every feature on its best k neurons.

    Neurons are standardised and ranked by the difference of the means of the two classes. With C the
    correlation matrix of the best k neurons over T tokens, the direction is (C + k/T)^-1 times that
    difference: Fisher's discriminant, with a ridge as strong as the sampling noise of C.

    Args:
        values: activations, [token neuron].
        holds: labels, [feature token].
        sizes: numbers of neurons k, ascending; the last is all neurons.

    Returns:
        Weights of the standardised neurons, [feature neuron size], 0 for a feature that all tokens have
        or no token has; and each neuron's sd, [neuron], infinite where the sd is 0.
    """
    n, n_neurons = values.shape
    mean, sd = values.mean(axis=0), values.std(axis=0)
    unit = np.where(sd <= 1e-6 * np.abs(values).max(), np.inf, sd)
    x = (values - mean) / unit
    has = holds.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = (has @ x / has.sum(axis=1, keepdims=True)) - (
            (1 - has) @ x / (1 - has).sum(axis=1, keepdims=True)
        )  # [feature neuron]
    difference = np.nan_to_num(difference)
    correlation = x.T @ x / n
    best_first = np.argsort(-np.abs(difference), axis=1, kind="stable")
    weights = np.zeros((len(holds), n_neurons, len(sizes)))
    ridge = n_neurons / n * np.eye(n_neurons)
    weights[:, :, -1] = solve(correlation + ridge, difference.T, assume_a="pos").T
    for position, k in enumerate(sizes[:-1]):
        n_at_once = max(1, MATRIX_NUMBERS // int(k) ** 2)
        for first in range(0, len(holds), n_at_once):
            chosen = best_first[first : first + n_at_once, :k]  # [feature k]
            matrix = correlation[chosen[:, :, None], chosen[:, None, :]] + k / n * np.eye(k)
            wanted = np.take_along_axis(difference[first : first + n_at_once], chosen, axis=1)
            fitted = solve(matrix, wanted[:, :, None], assume_a="pos")[:, :, 0]
            here = weights[first : first + n_at_once, :, position]
            np.put_along_axis(here, chosen, fitted, axis=1)
    return weights, unit


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield four tokens on four single neurons, and four tokens that two neurons together distinguish.

    Four tokens, each at 3 on one neuron: that neuron decodes the token without error. W_out is 0, so no
    removal changes a loss.

    Four equally frequent tokens at (3, 3), (3, 0), (0, 3) and (0, 0). A single neuron ranks a token above
    two of the three others and ties it with the third, AUROC 5/6; both neurons decode every token. Centred,
    the first neuron is at 0, 1.5, -1.5 and 0, the second at the negative. One neuron then decodes the second
    and the third token. No linear probe decodes the first and the fourth, which have AUROC 1/2 and count as
    not decoded.
    """
    n_rows, n_each = 6, 6
    order = list(range(4)) * n_each

    def run(at: Tensor) -> HookedRun:
        document = torch.cat([0 * at[:1], at[order]])
        tokens = torch.tensor([4, *order]).repeat(n_rows)
        return replace(planted(document.expand(n_rows, -1, -1), gain=2.0), tokens=tokens)

    width = 1 + len(order)
    unchanged = [math.nan, *[0.0] * (width - 2), math.nan]
    answers: dict[str, Any] = dict.fromkeys([REMOVED["few"], REMOVED["random"]], unchanged * n_rows)
    for stage in STAGES:
        answers[f"distribution index: {stage}"] = 1.0
        answers[f"tier gap: {stage}"] = 0.0
        answers[f"AUROC above chance: {stage}"] = 1 / 2
    yield run(3 * torch.eye(4)), answers
    yield (
        run(3 * torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])),
        {
            "distribution index: mid": 2.0,
            "AUROC above chance: mid": 1 / 2,
            "distribution index: post": 1.0,
            "AUROC above chance: post": 1 / 4,
        },
    )


def _of_stages(unit: str, name: str, meaning: str, **how: Any) -> dict[str, Quantity]:
    return {f"{name}: {stage}": Quantity(unit, f"{meaning}, {stage}", **how) for stage in STAGES}


PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_shared", "tier gap: mid", above=0.2, group="token"),
        Gate("smear_shared", "tier gap: post", within=0.01, group="token"),
        Gate(
            "smear_shared",
            "log gain of the second tier: mid",
            above=1.0,
            truth=4.396,
            group="token",
        ),
        Gate("smear_shared", REMOVED["many"], above=0.1),
        Gate("absorbed", REMOVED["many"], within=0.001),
        Gate("monosemantic", "distribution index: mid", within=0.01, around=1.0, group="token"),
        Gate("monosemantic", "tier gap: mid", within=0.01, group="token"),
        Gate("monosemantic", "tier gap: post", within=0.01, group="token"),
    ),
    one_scale=True,
    tested="AUROC above chance: post",
    shuffle="tokens",
    measure=measure,
    known=known,
    quantities={
        REMOVED["few"]: Quantity(
            "nats",
            f"change of loss when the direction is removed, features that need at most {FEW} neurons of mid",
        ),
        REMOVED["many"]: Quantity(
            "nats",
            f"change of loss when the direction is removed, features that need more than {FEW} neurons of mid",
            more_smeared_when="higher",
        ),
        REMOVED["random"]: Quantity(
            "nats", "change of loss when as much of a random direction is removed"
        ),
    },
    streams=("natural", "code"),
    estimates={
        **_of_stages(
            "AUROC - 1/2",
            "AUROC above chance",
            "AUROC of the probe on all neurons minus 1/2, mean over features",
        ),
        **_of_stages(
            "neurons",
            "distribution index",
            "neurons needed for 95% of the AUROC above chance of all neurons, median feature",
        ),
        **_of_stages(
            "share", "tier gap", f"share of decoded features that need more than {FEW} neurons"
        ),
        **_of_stages(
            "log gain",
            "log gain of the second tier",
            f"mean log gain at features that need more than {FEW} neurons minus that at other features",
            more_smeared_when="higher",
        ),
        "AUROC by neurons": Quantity(
            "AUROC", "AUROC of probes on the best k neurons, mean over features"
        ),
    },
    figures=(
        Figure(
            "AUROC of probes on the best k neurons",
            ("AUROC by neurons",),
            kind="curve",
            log_x=True,
            x_title="neurons",
        ),
        Figure(
            "Neurons that the median feature needs",
            tuple(f"distribution index: {stage}" for stage in STAGES),
            log_y=True,
        ),
        Figure(
            f"Share of features that need more than {FEW} neurons",
            tuple(f"tier gap: {stage}" for stage in STAGES),
        ),
        Figure(
            "Log gain at second-tier features minus log gain at the others",
            tuple(f"log gain of the second tier: {stage}" for stage in STAGES),
        ),
        Figure("Change of loss when a feature's direction is removed", tuple(REMOVED.values())),
    ),
)
