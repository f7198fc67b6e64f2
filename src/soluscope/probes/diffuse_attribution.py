"""P10: High MLP attribution without a high neuron

The hackathon study multiplied each position's ablation loss by 1 / (max a - mean a), the "inverse outlier
score", took the ten highest positions, and asked whether LayerNorm amplifies these more than random
positions. Three things are wrong with it (science.md section 1.6). The selection is one by 1/s, which is
what the gain is (see Pitfalls). The ablation loss is the prompt's mean, so short prompts win. And the
quantity compared, the outlier score after LayerNorm over the one before, is the gain itself, with BOS
among the random positions. The corrected score rests on K_dla, which no gain can change.

Question:
    Are tokens whose MLP attribution is high but spread over many neurons those that the gain turns
    up?

Formula:
    c_tj = h_tj W_out[j].u_y / S;
    K_dla = (sum |c|)^2 / sum c^2;
    score = dl_t K_dla, dl_t the change of the token's loss with the MLP's post at 0;
    partial Spearman(score, log g | surprisal, position, log token count, |resid_mid|)

Reading:
    Smearing predicts a partial correlation above 0 and above that with W_out permuted, together
    with a gain at the top positions that is well above the gain of all. Where the gain is one
    constant (sd of log gain below .01) there is nothing to rank, and no correlation is given. The
    converse does not hold: a correlation above 0 says that the gain is high where many neurons
    share a felt attribution, also where a gain for each neuron could do it (`disjoint`: .69);
    whether it is needed is for P7 and P8. What is marked as published shows what the study's own
    test finds on the same tokens, whether there is smearing or not.

Pitfalls:
    Ranks do not know how far the gain moves: of a gain pinned to a millionth they would give .73
    (`pinned`), so read the gain at the top positions beside them. If more than a tenth of the
    tokens tie for the top score, no gain at the top is given. Circular as published: 1 / (max a -
    mean a) goes with 1/s, so it picks high gains by construction (its correlation with 1/s is
    given). Prompt means dilute by the prompt's length. DLA holds ln_final's scale (see P17).
    Contributions cancel: sum |c| beside the DLA says by how much. Figure 6 averaged token types
    whatever their number, BOS included.

Source:
    Baginski et al. 2023 (hackathon study), part 3 and Figure 6; Nanda's problem 4.39c; science.md
    sections 1.6 and 7 P10
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

from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import (
    contributions,
    final_scale,
    resid_final,
    target_direction,
    with_readout,
)
from soluscope.probes._estimates import rank_correlation, ratio, sums_by_string
from soluscope.probes._tokens import arrays

Columns = dict[str, NDArray[np.floating]]
"""The measured values by quantity, each [token]."""

HIGH_DLA = 1.0
"""Logits; above it the MLP's attribution counts as high."""
HIGH_NEURON = 0.25
"""Share of the MLP's attribution; a neuron that has more counts as high."""
TOP = 0.05
"""Share of positions that count as those with the highest score: the study took 10 of about 210."""
FLAT = 0.01
"""Standard deviation of log gain below which no rank correlation is given: ranks see an order in a
gain that moves by a millionth, as it does where epsilon pins the norm."""
ROUNDING = 1e-9
"""A spread of log s below this is rounding."""
FELT = 1e-3
"""Nats: a smaller change of loss does not matter (the margin of equivalence), and its score is 0."""
N_DEALS = 8
"""Permutations of W_out over which the null is averaged."""
N_BINS = 10
N_TYPES = 24
"""Token types shown, the commonest first."""
MIN_STRINGS = 20
"""A type seen in fewer documents is not shown in the corrected figure."""


def measure(run: HookedRun) -> Measured:
    """Return attribution and scores per token, and what goes with the gain."""
    tokens = _scores(run)
    return Measured(tokens, tuple(_estimates(run, arrays(tokens))))


def _scores(run: HookedRun) -> dict[str, Tensor]:
    """Return attribution, its concentration, ablation loss and both scores, one value a token.

    Returns:
        nan where there is no target, but for the published score, which is 0 there (removing a
        prompt's last token changes no loss), and for the inverse outlier score, which needs none. K
        and the share are nan where no neuron contributes.
    """
    c = contributions(run).double()
    size = c.abs()
    total, largest, dla = size.sum(-1), size.amax(-1), c.sum(-1)
    loss = loss_at_post(run, run.post).double()  # run.loss is fp32, whatever the model
    removed = loss_at_post(run, torch.zeros_like(run.post)).double() - loss
    neurons = total.square() / size.square().sum(-1)
    diffuse = (dla > HIGH_DLA) & (largest < HIGH_NEURON * dla)
    # As published: all of mid set to 0, so the mid norm's bias is left, and the mean over the prompt.
    silent = run.readout.beta.expand_as(run.post)
    row = run.is_bos.cumsum(0)
    n_targets = torch.bincount(row, weights=(run.target >= 0).double())[row]
    diluted = (loss_at_post(run, silent).double() - loss).nan_to_num(0.0) / n_targets
    mid = run.mid.double()
    outlier = mid.amax(-1) - mid.mean(-1)
    inverse = (1 / outlier).where(outlier > 0, torch.nan)
    return {
        "MLP DLA": dla,
        "sum |c|": total,
        "K_dla": neurons,
        "largest neuron's share": largest / total,
        "diffuse and high": diffuse.double().where(run.target >= 0, torch.nan),
        "ablation loss": removed,
        "score": _score(removed, neurons),
        "inverse outlier score (as published)": inverse,
        "score (as published)": diluted * inverse,
    }


