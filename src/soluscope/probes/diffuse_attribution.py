"""P10: High MLP attribution without a high neuron

The hackathon study multiplied each position's ablation loss by 1 / (max a - mean a), its "inverse outlier
score", took the ten highest positions, and tested whether LayerNorm amplifies these more than random
positions. The test has three faults (protocol.md section 1.6). It selects by 1/s, which is the gain up to
epsilon (see Pitfalls). Its ablation loss is a mean over the prompt, which favours short prompts. And it
compares the ratio of the outlier scores after and before LayerNorm, which is again the gain, with BOS among
the random positions. The corrected score uses K_dla, which no gain can change.

Question:
    Is the gain higher at tokens whose MLP attribution is high but spread over many neurons?

Answers:
    above 0.01: The gain is higher at tokens whose MLP attribution is high and spread over many neurons.
    -0.01 to 0.01: The gain is neither higher nor lower at tokens whose MLP attribution is high and spread over
        many neurons.
    below -0.01: The gain is lower at tokens whose MLP attribution is high and spread over many neurons.

Formula:
    c_tj = h_tj W_out[j].u_y / S;
    K_dla = (sum |c|)^2 / sum c^2;
    score = dl_t K_dla, dl_t the change of the token's loss with the MLP's post set to 0;
    partial Spearman(score, log g | surprisal, position, log token count, |resid_mid|)

Reading:
    Smearing predicts a partial correlation above 0 and above the correlation with W_out permuted, and a gain at
    the top positions well above the mean gain of all tokens. Where the gain is one constant (sd of log gain
    below .01) there is nothing to rank, and no correlation is reported. A correlation above 0 does not prove
    smearing. It shows that the gain is high where many neurons share an attribution that matters for the loss;
    this also happens where other values of gamma would suffice (`disjoint`: .69). Only training a static arm
    shows whether a per-token gain is needed. Results marked "as published" come from the study's own test on
    the same tokens and do not distinguish smearing from its absence.

Pitfalls:
    Ranks ignore how far the gain moves: with a gain pinned to within a millionth they would give .73
    (`pinned`), so read the gain at the top positions beside them. If more than a tenth of the tokens tie for
    the top score, no gain at the top positions is reported. The published score is circular: 1 / (max a -
    mean a) correlates with 1/s, so it selects high gains by construction (its correlation with 1/s is
    reported). A mean over the prompt dilutes an effect by the prompt's length. DLA keeps ln_final's scale
    fixed (see P17). Contributions of opposite sign cancel: compare sum |c| with the DLA. The study's Figure 6
    averaged token types with any number of occurrences, BOS included.

Source:
    Baginski et al. 2023 (hackathon study), part 3 and Figure 6; Nanda's problem 4.39c; protocol.md sections
    1.6 and 7 P10
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
from soluscope.probes._tokens import array, arrays
from soluscope.text import readable

Columns = dict[str, NDArray[np.floating]]
"""Measured values by quantity, each [token]."""

HIGH_DLA = 1.0
"""Logits. An MLP attribution above this counts as high."""
HIGH_NEURON = 0.25
"""Share of the MLP's attribution. A neuron with at least this share counts as high."""
TOP = 0.05
"""Share of positions that count as the top positions by score; the study took 10 of about 210."""
FLAT = 0.01
"""Standard deviation of log gain below which no rank correlation is reported. Ranks would order even a
gain that moves by a millionth, as in a norm that epsilon pins."""
ROUNDING = 1e-9
"""Largest spread of log s that is rounding error."""
FELT = 1e-3
"""Nats: a change of loss up to this is negligible (the margin of the negative controls), and its score is 0."""
N_DEALS = 8
"""Number of permutations of W_out over which the null is averaged."""
N_BINS = 10
N_TYPES = 24
"""Number of token types shown, the most frequent first."""
MIN_STRINGS = 20
"""Fewest documents in which a token type must occur to be shown in the corrected figure."""


