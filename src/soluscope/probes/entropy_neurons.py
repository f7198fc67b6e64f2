"""P19: Entropy, frequency and gain neurons

An entropy neuron writes in directions that the unembedding hardly reads. It lengthens the residual stream, so
ln_final divides by a larger scale and all logits shrink. A frequency neuron pushes logits along the log
unigram. A gain neuron is the analogue at the mid norm: its effect on the mid LayerNorm's gain, and so on all
other neurons, exceeds the effect of its output on the logits.

Question:
    Are there neurons that act by changing a norm's scale rather than by writing to the logits?

Answers:
    above 0.001: Neurons act through ln_final's scale: when a neuron is removed, the change of that scale raises
        the entropy, on average over neurons.
    -0.001 to 0.001: On average over neurons, the change of ln_final's scale when a neuron is removed does not
        change the entropy; single neurons may still act this way.
    below -0.001: Neurons act through ln_final's scale: when a neuron is removed, the change of that scale
        lowers the entropy, on average over neurons.

Formula:
    TE - DE: change of entropy at post_j = 0 with ln_final live, minus the change with its scale frozen;
    LogitVar_j = Var_v cos(w_j, u_v);
    null share = |w_j on W_U's lowest singular directions|^2 / |w_j|^2;
    log gain moved = |a_j (a_j - m)| g^2 / N, summed over neurons;
    steering = N times that of the largest neuron over that sum;
    loss through the mid norm = change of loss at mid_j = 0 with the mid norm live (8.5), minus the change
    with it held (8.2)

Reading:
    Removing an entropy neuron changes the entropy with ln_final live, but not with its scale frozen: TE - DE
    is nonzero, and most of the neuron's row of W_out lies where W_U hardly reads. This effect is ln_final's,
    not the mid norm's, and must vanish where ln_final's scale is constant. Gain neurons act through the mid
    norm. The log gain that all neurons of a token move together is r, apart from signs, whatever their number;
    where it is near 0 no neuron affects the others through the gain. Steering compares the largest neuron with
    the mean one: near 1, no neuron moves the gain more than others do. Compare the weights' facts with the
    untrained model, whose random rows of W_out have correlations with the log unigram of .6 too.

Pitfalls:
    A one-layer model has few such neurons. Post is set to 0, LayerNorm's mean; Stolfo et al. use the mean
    over texts. A neuron counts as discovered if its effect through ln_final exceeds its direct effect, even
    if both are small: read the largest effect too. W_out is not folded: it is used without the mid norm's
    gamma and centring.

Source:
    Stolfo et al. 2024 (arXiv 2406.16254); Gurnee et al. 2024 (arXiv 2401.12181); protocol.md section 7 P19
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
from soluscope.probes import Claim, Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import with_readout
from soluscope.probes._estimates import ratio, sums_by_string
from soluscope.probes._features import folds
from soluscope.probes._tokens import array, arrays, every_nth, scattered

EVERY = 11
"""Stride: all neurons are ablated at every 11th token that is not BOS and has a target."""
STEERING = "steering: largest gain neuron over the mean"
TOLERANCE = 1e-6
"""Nats: the precision of a change of loss, and the largest excess that counts as rounding error."""
NULL_SHARE = 0.01
"""Share of W_U's singular directions, the lowest of them, that counts as its null space."""
Q = 0.05


@dataclass(frozen=True)
class Effects:
    """Effects of ablating every neuron at some of the tokens; each tensor but `tokens` is [t d_mlp], in nats."""

    tokens: Tensor
    total: Tensor
    """TE: change of entropy with post_tj at 0, ln_final live."""
    direct: Tensor
    """DE: change of entropy with post_tj at 0, ln_final's scale frozen."""
    loss: Tensor
    """Change of loss with mid_tj at 0, the mid norm's mean and gain held (8.2)."""
    loss_through: Tensor
    """Change of loss with mid_tj at 0, the mid norm live (8.5), minus `loss`."""


