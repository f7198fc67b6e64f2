"""P4: Scale freeze

Question:
    Does the loss rise when every token gets the same gain instead of its per-token gain, and is it the gain of
    diffuse codes that matters?

Answers:
    above 0.001: The loss rises when every token gets the same gain; this number does not show that the gain of
        diffuse codes is the cause.
    -0.001 to 0.001: The loss stays the same when every token gets the same gain; where the MLP's output is far
        longer than the rest of the residual stream, this shows nothing about the mid norm.
    below -0.001: The loss falls when every token gets the same gain.

Formula:
    dL_t = l_t(g = c) - l_t(g = g_t), c = exp(mean log g) over tokens that are not BOS, or the
    constant with the lowest mean loss on the other documents;
    diffuse codes at the others' gain: the tokens whose K is at least the median and 4 get exp(mean log g) of the
    other tokens, which keep their gain; K = |a|^2 / max(a)^2;
    one gain for each neuron: g -> c_j = sum g a_j^2 / sum a_j^2 over the other documents;
    ln_final's scale live, or frozen at its value in the unchanged model;
    r0 + o: the residual stream after the MLP, o the part that g multiplies

Reading:
    A per-token gain that matters (H-dyn) predicts a rise under either constant. Smearing predicts it where
    diffuse codes get the others' gain. In a model whose tokens each use one neuron at different heights
    (`magnitude`), the constants cost loss and that edit costs nothing. If one gain for each neuron costs
    nothing, gamma can do what the per-token gain does (`disjoint`), and neither account holds. If a change is
    within .001 nats with ln_final live, and above with it frozen, ln_final renormalises each token: it does
    then what the mid norm does, and nothing follows about the mid norm. This is so where |o| / |r0| is far
    above 1: the direction of r0 + o turns by at most about |r0| / |o| when log g changes by 1. A model with one
    constant gain is unchanged by construction when frozen at its mean.

Pitfalls:
    A frozen model is off-distribution, so its cost overstates the need for a per-token scale (in a
    pilot twelvefold): only training a static arm decides whether that scale is needed. Gains of neurons are
    fitted to activations, not to the loss: a cost does not show that no gamma suffices. The best constant is
    estimated from the other documents; the error of that estimate alone changes the loss of the demo's static
    arms by -.0002 to .0004 nats, close to the margin of .001. If all codes are equally diffuse, no token has
    another kind's gain to take, and that number is missing.

Source:
    protocol.md sections 7 P4 and 8.4; Heimersheim 2024 for freezing
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.ablation import (
    FINAL_NORMS,
    FinalNorm,
    log_best_gain_on_others,
    loss_at_gain,
    loss_at_post,
)
from soluscope.hooked.activations import HookedRun, planted
from soluscope.hooked.output_size import output_size
from soluscope.probes import Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._tokens import diffuse
from soluscope.results import SCALED_SIZE


def measure(run: HookedRun) -> Measured:
    """Return the change of each token's loss, in nats, under other gains, and the share of the MLP's output.

    The first constant is the geometric mean over tokens that are not BOS. BOS gets it too, since freezing
    BOS at its own gain, which never varies, would change nothing. The second is the constant with the
    lowest mean loss over tokens that are not BOS, chosen for each string on all other strings.

    Returns:
        Each change with ln_final live, and with ln_final's scale frozen at its value in the unchanged model.
        Diffuse codes at the others' gain: 0 at tokens that keep their gain, so that the mean is the part of the
        mean loss; nan at BOS, and everywhere if all codes are diffuse.
    """
    log_gain = run.gain.double().log()
    geomean = torch.full_like(log_gain, float(run.mean_log_gain))
    others = _others_gain(run)
    columns: dict[str, Tensor] = {}
    for final_norm, how in FINAL_NORMS.items():
        best = log_best_gain_on_others(run, final_norm)
        gains = torch.stack([log_gain, geomean, best, others.nan_to_num(0.0)], dim=-1).exp()
        losses = loss_at_gain(run, gains.to(run.post.dtype), final_norm).double()
        changes = losses[:, 1:] - losses[:, :1]
        columns |= {
            f"frozen at geometric mean{how}": changes[:, 0],
            f"frozen at best constant{how}": changes[:, 1],
            f"{DIFFUSE_CODES}{how}": changes[:, 2].where(~others.isnan(), torch.nan),
            f"{PER_NEURON}{how}": _with_gain_per_neuron(run, final_norm),
        }
        if final_norm == "live":
            # Mean of live and frozen loss: sorting by either alone would sort its noise into the change.
            columns["surprisal"] = (losses[:, 0] + losses[:, 1]) / 2
    size = output_size(run)
    columns |= {MLP_SIZE: size.whole, SCALED_SIZE: size.scaled}
    return Measured(columns | {"gain": run.gain, "k_eff": run.k_eff})


def _others_gain(run: HookedRun) -> Tensor:
    """Return the log gain of each token after diffuse codes get the others' geometric mean gain. [token]

    Returns:
        nan at BOS, and at every token if all codes are diffuse.
    """
    log_gain = run.gain.double().log()
    spread, content = diffuse(run), ~run.is_bos
    if not content.any() or spread[content].all():
        return torch.full_like(log_gain, torch.nan)
    given = log_gain[content & ~spread].mean()
    return torch.where(spread, given, log_gain).where(content, torch.nan)


def _with_gain_per_neuron(run: HookedRun, final_norm: FinalNorm) -> Tensor:
    """Return the change of loss when each neuron has one gain for all tokens, in nats. [token]

    A neuron's gain is the mean of g weighted by its a^2 over all strings except the token's, BOS left out; the
    geometric mean of g for a neuron that is 0 there. The mean over neurons is subtracted before the gains are
    applied, as gamma is.
    """
    _, owner = run.string.unique(return_inverse=True)
    content = ~run.is_bos
    weight = run.mid.double().square()
    sums = [
        weight.new_zeros(int(owner.max()) + 1, weight.shape[1]).index_add_(
            0, owner[content], part[content]
        )
        for part in (run.gain.double()[:, None] * weight, weight)
    ]
    top, bottom = (each.sum(0) - each if len(each) > 1 else each for each in sums)  # [string d_mlp]
    least = 1e-12 * float(bottom.max())
    gains = torch.where(bottom > least, top / bottom, run.mean_log_gain.exp())
    out = run.readout
    post = (out.gamma * gains[owner] * run.centred + out.beta).to(run.post.dtype)
    live, edited = (loss_at_post(run, each, final_norm).double() for each in (run.post, post))
    return edited - live


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield an MLP that writes nothing, and one that writes the sum of 8 neurons' sizes.

    In the second, token D has |a| = 1 on all 8 neurons (K = 8, gain 1) and token P has |a| = 3 on the first two (K
    = 2, gain 2/3); half the neurons have each sign, and logits and the loss depend on the summed size of n, 8 at D
    and 4 at P: loss log(1 + 3^(sum / 8)). At P's gain D has 2/3 of its sum. The first two neurons' gain is (1 * 1
    + 9 * 2/3) / (1 + 9) = .7 and the others' is 1, so D has the sum 2 * .7 + 6 = 7.4.
    """
    mid = torch.tensor([[[3.0, -3.0], [1.0, -1.0], [2.0, -2.0]]]).expand(4, 3, 2)
    run = planted(mid, eps=1e-12)
    unchanged = {name: [0, 0, math.nan] * 4 for name in _FREEZES}
    unchanged[DIFFUSE_CODES] = [math.nan, 0, math.nan] * 4
    yield run, unchanged | {"gain": [1 / 3, 1, 1 / 2] * 4}

    signs = torch.tensor([1.0, -1.0] * 4)
    peaked = torch.tensor([3.0, -3.0] + [0.0] * 6)
    run = planted(torch.stack([peaked, signs, peaked]).expand(2, 3, 8), eps=1e-12)
    unembed = 1e6 * math.log(3) / 8 * torch.stack([signs, 0 * signs], dim=-1).double()
    readout = replace(run.readout, W_out=torch.eye(8).double(), ln_eps=1e12, W_U=unembed)
    run = replace(run, readout=readout, resid_mid=torch.zeros_like(run.resid_mid) + signs / 4)

    def change(share: float, before: float = 1.0) -> float:
        return math.log1p(3**share) - math.log1p(3**before)

    bos = math.nan, change(4.2 / 8 + 0.25, 4 / 8 + 0.25)
    yield (
        run,
        {
            "k_eff": [2, 8, 2] * 2,
            DIFFUSE_CODES: [bos[0], change(2 / 3 + 0.25, 1.25), math.nan] * 2,
            PER_NEURON: [bos[1], change(7.4 / 8 + 0.25, 1.25), math.nan] * 2,
            MLP_SIZE: [4, 4, 4] * 2,
        },
    )