def _score(removed: Tensor, neurons: Tensor) -> Tensor:
    """Ablation loss times the neurons that share the attribution; 0 where the loss is not felt."""
    return (removed * neurons).where(~(removed.abs() <= FELT), 0.0)


def _estimates(run: HookedRun, columns: Columns) -> Iterator[Estimate]:
    """What goes with the gain, and Figure 6; BOS is left out of all that is not "as published"."""
    gain, string, content = run.gain.double().numpy(), run.string.numpy(), ~run.is_bos.numpy()
    scores = columns["score"][content]
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        return
    if np.log(gain[content]).std() > FLAT and len(np.unique(scores)) > 1:
        yield from _against_gain(run, columns["score"], np.log(gain))
    yield from _circular(run, columns)
    for name, rows in (("score", content), ("score (as published)", content | True)):
        words, score = name.removeprefix("score"), columns[name][rows]
        top = np.where(np.isnan(score), np.nan, score >= np.nanquantile(score, 1 - TOP))
        if np.nanmean(top) <= 2 * TOP:  # more are ties: of one score all tokens are the top
            yield _top_over_all(
                f"gain at top positions over all{words}", gain[rows], top, string[rows]
            )
    yield from _by_type(run, columns["MLP DLA"])
    yield from _by_k(run, columns)


def _against_gain(
    run: HookedRun, score: NDArray[np.floating], log_gain: NDArray[np.float64]
) -> Iterator[Estimate]:
    """Rank correlations of the score and of its null with log gain."""
    content = ~run.is_bos.numpy()
    string = run.string.numpy()[content]
    _, code, counts = np.unique(run.tokens.numpy(), return_inverse=True, return_counts=True)
    given = [
        column[content]
        for column in (
            run.loss.numpy(),
            run.pos.numpy(),
            np.log(counts[code]),
            run.resid_mid.norm(dim=-1).numpy(),
        )
    ]
    log_gain = log_gain[content]
    partial = rank_correlation(PARTIAL, score[content], log_gain, string, given)
    nulls = [
        rank_correlation(PARTIAL, null[content], log_gain, string, given)
        for null in _null_scores(run)
    ]
    yield partial
    yield _weighted(f"{PARTIAL}, W_out permuted", nulls, [1 / N_DEALS] * N_DEALS)
    yield _weighted(
        f"{PARTIAL}, less permuted", [partial, *nulls], [1.0, *[-1 / N_DEALS] * N_DEALS]
    )


def _circular(run: HookedRun, columns: Columns) -> Iterator[Estimate]:
    """The published score's rank correlation with 1/s, s the standard deviation of the token's a."""
    content = ~run.is_bos.numpy()
    s = run.mid.double().std(dim=-1, correction=0).numpy()[content]
    if s.min() > 0 and np.ptp(np.log(s)) > ROUNDING:
        for name in ("inverse outlier score", "score"):
            values = columns[f"{name} (as published)"][content]
            yield rank_correlation(
                f"{name} (as published) against 1/s", values, 1 / s, run.string.numpy()[content]
            )


def _null_scores(run: HookedRun) -> Iterator[NDArray[np.float64]]:
    """Scores if the neurons' output weights were dealt to other neurons, each [token].

    Of `N_DEALS` fixed permutations; each token's activations are scaled so that its sum |c| stays
    what it was, and what is not felt scores 0, as in the score itself.
    """
    out = run.readout
    generator = torch.Generator().manual_seed(0)
    direction, scale = target_direction(run), final_scale(run, resid_final(run))[:, None]
    total = contributions(run).abs().sum(-1, dtype=torch.float64)
    without = loss_at_post(run, torch.zeros_like(run.post)).double()
    for _ in range(N_DEALS):
        order = torch.randperm(len(out.W_out), generator=generator)
        dealt = replace(run, readout=replace(out, W_out=out.W_out[order]))
        size = (run.post * (direction @ dealt.readout.W_out.T) / scale).abs().double()
        factor = (total / size.sum(-1)).nan_to_num(1.0, posinf=1.0)
        post = run.post * factor[:, None].to(run.post.dtype)
        removed = without - loss_at_post(dealt, post).double()
        score: NDArray[np.float64] = _score(
            removed, size.sum(-1).square() / size.square().sum(-1)
        ).numpy()
        yield score