def effects(run: HookedRun) -> Effects:
    """Return the effects of all (token, neuron) ablations that the probe uses."""
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
    """Return how far each neuron moves its token's log gain, to first order, [token d_mlp].

    This is |a_j dlog g/da_j| = |a_j (a_j - m)| g^2 / N. It is 0 where the gain is one constant; m is 0
    in a norm that does not centre.
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

    All columns except the effect on the gain are nan except at every `EVERY`-th scored token.
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
    return columns | {"log gain moved": gain_elasticity(run).sum(-1)}


def _estimates(
    run: HookedRun, at: Effects, facts: dict[str, Tensor], tokens: dict[str, Tensor]
) -> Iterator[Estimate]:
    """Yield the largest neuron's means, results on discovered neurons, shares, and facts about the weights."""
    if not len(at.tokens):
        return
    columns = arrays(tokens)
    string = array(run.string[at.tokens])
    through = array(at.total - at.direct)
    yield _of_the_largest("largest mean TE - DE", through, array(at.tokens), run)
    yield ratio("mean TE - DE", through.mean(-1), np.ones(len(through)), string)
    yield from _of_the_discovered(at, run)
    content = (~run.is_bos).nonzero().squeeze(-1)
    moved = array(gain_elasticity(run)[content])
    if moved.any():
        yield _of_the_largest(STEERING, moved, array(content), run, over=moved.mean(-1))
    for name, through_norm, otherwise in (
        ("entropy effect through ln_final", "entropy: through ln_final", "entropy: direct effect"),
        ("loss effect through the mid norm", "loss: through the mid norm", "loss: mid norm held"),
    ):
        part, rest = columns[through_norm], columns[otherwise]
        yield ratio(f"share of {name}", part, part + rest, array(run.string))
    for name, column in _WEIGHTS.items():
        values = column(facts)
        if values.isfinite().any():
            yield _fact(name, values[values.isfinite()].max().item(), len(values))


def _fact(quantity: str, value: float, n: int) -> Estimate:
    """Return an estimate with one row, and so without an interval.

    It holds a fact about the weights, or a number of discoveries, which resampling would inflate.
    """
    return Estimate(quantity, np.array([[value]]), lambda sums: sums[:, 0], n)


