"""P19: Entropy, frequency and gain neurons

An entropy neuron writes where the unembedding hardly reads: it lengthens the residual stream, ln_final
divides by more, and all logits shrink. A frequency neuron pushes logits along the log unigram. A gain
neuron is their analogue at the mid norm: removing it moves the mid LayerNorm's gain, and so all other
neurons, by more than what it writes itself.

Question:
    Are there neurons that act by moving a norm's scale rather than by what they write to the
    logits?

Formula:
    TE - DE: change of entropy at post_j = 0, ln_final live less frozen;
    LogitVar_j = Var_v cos(w_j, u_v);
    null share = |w_j on W_U's lowest singular directions|^2 / |w_j|^2;
    log gain moved = |a_j (a_j - m)| g^2 / N;
    loss through the mid norm = (8.5) - (8.2) at mid_j = 0

Reading:
    An entropy neuron changes entropy with ln_final live and not with it frozen: TE - DE away from
    0, most of its row of W_out where W_U hardly reads. This is ln_final, not the mid norm; it must
    vanish where ln_final's scale is constant. Gain neurons are the mid norm's: smearing needs some,
    as the gain has to be moved by something; without them (log gain moved near 0) no neuron steers
    the others through the gain.

Pitfalls:
    One layer has few of them. Post is set to 0, LayerNorm's mean; Stolfo et al. use the mean over
    texts. A discovered neuron is one whose effect through ln_final exceeds its direct one, not one
    whose effect is large: read the largest too. W_out is taken as it stands, without the mid norm's
    gamma and centring.

Source:
    Stolfo et al. 2024 (arXiv 2406.16254); Gurnee et al. 2024 (arXiv 2401.12181); science.md section
    7 P19
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.comparison.stats import benjamini_hochberg, mean_p
from soluscope.hooked.ablation import Ablation
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import with_readout
from soluscope.probes._estimates import ratio, sums_by_string
from soluscope.probes._features import folds
from soluscope.probes._tokens import arrays, every_nth, scattered

EVERY = 11
"""All neurons are ablated at every 11th token that is not BOS and has a target."""
TOLERANCE = 1e-6
"""Nats: how exact a change of loss must be, and from where on an excess is more than rounding."""
NULL_SHARE = 0.01
"""Of the singular directions of W_U: those that count as its null space."""
Q = 0.05


@dataclass(frozen=True)
class Effects:
    """Every neuron at some of the tokens; each tensor but `tokens` is [t d_mlp], nats."""

    tokens: Tensor
    total: Tensor
    """TE: change of entropy with post_tj at 0, ln_final live."""
    direct: Tensor
    """DE: the same with ln_final's scale as it was."""
    loss: Tensor
    """Change of loss with mid_tj at 0, the mid norm's mean and gain held (8.2)."""
    loss_through: Tensor
    """Change of loss with mid_tj at 0, the mid norm live (8.5), less `loss`."""


def effects(run: HookedRun) -> Effects:
    """All (token, neuron) ablations that the probe's numbers come from."""
    tokens = every_nth(run, EVERY)
    live = Ablation(run)
    written = run.gain[tokens, None] * run.mid[tokens] * run.readout.gamma
    held = live.post(tokens, run.post[tokens] - written, tolerance=TOLERANCE).double()
    return Effects(
        tokens=tokens,
        total=live.entropy(tokens).double(),
        direct=Ablation(run, "frozen").entropy(tokens).double(),
        loss=held,
        loss_through=live.mid(tokens, tolerance=TOLERANCE).double() - held,
    )


def gain_elasticity(run: HookedRun) -> Tensor:
    """|a_j dlog g/da_j| = |a_j (a_j - m)| g^2 / N, [token d_mlp]: how far a neuron moves its token's gain.

    0 where the gain is one constant; m is 0 in a norm that does not centre.
    """
    a = run.mid.double()
    if run.eps is None:
        return torch.zeros_like(a)
    return (a * run.centred).abs() * run.gain.double().square()[:, None] / a.shape[-1]


def measure(run: HookedRun) -> Measured:
    """Return effects through the norms' scales: per token, of the largest neurons, and per neuron."""
    at, facts = effects(run), weights(run)
    tokens = _sizes(run, at)
    return Measured(tokens, tuple(_estimates(run, at, facts, tokens)), _by_neuron(run, at, facts))