def _weighted(quantity: str, parts: list[Estimate], weights: list[float]) -> Estimate:
    """Sum of estimates over the same tokens, each times its weight."""
    ends = np.cumsum([part.sums.shape[1] for part in parts])[:-1]

    def value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = np.sum(
            [
                weight * part.value(part_sums)
                for weight, part, part_sums in zip(
                    weights, parts, np.split(sums, ends, axis=1), strict=True
                )
            ],
            axis=0,
        )
        return result

    return Estimate(quantity, np.concatenate([p.sums for p in parts], axis=1), value, parts[0].n)


def _top_over_all(
    quantity: str,
    gain: NDArray[np.float64],
    top: NDArray[np.float64],
    string: NDArray[np.int64],
) -> Estimate:
    """Mean gain at the top tokens (1, others 0, nan without a score), over the mean of all, less 1."""
    sums, n = sums_by_string([top * gain, top, gain, np.ones_like(gain)], string)

    def value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            result: NDArray[np.float64] = (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3]) - 1
        return result

    return Estimate(quantity, sums, value, n)


def _by_type(run: HookedRun, dla: NDArray[np.floating]) -> Iterator[Estimate]:
    """Figure 6: mean DLA of the commonest token types; as published BOS is one, and rare ones are."""
    with_target = ~np.isnan(dla)
    for name in ("MLP DLA by token", "MLP DLA by token (as published)"):
        published = name.endswith("(as published)")
        rows = with_target if published else with_target & ~run.is_bos.numpy()
        tokens, string = run.tokens.numpy()[rows], run.string.numpy()[rows]
        types, counts = np.unique(tokens, return_counts=True)
        if not published:
            n_strings = np.unique(np.unique([tokens, string], axis=1)[0], return_counts=True)[1]
            types, counts = types[n_strings >= MIN_STRINGS], counts[n_strings >= MIN_STRINGS]
        for rank, token in enumerate(types[np.argsort(-counts, kind="stable")][:N_TYPES], start=1):
            selected = tokens == token
            yield ratio(
                name, dla[rows][selected], selected[selected], string[selected], x=float(rank),
                note=run.vocab[int(token)] if run.vocab else str(token),
            )  # fmt: skip