DIFFUSE_CODES = "diffuse codes at the others' gain"
PER_NEURON = "one gain for each neuron"
MLP_SIZE = "|mlp_out| / |resid_mid|"
_FREEZES = {
    "frozen at geometric mean": "loss with one gain for all tokens, exp(mean log gain), minus loss as it is",
    "frozen at best constant": "the same at the constant with the lowest loss on all other documents",
    DIFFUSE_CODES: "the part of the mean loss that diffuse codes lose with the mean gain of the other tokens",
    PER_NEURON: "loss with one gain for all tokens for each neuron, its mean weighted by a^2, minus loss as it is",
}

PROBE = Probe(
    __doc__,
    gates=(
        *(
            Gate(positive, f"frozen at {constant}{how}", above=0.1)
            for positive in ("smear_shared", "ceiling", "magnitude")
            for constant in ("geometric mean", "best constant")
            for how in FINAL_NORMS.values()
        ),
        Gate("disjoint", "frozen at geometric mean", above=0.1),
        *(
            Gate(positive, f"{DIFFUSE_CODES}{how}", above=0.1)
            for positive in ("smear_shared", "smear_graded", "ceiling")
            for how in FINAL_NORMS.values()
        ),
        *(
            Gate(positive, PER_NEURON, above=0.1)
            for positive in ("smear_shared", "ceiling", "magnitude")
        ),
        Gate("disjoint", PER_NEURON, within=0.001),
        *(
            Gate(negative, DIFFUSE_CODES, within=0.001)
            for negative in ("magnitude", "pinned", "absorbed")
        ),
        *(
            Gate(negative, f"frozen at {constant}{how}", within=0.001)
            for negative in ("pinned", "uniform")
            for constant in ("geometric mean", "best constant")
            for how in FINAL_NORMS.values()
        ),
        *(
            Gate("absorbed", f"frozen at {constant}", within=0.001)
            for constant in ("geometric mean", "best constant")
        ),
        # ln_final does in `swallowed` what the mid norm does: freezing costs nothing, unless ln_final is frozen.
        Gate("swallowed", "frozen at geometric mean", within=0.001),
        Gate("swallowed", "frozen at geometric mean, final norm frozen", above=0.1),
        Gate("swallowed", SCALED_SIZE, above=100.0),
        Gate("smear_shared", SCALED_SIZE, below=0.01),
    ),
    one_layer=True,
    one_scale=True,
    tested="frozen at best constant",
    measure=measure,
    known=known,
    quantities={
        **{
            f"{name}{how}": Quantity(
                "nats",
                meaning + how,
                split_by=("gain", "k_eff", "surprisal"),
                more_smeared_when="higher" if name == DIFFUSE_CODES else "neither",
            )
            for how in FINAL_NORMS.values()
            for name, meaning in _FREEZES.items()
        },
        MLP_SIZE: Quantity(
            "ratio", "norm of the MLP's output over the norm of the stream before it", ("median", "q05", "q95")
        ),
        SCALED_SIZE: Quantity(
            "ratio",
            "norm of the part of the stream that the gain multiplies over that of the rest, as ln_final centres",
            ("median", "q05", "q95"),
            on_ladders="number",
        ),
    },
    streams=("natural",),
    figures=(
        Figure("Change of loss with another gain", tuple(_FREEZES)),
        Figure(
            "Change of loss with another gain, ln_final's scale frozen",
            tuple(f"{name}, final norm frozen" for name in _FREEZES),
        ),
        Figure(
            "BOS alone: its loss at the other tokens' geometric mean gain minus its loss at its own gain",
            ("frozen at geometric mean",),
            positions="BOS",
        ),
        Figure(
            "Change of loss at the geometric mean, by quartile of the token's gain",
            ("frozen at geometric mean",),
            group="gain",
        ),
    ),
)  # fmt: skip