def _sizes(run: HookedRun, at: Effects) -> dict[str, Tensor]:
    """Return means over neurons of the sizes of their effects.

    All but the effect on the gain are nan except at every `EVERY`-th token.
    """
    through = (at.total - at.direct).abs()
    values = {
        "entropy: total effect": at.total.abs().mean(-1),
        "entropy: direct effect": at.direct.abs().mean(-1),
        "entropy: through ln_final": through.mean(-1),
        "loss: mid norm held": at.loss.abs().mean(-1),
        "loss: through the mid norm": at.loss_through.abs().mean(-1),
    }
    columns = {name: scattered(run, at.tokens, column) for name, column in values.items()}
    return columns | {"log gain moved": gain_elasticity(run).mean(-1)}


def _estimates(
    run: HookedRun, at: Effects, facts: dict[str, Tensor], tokens: dict[str, Tensor]
) -> Iterator[Estimate]:
    """The largest neuron's means, how many neurons are discovered, and shares; facts of the weights."""
    if not len(at.tokens):
        return
    columns = arrays(tokens)
    string = run.string[at.tokens].numpy()
    through = (at.total - at.direct).numpy()
    yield _of_the_largest("largest mean TE - DE", through, at.tokens.numpy(), run)
    yield ratio("mean TE - DE", through.mean(-1), np.ones(len(through)), string)
    yield from _of_the_discovered(at, run)
    content = (~run.is_bos).nonzero().squeeze(-1)
    yield _of_the_largest(
        "log gain moved by the largest gain neuron",
        gain_elasticity(run)[content].numpy(), content.numpy(), run,
    )  # fmt: skip
    for name, through_norm, otherwise in (
        ("entropy effect through ln_final", "entropy: through ln_final", "entropy: direct effect"),
        ("loss effect through the mid norm", "loss: through the mid norm", "loss: mid norm held"),
    ):
        part, rest = columns[through_norm], columns[otherwise]
        yield ratio(f"share of {name}", part, part + rest, run.string.numpy())
    for name, column in _WEIGHTS.items():
        values = column(facts)
        if values.isfinite().any():
            yield _fact(name, values[values.isfinite()].max().item(), len(values))


def _fact(quantity: str, value: float, n: int) -> Estimate:
    """One row, so no interval: of the weights, or of a number of discoveries, which resampling inflates."""
    return Estimate(quantity, np.array([[value]]), lambda sums: sums[:, 0], n)