def measure(run: HookedRun) -> Measured:
    """Return attribution and scores per token, and the relation of the scores to the gain."""
    tokens = _scores(run)
    return Measured(tokens, tuple(_estimates(run, arrays(tokens))))


def _scores(run: HookedRun) -> dict[str, Tensor]:
    """Return attribution, its concentration, ablation loss and both scores, per token.

    Returns:
        nan where there is no target, with two exceptions. The published score is 0 there, because
        removing a prompt's last token changes no loss. The inverse outlier score needs no target. K_dla
        and the largest neuron's share are nan where no neuron contributes.
    """
    c = contributions(run).double()
    size = c.abs()
    total, largest, dla = size.sum(-1), size.amax(-1), c.sum(-1)
    loss = loss_at_post(run, run.post).double()  # same code as the edited loss
    removed = loss_at_post(run, torch.zeros_like(run.post)).double() - loss
    neurons = total.square() / size.square().sum(-1)
    diffuse = (dla > HIGH_DLA) & (largest < HIGH_NEURON * dla)
    # The published score sets mid to 0, so the mid norm's bias remains, and averages the loss over the prompt.
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
    """Return the ablation loss times the number of neurons that share the attribution.

    The score is 0 where the loss changes by at most `FELT`.
    """
    return (removed * neurons).where(~(removed.abs() <= FELT), 0.0)


def _estimates(run: HookedRun, columns: Columns) -> Iterator[Estimate]:
    """Yield relations of the scores to the gain, and Figure 6.

    BOS is left out of every estimate that is not "as published".
    """
    gain, string, content = array(run.gain.double()), array(run.string), ~array(run.is_bos)
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
        # A larger share means ties: if all scores are equal, all tokens are at the top.
        if np.nanmean(top) <= 2 * TOP:
            yield _top_over_all(
                f"gain at top positions over all{words}", gain[rows], top, string[rows]
            )
    yield from _by_type(run, columns["MLP DLA"])
    yield from _by_k(run, columns)


