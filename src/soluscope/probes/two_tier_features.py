"""P14: on how many neurons does a feature live? Sparse probing, before and after the norm.

Elhage et al. suspect two tiers of features: some on a neuron of their own, some spread over many, which
have a large effect only where no feature of the first tier is present and the LayerNorm turns them up. A
feature of the second tier is decoded by many neurons together and by no few of them, and stands on
tokens with a high gain. Whether the model reads what the probe reads is asked of the loss: the probe's
direction is taken out of post.

Source: science.md section 7, P14; Elhage et al. 2022, section 6.4; Gurnee et al. 2023 for sparse probing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from soluscope.probes import Estimate, Figure, Gate, Probe, Quantity
from soluscope.probes._features import (
    Features,
    auroc_of,
    auroc_sums,
    first_half,
    label,
    mean_of_defined,
    median_of_defined,
    sums_by_document,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from soluscope.activations import HookedRun

    Floats = NDArray[np.float64]

STAGES = ("mid", "post")
ENOUGH = 0.95
"""Share of the full probe's AUROC, above chance, that counts as having the feature."""
DECODED = 0.75
"""A feature is decoded where the full probe's AUROC is at least half way from chance to 1."""
FEW = 16
"""A feature that needs more neurons than this is of the second tier."""
MAX_REMOVED = 200
"""Tokens at which a feature's direction is removed, at most so many, evenly spaced."""

REMOVED = {
    "few": f"removed: features in at most {FEW} neurons",
    "many": f"removed: features in more than {FEW} neurons",
    "random": "removed: as much of a random direction",
}


@dataclass(frozen=True)
class _Decoding:
    """Probes of each feature from its best k neurons, fitted on the first half of the documents."""

    sizes: NDArray[np.int64]
    """k: 1, 2, 4, ..., all neurons."""
    directions: Floats
    """[feature neuron]: of the probe on all neurons, in units of the activations."""
    sums: Floats
    """[document feature size 4]: what `auroc_of` makes AUROCs of, on the second half."""

    def index(self, aurocs: Floats) -> Floats:
        """Distribution index, [draw feature], from AUROCs [draw feature size]; nan where not decoded."""
        import numpy as np

        above_chance = aurocs - 0.5
        full: Floats = above_chance[:, :, -1]
        least = (above_chance >= ENOUGH * full[:, :, None]).argmax(axis=2)
        found: Floats = np.where(full >= DECODED - 0.5, self.sizes[least], np.nan)
        return found

    def index_of_all(self) -> Floats:
        """The index itself, without resampling. [feature]"""
        total = self.sums.sum(axis=0)
        aurocs = auroc_of(total.reshape(1, -1), total.ravel()).reshape(1, *total.shape[:2])
        index: Floats = self.index(aurocs)[0]
        return index


def measure(run: HookedRun, params: None) -> dict[str, Tensor]:
    """Change of a token's loss, in nats, when the directions of its features are removed from post.

    One feature at a time, of those that are decoded from post. Mean over those that the token has: the
    ones that few neurons of mid tell, the others, and both when as long a piece of a random direction
    is removed. At some tokens of the second half of the documents, nan elsewhere. ln_final is live.
    """
    import numpy as np
    import torch

    from soluscope.ablation import loss_at_post

    features, content = label(run), ~run.is_bos.numpy()
    before, decoding = (_decode(run, stage, features) for stage in STAGES)
    in_few, decoded = before.index_of_all() <= FEW, ~np.isnan(decoding.index_of_all())
    mean = run.post[torch.from_numpy(content & first_half(run))].mean(0)
    removable = content & ~first_half(run) & (run.target >= 0).numpy()
    generator = np.random.default_rng(0)
    totals = {tier: torch.zeros(len(run.pos), 2, dtype=torch.float64) for tier in REMOVED}
    for feature in np.flatnonzero(decoded):
        tokens = np.flatnonzero(features.holds[feature] & removable)
        some = np.linspace(0, len(tokens) - 1, min(len(tokens), MAX_REMOVED)).astype(int)
        chosen = torch.zeros(len(run.pos), dtype=torch.bool)
        chosen[tokens[some]] = True
        here = run.subset(chosen)
        read, elsewhere = (
            torch.from_numpy(vector / np.linalg.norm(vector)).to(run.post.dtype)
            for vector in (decoding.directions[feature], generator.standard_normal(len(mean)))
        )
        length = (here.post - mean) @ read  # [token]
        own = loss_at_post(here, here.post)
        tier = "few" if in_few[feature] else "many"
        for name, direction in ((tier, read), ("random", elsewhere)):
            change = loss_at_post(here, here.post - length[:, None] * direction) - own
            totals[name][chosen] += torch.stack([change, torch.ones_like(change)], -1).double()
    return {name: totals[tier][:, 0] / totals[tier][:, 1] for tier, name in REMOVED.items()}