def _halves(
    tokens: NDArray[np.intp], run: HookedRun
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Which of some tokens choose and which measure, each [t], for both folds of their documents."""
    among = np.zeros(len(run.pos), dtype=bool)
    among[tokens] = True
    for chosen, measured in folds(run, among):
        yield chosen[tokens], measured[tokens]


def _of_the_largest(
    quantity: str, values: NDArray[np.float64], tokens: NDArray[np.intp], run: HookedRun
) -> Estimate:
    """Mean over tokens of the neuron with the largest |mean|, in the direction of that mean.

    Both are chosen on the other half of the documents, so where there is nothing the mean is 0.

    Args:
        values: [t d_mlp], at `tokens`.
        tokens: [t] row numbers.
    """
    result = np.full(len(values), np.nan)
    for chosen, measured in _halves(tokens, run):
        if chosen.any():
            mean = values[chosen].mean(0)
            largest = abs(mean).argmax()
            result[measured] = np.sign(mean[largest]) * values[measured, largest]
    return ratio(quantity, result, result * 0 + 1, run.string.numpy()[tokens])


def _of_the_discovered(at: Effects, run: HookedRun) -> Iterator[Estimate]:
    """Neurons discovered on one half of the documents: how many the other half confirms, and by how much.

    The excess is the other half's mean of |TE - DE| - |DE| over the discovered neurons, 0 without any.
    """
    excess, string = _excess(at), run.string[at.tokens].numpy()
    n_confirmed, kept = [], np.zeros(len(excess))
    for chosen, measured in _halves(at.tokens.numpy(), run):
        discovered = _discovered(excess[chosen], string[chosen])
        again = np.zeros_like(discovered)
        if measured.any():  # one document has no other half
            again = (excess[measured].mean(0) > 0) & (_p(excess[measured], string[measured]) < Q)
        n_confirmed.append((discovered & again).mean())
        if discovered.any():
            kept[measured] = excess[measured][:, discovered].mean(-1)
    yield _fact(
        "share of neurons confirmed as entropy neurons", float(np.mean(n_confirmed)), len(excess)
    )
    yield ratio("excess of discovered entropy neurons", kept, np.ones(len(kept)), string)


def _excess(at: Effects) -> NDArray[np.float64]:
    """|TE - DE| - |DE|, [t d_mlp]: by how much a neuron acts through ln_final more than directly."""
    values: NDArray[np.float64] = ((at.total - at.direct).abs() - at.direct.abs()).numpy()
    return values


def _p(excess: NDArray[np.float64], string: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each neuron's two-sided p over strings of a mean of 0, [d_mlp]; nan from too few strings."""
    sums, _ = sums_by_string([np.ones(len(excess)), *excess.T], string)
    return mean_p(sums[:, 1:], sums[:, 0])


def _discovered(excess: NDArray[np.float64], string: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Neurons whose mean excess is above 0 by Benjamini-Hochberg at q = .05, [d_mlp]."""
    if not len(excess):
        return np.zeros(excess.shape[1], dtype=bool)
    felt: NDArray[np.bool_] = excess.mean(0) > TOLERANCE
    return felt & (benjamini_hochberg(_p(excess, string)) < Q)


def weights(run: HookedRun) -> dict[str, Tensor]:
    """What can be said of each neuron without activations, [d_mlp] each.

    W_U is taken with ln_final's weights on it, without what ln_final's centring takes out, and
    centred over the vocabulary, so that its null space is what no probability reads. W_out's rows
    are taken after the centring alone; nothing of the mid norm (gamma, centring) is folded into them.

    Returns:
        norm of the row of W_out; LogitVar, the variance over the vocabulary of its cosine with W_U's
        columns; the share of its squared norm in the lowest 1% (at least one) of W_U's singular
        directions, and in those past the knee, the largest drop among the lower half of the log
        singular values; the correlation of what it adds to logits with the log unigram, over the
        tokens that the run has (nan if fewer than three).
    """
    out = run.readout
    d_model = len(out.W_U)
    W = out.W_out.double()
    U = out.W_U.double() * out.ln_w.double()[:, None]
    if out.ln_centred:
        # An orthonormal basis of what is left of the residual stream: all but the direction (1, ..., 1).
        ones = torch.ones(d_model, 1, dtype=torch.float64)
        basis = torch.linalg.qr(
            torch.cat([ones, torch.eye(d_model, dtype=torch.float64)[:, 1:]], 1)
        )
        W, U = W @ basis.Q[:, 1:], basis.Q[:, 1:].T @ U
    U = U - U.mean(-1, keepdim=True)
    norm = W.norm(dim=-1)
    unit = W / norm[:, None]
    length = U.norm(dim=0)
    cosine = (unit @ U)[:, length > 0] / length[length > 0]
    left, spectrum = _singular(U)
    share = (unit @ left).square()  # [d_mlp direction], the largest singular value first
    # Below 1e-7 of the largest, singular values of U U^T are rounding.
    drops = -spectrum.clamp(min=1e-7 * spectrum[0]).log().diff()
    drops[: len(drops) // 2] = -torch.inf
    knee = 1 + int(drops.argmax()) if len(drops) else 1
    n_null = max(1, round(NULL_SHARE * d_model))
    return {
        "W_out norm": out.W_out.double().norm(dim=-1),
        "LogitVar": cosine.var(dim=-1, correction=0),
        "null share, lowest 1%": share[:, -n_null:].sum(-1),
        "null share, past the knee": share[:, knee:].sum(-1),
        "correlation with log unigram": _with_unigram(W @ U, run),
    }


def _singular(U: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular directions [d d] and values [d], from the largest; from U U^T, which is small."""
    values, directions = torch.linalg.eigh(U @ U.T)
    return directions.flip(-1), values.flip(-1).clamp(min=0).sqrt()


def _with_unigram(added: Tensor, run: HookedRun) -> Tensor:
    """Correlation over the vocabulary of what a neuron adds to logits with the log of token counts."""
    counts = torch.bincount(run.tokens[~run.is_bos], minlength=added.shape[1])
    seen = counts > 0
    if int(seen.sum()) < 3:
        return torch.full_like(added[:, 0], torch.nan)
    y = counts[seen].double().log()
    x, y = added[:, seen] - added[:, seen].mean(-1, keepdim=True), y - y.mean()
    correlation: Tensor = (x @ y) / (x.norm(dim=-1) * y.norm())
    return correlation


_WEIGHTS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "largest share in W_U's null space": lambda facts: facts["null share, lowest 1%"],
    "largest |correlation| with log unigram": lambda facts: facts[
        "correlation with log unigram"
    ].abs(),
}


def _by_neuron(run: HookedRun, at: Effects, facts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return facts of the weights, mean effects, and the adjusted p of |TE - DE| - |DE|."""
    excess, string = _excess(at), run.string[at.tokens].numpy()
    content = ~run.is_bos
    return {
        **facts,
        "TE": at.total.mean(0),
        "DE": at.direct.mean(0),
        "TE - DE": (at.total - at.direct).mean(0),
        "adjusted p of |TE - DE| - |DE|": torch.from_numpy(benjamini_hochberg(_p(excess, string))),
        "is entropy neuron": torch.from_numpy(_discovered(excess, string)),
        "log gain moved": gain_elasticity(run)[content].mean(0),
        "|dl|, mid norm held": at.loss.abs().mean(0),
        "|dl| through the mid norm": at.loss_through.abs().mean(0),
    }


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """A neuron that only lengthens the residual stream, and two in a LayerNorm of two.

    In twelve equal documents, of which the first and the last are looked at: one chooses the largest
    neuron for the other.

    First: RMS final norm, logits of -x and x with x the first coordinate over S. Before the MLP the
    stream is (3, 0) and the first neuron adds (0, 4), so x = .6 sqrt 2 with it and sqrt 2 without,
    while with S held x does not move. Entropy is that of a coin of chance 1 / (1 + e^(-2x)).

    Second: a = (3/2, 1/2), so post = (1, -1) and the gain is 2; |a (a - m)| g^2 / N is 3/2 and 1/2.
    x is the first neuron's post (S constant by a large epsilon). Its mid at 0 with the norm held leaves
    1 - 2 * 3/2 = -2, with the norm live -1. The second neuron writes nothing and, gone, moves nothing.
    """

    def entropy(x: float) -> float:
        p = 1 / (1 + math.exp(-2 * x))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    def twice(value: float) -> list[float]:
        """At the first and the last document's one token after BOS that has a target."""
        return [nan, value, nan, *elsewhere, nan, value, nan]

    def loss(x: float) -> float:
        return math.log1p(math.exp(-2 * x))

    nan, elsewhere = math.nan, [math.nan] * 3 * (EVERY - 1)
    unembed = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    run = planted(torch.tensor([[[2.0, -2.0]] * 3] * (1 + EVERY)))  # of mean 0: as without centring
    run = replace(run, centres=False, readout=replace(run.readout, ln_centred=False, ln_eps=0.0))
    moved = abs(entropy(math.sqrt(2)) - entropy(0.6 * math.sqrt(2)))
    yield (
        with_readout(
            run,
            resid_mid=torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(3 * (1 + EVERY), 2),
            W_out=torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64),
            W_U=unembed,
        ),
        {
            "entropy: total effect": twice(moved / 2),
            "entropy: direct effect": twice(0),
            "entropy: through ln_final": twice(moved / 2),
            "log gain moved": [0] * 3 * (1 + EVERY),
            "loss: through the mid norm": twice(0),
            "largest mean TE - DE": moved,
            "mean TE - DE": -moved / 2,
            "largest share in W_U's null space": 1,
        },
    )
    run = planted(torch.tensor([[[1.5, 0.5]] * 3] * (1 + EVERY)), eps=1e-16)
    run = replace(run, readout=replace(run.readout, ln_centred=False, ln_eps=1e24))
    yield (
        with_readout(
            run,
            resid_mid=torch.zeros_like(run.resid_mid),
            W_out=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
            W_U=unembed * 1e12,
        ),
        {
            "log gain moved": [1] * 3 * (1 + EVERY),
            "loss: mid norm held": twice((loss(-2) - loss(1)) / 2),
            "loss: through the mid norm": twice((loss(-2) - loss(-1)) / 2),
            "entropy: through ln_final": twice(0),
            "log gain moved by the largest gain neuron": 1.5,
        },
    )


_AT = f"mean over neurons, at every {EVERY}th token"

PROBE = Probe(
    __doc__,
    gates=(
        Gate("entropy_neuron", "largest mean TE - DE", above=0.1),
        Gate("entropy_neuron", "excess of discovered entropy neurons", above=0.1),
        Gate("entropy_neuron", "mean TE - DE", below=-0.01),
        *(
            Gate(negative, quantity, within=0.001)
            for negative in ("uniform", "monosemantic")
            for quantity in (
                "largest mean TE - DE", "excess of discovered entropy neurons", "mean TE - DE",
            )
        ),
    ),
    tested="mean TE - DE",
    measure=measure,
    known=known,
    quantities={
        "entropy: total effect": Quantity("nats", f"|change of entropy| at post_j = 0, ln_final live, {_AT}"),
        "entropy: direct effect": Quantity("nats", f"the same with ln_final's scale frozen, {_AT}"),
        "entropy: through ln_final": Quantity("nats", f"|total - direct effect|, {_AT}"),
        "loss: mid norm held": Quantity(
            "nats", f"|change of loss| at mid_j = 0, the mid norm's mean and gain held, {_AT}"
        ),
        "loss: through the mid norm": Quantity(
            "nats", f"|the same with the mid norm live, less held|, {_AT}", more_smeared_when="higher"
        ),
        "log gain moved": Quantity(
            "log gain",
            "|a_j (a_j - m)| g^2 / N: to first order what removing a neuron does to the gain; mean over neurons",
            more_smeared_when="higher",
        ),
    },
    estimates={
        "largest mean TE - DE": Quantity(
            "nats",
            "mean over tokens, in its direction, of the neuron where it is largest on the other half of documents",
        ),
        "mean TE - DE": Quantity("nats", "over tokens and neurons"),
        "share of neurons confirmed as entropy neurons": Quantity(
            "share",
            "|TE - DE| - |DE| above 0 on one half of the documents (Benjamini-Hochberg, q = .05), and on the other "
            "(p < .05); mean over both ways",
        ),
        "excess of discovered entropy neurons": Quantity(
            "nats", "mean of |TE - DE| - |DE| on the other half of documents, of those discovered; 0 without any"
        ),
        "share of entropy effect through ln_final": Quantity(
            "share", "sum of |TE - DE| over that and sum of |DE|"
        ),
        "share of loss effect through the mid norm": Quantity(
            "share", "sum of |through the norm| over that and sum of |norm held|", more_smeared_when="higher"
        ),
        "log gain moved by the largest gain neuron": Quantity(
            "log gain", "mean over tokens, of the neuron with the largest; chosen on the other half of documents",
            more_smeared_when="higher",
        ),
        "largest share in W_U's null space": Quantity(
            "share", "of a neuron's squared norm in the lowest 1% of W_U's singular directions"
        ),
        "largest |correlation| with log unigram": Quantity(
            "correlation", "of what a neuron adds to logits, over the tokens of the text"
        ),
    },
    streams=("natural",),
    figures=(
        Figure("Entropy: the neuron that moves it most through ln_final", ("largest mean TE - DE",)),
        Figure(
            "How much goes through a norm",
            ("share of entropy effect through ln_final", "share of loss effect through the mid norm"),
        ),
        Figure("Excess of the entropy neurons discovered", ("excess of discovered entropy neurons",)),
        Figure("Entropy neurons confirmed", ("share of neurons confirmed as entropy neurons",)),
        Figure("Log gain moved by the largest gain neuron", ("log gain moved by the largest gain neuron",)),
        Figure(
            "Facts of the weights",
            ("largest share in W_U's null space", "largest |correlation| with log unigram"),
        ),
    ),
)  # fmt: skip