def _against_gain(
    run: HookedRun, score: NDArray[np.floating], log_gain: NDArray[np.float64]
) -> Iterator[Estimate]:
    """Yield rank correlations with log gain: of the score, of its null, and their difference."""
    content = ~array(run.is_bos)
    string = array(run.string)[content]
    _, code, counts = np.unique(array(run.tokens), return_inverse=True, return_counts=True)
    given = [
        column[content]
        for column in (
            array(run.loss),
            array(run.pos),
            np.log(counts[code]),
            array(run.resid_mid.norm(dim=-1)),
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
    """Yield rank correlations of the published scores with 1/s, s the standard deviation of the token's a."""
    content = ~array(run.is_bos)
    s = array(run.mid.double().std(dim=-1, correction=0))[content]
    if s.min() > 0 and np.ptp(np.log(s)) > ROUNDING:
        for name in ("inverse outlier score", "score"):
            values = columns[f"{name} (as published)"][content]
            yield rank_correlation(
                f"{name} (as published) against 1/s", values, 1 / s, array(run.string)[content]
            )


def _null_scores(run: HookedRun) -> Iterator[NDArray[np.float64]]:
    """Yield scores with the rows of W_out permuted over neurons, each [token].

    The `N_DEALS` permutations are fixed. Each token's activations are rescaled to keep its sum |c|, and
    a change of loss up to `FELT` scores 0, as in the score itself.
    """
    out = run.readout
    generator = torch.Generator().manual_seed(0)
    direction, scale = target_direction(run), final_scale(run, resid_final(run))[:, None]
    total = contributions(run).abs().sum(-1, dtype=torch.float64)
    without = loss_at_post(run, torch.zeros_like(run.post)).double()
    for _ in range(N_DEALS):
        order = torch.randperm(len(out.W_out), generator=generator).to(run.device)
        dealt = replace(run, readout=replace(out, W_out=out.W_out[order]))
        size = (run.post * (direction @ dealt.readout.W_out.T) / scale).abs().double()
        factor = (total / size.sum(-1)).nan_to_num(1.0, posinf=1.0)
        post = run.post * factor[:, None].to(run.post.dtype)
        removed = without - loss_at_post(dealt, post).double()
        yield array(_score(removed, size.sum(-1).square() / size.square().sum(-1)))


def _weighted(quantity: str, parts: list[Estimate], weights: list[float]) -> Estimate:
    """Return the weighted sum of estimates over the same tokens."""
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
    """Return the mean gain at the top tokens over the mean gain of all tokens, minus 1.

    `top` is 1 at top tokens, 0 at other tokens, and nan at tokens without a score.
    """
    sums, n = sums_by_string([top * gain, top, gain, np.ones_like(gain)], string)

    def value(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            result: NDArray[np.float64] = (sums[:, 0] / sums[:, 1]) / (sums[:, 2] / sums[:, 3]) - 1
        return result

    return Estimate(quantity, sums, value, n)


def _by_type(run: HookedRun, dla: NDArray[np.floating]) -> Iterator[Estimate]:
    """Yield Figure 6: the mean DLA of the most frequent token types.

    The published version includes BOS as a type, and rare types.
    """
    with_target = ~np.isnan(dla)
    for name in ("MLP DLA by token", "MLP DLA by token (as published)"):
        published = name.endswith("(as published)")
        rows = with_target if published else with_target & ~array(run.is_bos)
        tokens, string = array(run.tokens)[rows], array(run.string)[rows]
        types, counts = np.unique(tokens, return_counts=True)
        if not published:
            n_strings = np.unique(np.unique([tokens, string], axis=1)[0], return_counts=True)[1]
            types, counts = types[n_strings >= MIN_STRINGS], counts[n_strings >= MIN_STRINGS]
        for rank, token in enumerate(types[np.argsort(-counts, kind="stable")][:N_TYPES], start=1):
            selected = tokens == token
            yield ratio(
                name, dla[rows][selected], selected[selected], string[selected], x=float(rank),
                note=readable(run.vocab[int(token)]) if run.vocab else str(token),
            )  # fmt: skip


def _by_k(run: HookedRun, columns: Columns) -> Iterator[Estimate]:
    """Yield the mean DLA of each tenth of the tokens by K_dla, at the tenth's mean K_dla."""
    k, dla, string = columns["K_dla"], columns["MLP DLA"], array(run.string)
    rows = np.flatnonzero(~array(run.is_bos) & ~np.isnan(k))
    rows = rows[np.argsort(k[rows], kind="stable")]
    for tenth in np.array_split(rows, N_BINS):
        if len(tenth):
            yield ratio(
                "MLP DLA by K_dla", dla[tenth], np.ones(len(tenth)), string[tenth],
                x=float(k[tenth].mean()),
            )  # fmt: skip


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a run of two neurons at (a, -a) with contributions c = (4a, 2a); the logits are -x and x.

    S is constant at 1, because ln_final's epsilon is 1e24 and W_U is 1e12 times as large. The target's
    centred logit is 6a, and 0 without the MLP, so the loss is log(1 + e^(-12a)) with the MLP and log 2
    without it. The second neuron tests the signs: its activation is -a and its weight is negative. K =
    (4 + 2)^2 / (16 + 4) = 1.8.
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
            # The prompt has two targets.
            "score (as published)": [change / 2 * 2, change / 2 * 2, 0],
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
        # Other values of gamma suffice in `disjoint`: neither number proves that a per-token gain is needed.
        Gate("disjoint", PARTIAL, above=0.1),
        Gate("disjoint", "gain at top positions over all", above=0.1),
        *(
            Gate(negative, "gain at top positions over all", within=0.01)
            for negative in ("monosemantic", "pinned", "lateral")
        ),
        Gate("monosemantic", "diffuse and high", within=0.01),
    ),
    one_scale=True,
    tested=PARTIAL,
    shuffle="scale",
    measure=measure,
    known=known,
    quantities={
        "MLP DLA": Quantity(
            "logits", "the MLP's direct attribution to the target's centred logit",
            ("mean", "median", "q05", "q95"),
        ),
        "sum |c|": Quantity("logits", "sum of the neurons' |attribution|"),
        "K_dla": Quantity(
            "neurons", "(sum |c|)^2 / sum c^2, the number of neurons that share the attribution",
            ("mean", "median"),
            more_smeared_when="higher",
        ),
        "largest neuron's share": Quantity("share", "max |c| / sum |c|", ("mean", "median")),
        "diffuse and high": Quantity(
            "share", "DLA above 1 logit, and every neuron below a quarter of it",
            more_smeared_when="higher",
        ),
        "ablation loss": Quantity("nats", "loss without the MLP minus loss with the MLP", ("mean", "median")),
        "score": Quantity(
            "nats x neurons", "ablation loss x K_dla; 0 if |ablation loss| is at most .001 nats", ("mean", "median")
        ),
        "inverse outlier score (as published)": Quantity("1 / activation", "1 / (max a - mean a)"),
        "score (as published)": Quantity(
            "nats / activation", "change of the prompt's mean loss with mid set to 0, x inverse outlier score"
        ),
    },
    estimates={
        PARTIAL: Quantity(
            "correlation", "rank correlation, given surprisal, position, log token count and |resid_mid|"
        ),
        f"{PARTIAL}, W_out permuted": Quantity(
            "correlation", "the same with W_out permuted over neurons at the same sum |c|; mean of 8 permutations"
        ),
        f"{PARTIAL}, less permuted": Quantity(
            "correlation", "the correlation minus the correlation with W_out permuted"
        ),
        "inverse outlier score (as published) against 1/s": Quantity(
            "correlation", "rank correlation; near 1, selection by this score is selection by the gain in any model"
        ),
        "score (as published) against 1/s": Quantity(
            "correlation", "rank correlation of the whole published score with 1/s"
        ),
        "gain at top positions over all": Quantity(
            "ratio minus 1", "mean gain of the top 5% of tokens by score over the mean gain of all, without BOS"
        ),
        "gain at top positions over all (as published)": Quantity(
            "ratio minus 1", "the same by the published score, BOS included; the study's ratio test"
        ),
        "MLP DLA by K_dla": Quantity(
            "logits", "mean attribution of tokens, by the number of neurons that share it",
            more_smeared_when="higher",
        ),
        "MLP DLA by token": Quantity(
            "logits", "mean over a token type's occurrences, the most frequent type first, without BOS"
        ),
        "MLP DLA by token (as published)": Quantity(
            "logits", "Figure 6: the same with BOS as one of the types, and with rare types"
        ),
    },
    streams=("natural",),
    figures=(
        Figure("Score against log gain, partial rank correlation", (PARTIAL, f"{PARTIAL}, W_out permuted")),
        Figure(
            "The study's ratio test: gain at top positions over gain of all tokens, minus 1",
            ("gain at top positions over all", "gain at top positions over all (as published)"),
        ),
        Figure(
            "Circularity: the published score against 1/s",
            ("inverse outlier score (as published) against 1/s", "score (as published) against 1/s"),
        ),
        Figure("MLP attribution", ("MLP DLA", "sum |c|", "diffuse and high")),
        Figure("Number of neurons that share the attribution, median token", ("K_dla",), statistic="median"),
        Figure(
            "MLP attribution by the number of neurons that share it", ("MLP DLA by K_dla",), kind="curve",
            log_x=True, x_title="K_dla, mean of a tenth of the tokens",
        ),
        Figure(
            "Figure 6: MLP attribution by token type",
            ("MLP DLA by token", "MLP DLA by token (as published)"),
            kind="curve",
            x_title="token type, the most frequent first",
        ),
    ),
)  # fmt: skip