def estimate(run: HookedRun, table: pd.DataFrame, params: None) -> Iterator[Estimate]:
    """How many neurons tell a feature, from post and from mid, and the gain where it takes many."""
    import numpy as np

    features = label(run)
    if not features.names:
        return
    tested_on = ~run.is_bos.numpy() & ~first_half(run)
    has = features.holds[:, tested_on].T  # [token feature]
    log_gain = run.gain.double().log().numpy()[tested_on]
    at_feature = np.stack([has * log_gain[:, None], has], axis=2)  # [token feature 2]
    string, n = run.string.numpy()[tested_on], len(log_gain)
    gains = sums_by_document(at_feature.reshape(n, -1), string)
    gains = gains.reshape(len(gains), -1, 2)
    for stage in reversed(STAGES):
        yield from _tiers(stage, _decode(run, stage, features), gains, features, n)


def _tiers(
    stage: str, decoding: _Decoding, gains: Floats, features: Features, n: int
) -> Iterator[Estimate]:
    """What follows from the AUROCs of one stage.

    Args:
        stage: mid or post.
        decoding: of that stage.
        gains: sums of log gain over the tokens of a feature, and their number, [document feature 2].
        features: what was decoded.
        n: tokens of the second half.
    """
    import numpy as np

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

    full = decoding.sums[:, :, -1:]
    yield _from_aurocs(f"AUROC above chance: {stage}", full, above_chance, n)
    for kind in ("", *dict.fromkeys(features.kinds)):
        mine = np.array([kind in ("", own) for own in features.kinds])
        sums = decoding.sums[:, mine]
        for quantity, number in (
            (f"distribution index: {stage}", median_index),
            (f"tier gap: {stage}", second_tier),
        ):
            yield _from_aurocs(quantity, sums, number, n, group=kind)
        yield _from_aurocs(
            f"log gain of the second tier: {stage}", sums, tier_gain, n, gains[:, mine], group=kind
        )
    for place, size in enumerate(decoding.sizes):
        sums = decoding.sums[:, :, place : place + 1]
        x = float(size)
        yield _from_aurocs("AUROC by neurons", sums, mean_auroc, n, x=x, group=stage)


def _from_aurocs(
    quantity: str,
    sums: Floats,
    number: Callable[..., Floats],
    n: int,
    more: Floats | None = None,
    **place: Any,
) -> Estimate:
    """An Estimate whose `number` is a function of AUROCs [draw feature size].

    Args:
        quantity: its name.
        sums: [document feature size 4].
        number: given the AUROCs, and the weighted sums of `more` where there are any.
        n: tokens.
        more: sums of something else, [document ...].
        place: `x` and `group`.
    """
    import numpy as np

    flat = sums.reshape(len(sums), -1)
    total, width, shape = flat.sum(axis=0), flat.shape[1], sums.shape[1:3]

    def value(drawn: Floats) -> Floats:
        aurocs = auroc_of(drawn[:, :width], total).reshape(-1, *shape)
        return number(aurocs) if more is None else number(aurocs, drawn[:, width:])

    together = flat if more is None else np.concatenate([flat, more.reshape(len(more), -1)], 1)
    return Estimate(quantity, together, value, n, **place)