def _by_k(run: HookedRun, columns: Columns) -> Iterator[Estimate]:
    """Mean DLA by tenth of K_dla, each at its own mean K: is what many neurons share small?"""
    k, dla, string = columns["K_dla"], columns["MLP DLA"], run.string.numpy()
    rows = np.flatnonzero(~run.is_bos.numpy() & ~np.isnan(k))
    rows = rows[np.argsort(k[rows], kind="stable")]
    for tenth in np.array_split(rows, N_BINS):
        if len(tenth):
            yield ratio(
                "MLP DLA by K_dla", dla[tenth], np.ones(len(tenth)), string[tenth],
                x=float(k[tenth].mean()),
            )  # fmt: skip


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Two neurons at (a, -a) that write c = (4, 2) times a to a logit of x against -x; S is 1.

    An epsilon of 1e24 under weights 1e12 times as large makes S one number. The target's centred
    logit is 6a, and without the MLP 0, so the loss is log(1 + e^(-12a)) against log 2. Signs: the
    second neuron's activation is -a and its weight negative. K = (4 + 2)^2 / (16 + 4) = 1.8.
    """
    a = 0.5
    run = planted(torch.tensor([[[a, -a]] * 3]))
    run = replace(run, readout=replace(run.readout, ln_centred=False, ln_eps=1e24))
    run = with_readout(
        run,
        resid_mid=torch.zeros(3, 2, dtype=torch.float64),
        W_out=torch.tensor([[4.0, 0.0], [-2.0, 0.0]], dtype=torch.float64),
        W_U=torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) * 1e12,
    )
    change = math.log(2) - math.log1p(math.exp(-12 * a))
    nan = math.nan
    yield (
        run,
        {
            "MLP DLA": [3, 3, nan],
            "sum |c|": [3, 3, nan],
            "K_dla": [1.8, 1.8, nan],
            "largest neuron's share": [2 / 3, 2 / 3, nan],
            "diffuse and high": [0, 0, nan],
            "ablation loss": [change, change, nan],
            "score": [1.8 * change, 1.8 * change, nan],
            "inverse outlier score (as published)": [2, 2, 2],
            "score (as published)": [
                change / 2 * 2,
                change / 2 * 2,
                0,
            ],  # two targets in the prompt
        },
    )


PARTIAL = "partial rho of score and log gain"

PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_shared", PARTIAL, above=0.1),
        Gate("smear_shared", f"{PARTIAL}, less permuted", above=0.1),
        Gate("smear_shared", f"{PARTIAL}, W_out permuted", within=0.1),
        Gate("smear_shared", "gain at top positions over all", above=0.1),
        # A gain for each neuron would do there: neither is proof that one for each token is needed.
        Gate("disjoint", PARTIAL, above=0.1),
        Gate("disjoint", "gain at top positions over all", above=0.1),
        *(
            Gate(negative, "gain at top positions over all", within=0.01)
            for negative in ("monosemantic", "pinned", "lateral")
        ),
        Gate("monosemantic", "diffuse and high", within=0.01),
    ),
    tested=PARTIAL,
    shuffle="scale",
    measure=measure,
    known=known,
    quantities={
        "MLP DLA": Quantity(
            "logits", "the MLP's direct attribution to the target's centred logit",
            ("mean", "median", "q05", "q95"),
        ),
        "sum |c|": Quantity("logits", "sum of the neurons' attributions without their signs"),
        "K_dla": Quantity(
            "neurons", "(sum |c|)^2 / sum c^2, how many neurons share the attribution", ("mean", "median"),
            more_smeared_when="higher",
        ),
        "largest neuron's share": Quantity("share", "max |c| / sum |c|", ("mean", "median")),
        "diffuse and high": Quantity(
            "share", "DLA above 1 logit, and no neuron with as much as a quarter of it",
            more_smeared_when="higher",
        ),
        "ablation loss": Quantity("nats", "loss without the MLP less loss with it", ("mean", "median")),
        "score": Quantity(
            "nats x neurons", "ablation loss x K_dla; 0 for a loss below .001 nats", ("mean", "median")
        ),
        "inverse outlier score (as published)": Quantity("1 / activation", "1 / (max a - mean a)"),
        "score (as published)": Quantity(
            "nats / activation", "change of the prompt's mean loss, mid set to 0, x inverse outlier score"
        ),
    },
    estimates={
        PARTIAL: Quantity(
            "correlation", "ranks, given surprisal, position, log token count and |resid_mid|"
        ),
        f"{PARTIAL}, W_out permuted": Quantity(
            "correlation", "the same, output weights dealt to other neurons at the same sum |c|; mean of 8 deals"
        ),
        f"{PARTIAL}, less permuted": Quantity(
            "correlation", "the difference of the two"
        ),
        "inverse outlier score (as published) against 1/s": Quantity(
            "correlation", "near 1: selecting by this score is selecting by the gain, whatever the model does"
        ),
        "score (as published) against 1/s": Quantity("correlation", "ranks; the score's share in that"),
        "gain at top positions over all": Quantity(
            "ratio less 1", "mean gain of the top 5% of tokens by score over the mean of all, without BOS"
        ),
        "gain at top positions over all (as published)": Quantity(
            "ratio less 1", "the same by the published score, BOS among all; the study's ratio test"
        ),
        "MLP DLA by K_dla": Quantity(
            "logits", "mean attribution of tokens by how many neurons share it", more_smeared_when="higher"
        ),
        "MLP DLA by token": Quantity(
            "logits", "mean over a token type's occurrences, the commonest first, without BOS"
        ),
        "MLP DLA by token (as published)": Quantity(
            "logits", "Figure 6: the same with BOS as one of the types, and rare types in"
        ),
    },
    streams=("natural",),
    figures=(
        Figure("Score against log gain, partial rank correlation", (PARTIAL, f"{PARTIAL}, W_out permuted")),
        Figure(
            "The study's ratio test: gain at top positions over gain at all, less 1",
            ("gain at top positions over all", "gain at top positions over all (as published)"),
        ),
        Figure(
            "Circularity: the published score against 1/s",
            ("inverse outlier score (as published) against 1/s", "score (as published) against 1/s"),
        ),
        Figure("MLP attribution", ("MLP DLA", "sum |c|", "diffuse and high")),
        Figure("How many neurons share it, median token", ("K_dla",), statistic="median"),
        Figure(
            "MLP attribution by the number of neurons that share it", ("MLP DLA by K_dla",), kind="curve",
            log_x=True, x_title="K_dla, mean of a tenth of the tokens",
        ),
        Figure(
            "Figure 6: MLP attribution by token type",
            ("MLP DLA by token", "MLP DLA by token (as published)"),
            kind="curve",
            x_title="token type, the commonest first",
        ),
    ),
)  # fmt: skip