def _halves(
    tokens: NDArray[np.intp], run: HookedRun
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield masks of the choosing tokens and of the measuring tokens, each [t], for both folds of the documents."""
    among = np.zeros(len(run.pos), dtype=bool)
    among[tokens] = True
    for chosen, measured in folds(run, among):
        yield chosen[tokens], measured[tokens]


def _of_the_largest(
    quantity: str,
    values: NDArray[np.float64],
    tokens: NDArray[np.intp],
    run: HookedRun,
    over: NDArray[np.float64] | float = 1.0,
) -> Estimate:
    """Return the mean over tokens of the neuron with the largest |mean|, signed by that mean, over that of `over`.

    The neuron and the sign are chosen on the other half of the documents, so the expected value without
    any effect is 0.

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
    return ratio(quantity, result, result * 0 + over, array(run.string)[tokens])


def _of_the_discovered(at: Effects, run: HookedRun) -> Iterator[Estimate]:
    """Yield the share of neurons discovered and confirmed, and the discovered neurons' excess.

    Neurons are discovered on one half of the documents and confirmed on the other. The excess is the
    other half's mean of |TE - DE| - |DE| over the discovered neurons; it is 0 if no neuron is discovered.
    """
    excess, string = _excess(at), array(run.string[at.tokens])
    n_confirmed, kept = [], np.zeros(len(excess))
    for chosen, measured in _halves(array(at.tokens), run):
        discovered = _discovered(excess[chosen], string[chosen])
        again = np.zeros_like(discovered)
        if measured.any():  # a single document has no other half
            again = (excess[measured].mean(0) > 0) & (_p(excess[measured], string[measured]) < Q)
        n_confirmed.append((discovered & again).mean())
        if discovered.any():
            kept[measured] = excess[measured][:, discovered].mean(-1)
    yield _fact(
        "share of neurons confirmed as entropy neurons", float(np.mean(n_confirmed)), len(excess)
    )
    yield ratio("excess of discovered entropy neurons", kept, np.ones(len(kept)), string)


def _excess(at: Effects) -> NDArray[np.float64]:
    """Return |TE - DE| - |DE|, [t d_mlp]: each neuron's effect through ln_final minus its direct effect."""
    values: NDArray[np.float64] = array((at.total - at.direct).abs() - at.direct.abs())
    return values


def _p(excess: NDArray[np.float64], string: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each neuron's two-sided p over strings for a mean of 0, [d_mlp]; nan with too few strings."""
    sums, _ = sums_by_string([np.ones(len(excess)), *excess.T], string)
    return mean_p(sums[:, 1:], sums[:, 0])


def _discovered(excess: NDArray[np.float64], string: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each neuron's mean excess is above 0, [d_mlp].

    The test is Benjamini-Hochberg at q = .05, and the mean must also exceed `TOLERANCE`.
    """
    if not len(excess):
        return np.zeros(excess.shape[1], dtype=bool)
    felt: NDArray[np.bool_] = excess.mean(0) > TOLERANCE
    return felt & (benjamini_hochberg(_p(excess, string)) < Q)


def weights(run: HookedRun) -> dict[str, Tensor]:
    """Return facts about each neuron's weights, [d_mlp] each; they need no activations.

    W_U includes ln_final's weights, is projected by ln_final's centring, and is centred over the
    vocabulary. Its null space is then the directions that no probability reads. The rows of W_out are
    projected by the same centring; the mid norm's gamma and centring are not folded into them.

    Returns:
        The norm of the row of W_out, unprojected; LogitVar, the variance over the vocabulary of the
        row's cosine with W_U's columns; the share of the row's squared norm in the lowest 1% (at least
        one) of W_U's singular directions, and in the directions past the knee, which is the largest
        drop among the lower half of the log singular values; the correlation of the neuron's effect on
        the logits with the log unigram, over the tokens that occur in the run (nan if fewer than
        three).
    """
    out = run.readout
    d_model = len(out.W_U)
    W = out.W_out.double()
    U = out.W_U.double() * out.ln_w.double()[:, None]
    if out.ln_centred:
        # An orthonormal basis of the residual stream without (1, ..., 1), which centring removes.
        unit_vectors = torch.eye(d_model, dtype=torch.float64, device=run.device)
        basis = torch.linalg.qr(torch.cat([W.new_ones(d_model, 1), unit_vectors[:, 1:]], 1))
        W, U = W @ basis.Q[:, 1:], basis.Q[:, 1:].T @ U
    U = U - U.mean(-1, keepdim=True)
    norm = W.norm(dim=-1)
    unit = W / norm[:, None]
    length = U.norm(dim=0)
    cosine = (unit @ U)[:, length > 0] / length[length > 0]
    left, spectrum = _singular(U)
    share = (unit @ left).square()  # [d_mlp direction], the largest singular value first
    # Singular values below 1e-7 of the largest are rounding errors, since they come from U U^T.
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
    """Return all left singular directions [d d] and values [d], the largest first; from U U^T, which is small."""
    values, directions = torch.linalg.eigh(U @ U.T)
    return directions.flip(-1), values.flip(-1).clamp(min=0).sqrt()


def _with_unigram(added: Tensor, run: HookedRun) -> Tensor:
    """Return the correlation of each neuron's effect on the logits with log token counts, over the vocabulary."""
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
    """Return facts about the weights, mean effects, and the adjusted p of |TE - DE| - |DE|."""
    excess, string = _excess(at), array(run.string[at.tokens])
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
    """Yield a neuron that only lengthens the residual stream, and two neurons in a LayerNorm.

    Each run has twelve equal documents. Only the first and the last are sampled, and each chooses the
    largest neuron for the other.
    """
    yield _lengthening()
    yield _in_a_layer_norm()


_N_PLANTED = 1 + EVERY
"""Number of documents in a planted run, each BOS and two tokens, of which one has a target."""
_UNEMBED = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
"""Logits -x and x, with x the first coordinate of the residual stream over S."""


def _lengthening() -> tuple[HookedRun, dict[str, Any]]:
    """Return an RMS final norm and a neuron that no logit reads, with the neuron's effects.

    Before the MLP the residual stream is (3, 0) and the first neuron adds (0, 4). So x = .6 sqrt 2 with the
    neuron and sqrt 2 without it, and with S held x does not change. The entropy is that of a coin with
    probability 1 / (1 + e^(-2x)).
    """

    def entropy(x: float) -> float:
        p = 1 / (1 + math.exp(-2 * x))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    run = planted(torch.tensor([[[2.0, -2.0]] * 3] * _N_PLANTED))  # mean 0: centring has no effect
    run = replace(run, centres=False, readout=replace(run.readout, ln_centred=False, ln_eps=0.0))
    run = with_readout(
        run,
        resid_mid=torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(3 * _N_PLANTED, 2),
        W_out=torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64),
        W_U=_UNEMBED,
    )
    moved = abs(entropy(math.sqrt(2)) - entropy(0.6 * math.sqrt(2)))
    return run, {
        "entropy: total effect": _sampled(moved / 2),
        "entropy: direct effect": _sampled(0),
        "entropy: through ln_final": _sampled(moved / 2),
        "log gain moved": [0] * 3 * _N_PLANTED,
        "loss: through the mid norm": _sampled(0),
        "largest mean TE - DE": moved,
        "mean TE - DE": -moved / 2,
        "largest share in W_U's null space": 1,
    }


def _in_a_layer_norm() -> tuple[HookedRun, dict[str, Any]]:
    """Return two neurons in a LayerNorm, with their effects.

    a = (3/2, 1/2), so post = (1, -1) and the gain is 2; |a (a - m)| g^2 / N is 3/2 and 1/2. x is the first
    neuron's post, and a large epsilon keeps S constant. Setting the first neuron's mid to 0 gives
    x = 1 - 2 * 3/2 = -2 with the norm held, and x = -1 with the norm live. The second neuron writes nothing,
    and removing it changes nothing.
    """

    def loss(x: float) -> float:
        return math.log1p(math.exp(-2 * x))

    run = planted(torch.tensor([[[1.5, 0.5]] * 3] * _N_PLANTED), eps=1e-16)
    run = replace(run, readout=replace(run.readout, ln_centred=False, ln_eps=1e24))
    run = with_readout(
        run,
        resid_mid=torch.zeros_like(run.resid_mid),
        W_out=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        W_U=_UNEMBED * 1e12,
    )
    return run, {
        "log gain moved": [2] * 3 * _N_PLANTED,
        "loss: mid norm held": _sampled((loss(-2) - loss(1)) / 2),
        "loss: through the mid norm": _sampled((loss(-2) - loss(-1)) / 2),
        "entropy: through ln_final": _sampled(0),
        STEERING: 1.5,
    }


def _sampled(value: float) -> list[float]:
    """Return a planted run's column with `value` at the one scored token of the first and of the last document."""
    nan = math.nan
    return [nan, value, nan, *[nan] * 3 * (_N_PLANTED - 2), nan, value, nan]


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
    one_scale=True,
    tested="mean TE - DE",
    claims=(
        Claim(
            "share of entropy effect through ln_final",
            "Entropy neurons are inactive: no effect on the entropy passes through ln_final's scale.",
            within=1e-6,
        ),
        Claim(
            "excess of discovered entropy neurons",
            "Entropy neurons are inactive: none is discovered, or those discovered have no excess.",
            within=1e-6,
        ),
    ),
    measure=measure,
    known=known,
    quantities={
        "entropy: total effect": Quantity("nats", f"|change of entropy| at post_j = 0 with ln_final live, {_AT}"),
        "entropy: direct effect": Quantity("nats", f"the same with ln_final's scale frozen, {_AT}"),
        "entropy: through ln_final": Quantity("nats", f"|total - direct effect|, {_AT}"),
        "loss: mid norm held": Quantity(
            "nats", f"|change of loss| at mid_j = 0 with the mid norm's mean and gain held, {_AT}"
        ),
        "loss: through the mid norm": Quantity(
            "nats", f"|change of loss with the mid norm live - change with it held|, {_AT}",
            more_smeared_when="higher",
        ),
        "log gain moved": Quantity(
            "log gain",
            "|a_j (a_j - m)| g^2 / N: first-order effect of removing a neuron on log gain; sum over neurons",
        ),
    },
    estimates={
        "largest mean TE - DE": Quantity(
            "nats",
            "mean over tokens of the neuron with the largest |mean|; neuron and sign chosen on the other half of "
            "documents",
        ),
        "mean TE - DE": Quantity("nats", "mean over tokens and neurons"),
        "share of neurons confirmed as entropy neurons": Quantity(
            "share",
            "|TE - DE| - |DE| above 0 on one half of the documents (Benjamini-Hochberg, q = .05) and on the other "
            "half (p < .05); mean over both assignments of the halves",
        ),
        "excess of discovered entropy neurons": Quantity(
            "nats",
            "mean of |TE - DE| - |DE| over discovered neurons, on the other half of documents; 0 if there is none",
        ),
        "share of entropy effect through ln_final": Quantity(
            "share", "sum of |TE - DE| over sum of (|TE - DE| + |DE|)"
        ),
        "share of loss effect through the mid norm": Quantity(
            "share", "sum of |through the norm| over sum of (|through the norm| + |norm held|)",
            more_smeared_when="higher",
        ),
        STEERING: Quantity(
            "ratio",
            "log gain moved by the neuron with the largest mean, chosen on the other half of documents, over the "
            "mean over neurons; 1 if all neurons move it alike, d_mlp if one alone does",
        ),
        "largest share in W_U's null space": Quantity(
            "share", "largest share of a neuron's squared norm in the lowest 1% of W_U's singular directions"
        ),
        "largest |correlation| with log unigram": Quantity(
            "correlation", "of a neuron's effect on the logits with the log unigram, over the tokens of the text"
        ),
    },
    streams=("natural",),
    figures=(
        Figure("Entropy: the neuron with the largest effect through ln_final", ("largest mean TE - DE",)),
        Figure(
            "Share of the effects that acts through a norm",
            ("share of entropy effect through ln_final", "share of loss effect through the mid norm"),
        ),
        Figure("Excess of the discovered entropy neurons", ("excess of discovered entropy neurons",)),
        Figure("Share of neurons confirmed as entropy neurons", ("share of neurons confirmed as entropy neurons",)),
        Figure("Log gain moved by the largest neuron over that of the mean neuron", (STEERING,)),
        Figure(
            "Facts about the weights",
            ("largest share in W_U's null space", "largest |correlation| with log unigram"),
        ),
    ),
)  # fmt: skip