def _decode(run: HookedRun, stage: str, features: Features) -> _Decoding:
    """Least-squares probes of every feature from its best k neurons.

    Neurons are standardised and ranked by the difference of the two classes' means. With C the
    correlation matrix of k of them over T tokens, the direction is (C + k/T)^-1 times that difference:
    Fisher's discriminant, with a ridge as strong as the sampling noise of C.
    """
    import numpy as np

    content, half = ~run.is_bos.numpy(), first_half(run)
    fitted_on, tested_on = content & half, content & ~half
    values = getattr(run, stage).numpy().astype(np.float64)
    n_neurons, n = values.shape[1], max(1, int(fitted_on.sum()))
    sizes = np.array([*2 ** np.arange((n_neurons - 1).bit_length()), n_neurons])
    if not features.names:
        return _Decoding(sizes, np.zeros((0, n_neurons)), np.zeros((1, 0, len(sizes), 4)))
    mean, sd = values[fitted_on].mean(axis=0), values[fitted_on].std(axis=0)
    dead = sd <= 1e-6 * np.abs(values).max()
    unit = np.where(dead, np.inf, sd)
    x, tested = (values[fitted_on] - mean) / unit, (values[tested_on] - mean) / unit
    has = features.holds[:, fitted_on].astype(np.float64)
    difference = (has @ x / has.sum(axis=1, keepdims=True)) - (
        (1 - has) @ x / (1 - has).sum(axis=1, keepdims=True)
    )  # [feature neuron]
    correlation = x.T @ x / n
    full = np.linalg.solve(correlation + n_neurons / n * np.eye(n_neurons), difference.T).T
    best_first = np.argsort(-np.abs(difference), axis=1, kind="stable")
    string, sums = run.string.numpy()[tested_on], []
    for feature, order in enumerate(best_first):
        weights = np.zeros((n_neurons, len(sizes)))
        weights[:, -1] = full[feature]
        for place, k in enumerate(sizes[:-1]):
            chosen = order[:k]
            ridge = k / n * np.eye(k)
            weights[chosen, place] = np.linalg.solve(
                correlation[np.ix_(chosen, chosen)] + ridge, difference[feature, chosen]
            )
        sums.append(auroc_sums(tested @ weights, features.holds[feature, tested_on], string))
    by_feature = np.stack(sums, axis=1)  # [document feature size*4]
    return _Decoding(sizes, full / unit, by_feature.reshape(*by_feature.shape[:2], len(sizes), 4))


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Tokens on neurons of their own, and tokens that are told by two neurons together.

    Four tokens, each at 3 on its own neuron: one neuron tells each without a fault. W_out is 0, and
    no removal changes a loss.

    Four tokens at (3, 3), (3, 0), (0, 3), (0, 0), all alike frequent. A single neuron ranks a token
    above two of the three others and level with one, AUROC 5/6; both neurons tell each. Centred, they
    are at 0, 1.5, -1.5, 0 and the negative of that: one neuron tells the second and the third, and
    nothing linear the first and the fourth, which have AUROC 1/2 and count as not decoded.
    """
    import math
    from dataclasses import replace

    import torch

    from soluscope.activations import planted

    n_rows, n_each = 6, 6
    order = list(range(4)) * n_each

    def run(at: Tensor) -> HookedRun:
        document = torch.cat([0 * at[:1], at[order]])
        tokens = torch.tensor([4, *order]).repeat(n_rows)
        return replace(planted(document.expand(n_rows, -1, -1), gain=2.0), tokens=tokens)

    width = 1 + len(order)
    unchanged = [math.nan] * width + [math.nan, *[0.0] * (width - 2), math.nan]
    answers: dict[str, Any] = dict.fromkeys(
        [REMOVED["few"], REMOVED["random"]], unchanged * (n_rows // 2)
    )
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
    name="Two tiers of features",
    section="P14",
    question="Are there features that only many neurons together tell, and do they stand where the gain is high?",
    reading="Smearing predicts a second tier: features that few neurons of mid do not tell and all of them do, "
    "which stand on tokens with a high gain (log gain above 0), take fewer neurons after the norm than before it, "
    "and whose removal costs loss. Without it the tiers have one gain, and the index is the same in mid and post. "
    "A second tier with a removal of 0 is decoded by the probe and not used by the model.",
    pitfalls="A probe reads what the model does not use: that is what the removal is for, next to the random "
    "direction, which removes as much from the same tokens. Features that are unions of others (all capitals) "
    "take many neurons in any model: compare kinds, and tokens' identities first. The index asks for 95% of what "
    "all neurons give, and moves in powers of two. The ridge grows with the number of neurons; with few tokens "
    "all neurons may tell less than some of them. Intervals are for other documents at the same probes.",
    formula="least k with AUROC_k - 1/2 >= .95 (AUROC_N - 1/2), for probes (C + k/T)^-1 (difference of class "
    "means) on the k neurons of the largest standardised difference, fitted on one half of the documents, AUROC on "
    "the other; tier gap = share of decoded features with k > 16; removal: post - ((post - mean) . w) w",
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
    tested="AUROC above chance: post",
    shuffle="tokens",
    measure=measure,
    known=known,
    quantities={
        REMOVED["few"]: Quantity(
            "nats", f"change of loss without the direction, features told by at most {FEW} of mid"
        ),
        REMOVED["many"]: Quantity(
            "nats",
            f"change of loss without the direction, features that take more than {FEW} of mid",
            more_smeared_when="higher",
        ),
        REMOVED["random"]: Quantity("nats", "change of loss without as much of another direction"),
    },
    streams=("natural", "code"),
    estimate=estimate,
    estimates={
        **_of_stages(
            "AUROC - 1/2", "AUROC above chance", "of the probe on all neurons, mean over features"
        ),
        **_of_stages(
            "neurons", "distribution index", "that tell the median feature as well as all do"
        ),
        **_of_stages("share", "tier gap", f"of decoded features that take more than {FEW} neurons"),
        **_of_stages(
            "log gain",
            "log gain of the second tier",
            f"at features that take more than {FEW} neurons less at others",
            more_smeared_when="higher",
        ),
        "AUROC by neurons": Quantity(
            "AUROC", "of probes on the best k neurons, mean over features"
        ),
    },
    figures=(
        Figure(
            "How well the best k neurons tell a feature",
            ("AUROC by neurons",),
            kind="curve",
            log_x=True,
            x_title="neurons",
        ),
        Figure(
            "Neurons that the median feature takes",
            tuple(f"distribution index: {stage}" for stage in STAGES),
            log_y=True,
        ),
        Figure(
            f"Features that take more than {FEW} neurons",
            tuple(f"tier gap: {stage}" for stage in STAGES),
        ),
        Figure(
            "Log gain at those features, less at the others",
            tuple(f"log gain of the second tier: {stage}" for stage in STAGES),
        ),
        Figure("Loss when a feature's direction is removed", tuple(REMOVED.values())),
    ),
    source="Elhage et al. 2022, section 6.4; science.md section 7 P14",
)
