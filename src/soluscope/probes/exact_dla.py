"""P17: Exactness of direct logit attribution

Direct logit attribution (DLA) divides a component's output by ln_final's scale with the component in place.
Without the component, that scale changes. The true direct effect is the change of the target's centred logit
when the component is removed and ln_final rescales.

Question:
    Does direct logit attribution give the true direct effect of the MLP and of each neuron?

Answers:
    above 0.5: Direct logit attribution is off by more than half of the MLP's true direct effect.
    0.01 to 0.5: Direct logit attribution is off by more than 1% of the MLP's true direct effect.
    below 0.01: Direct logit attribution gives the MLP's true direct effect, to within 1%.

Formula:
    NMAE = sum |DLA - true| / sum |true|;
    DLA = h W_out . u_y / S;
    true = (R.u_y) / S(R) - (R'.u_y) / S(R'), R' the residual stream without the component;
    in loss: removal with S frozen against removal with S live

Reading:
    An error of 0 means that ln_final's scale is the same with and without the component, so DLA is the causal
    effect. An error near 1 means that the component acts through the final norm rather than by writing to the
    logits. This concerns ln_final, not the mid norm: smearing predicts neither an error nor its absence. But
    where the error is large, evidence from DLA for or against smearing (P10) is weak.

Pitfalls:
    The direct effect is the effect of removal on the path to the unembedding alone; a one-layer model has no
    other path. Logits are centred over the vocabulary. A neuron that is small against the residual stream has
    a small error: the whole MLP is the harder case.

Source:
    Baroni et al. 2025 (arXiv 2507.02559): exact once the final LayerNorm is gone;
    protocol.md sections 7 P17 and 8.2
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.ablation import Ablation, loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Claim, Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import (
    contributions,
    final_scale,
    resid_final,
    target_direction,
    with_readout,
)
from soluscope.probes._estimates import correlation, ratio
from soluscope.probes._tokens import array, arrays, every_nth, scattered

EVERY = 7
"""Stride: neurons' losses are computed at every 7th token that is not BOS and has a target."""
TOLERANCE = 1e-6
"""Precision of a single neuron's change of loss, in nats."""
PARTS = {
    "MLP": "removal of the whole MLP's output, b_out kept",
    "neurons": "removal of each neuron alone, summed over neurons",
}


def measure(run: HookedRun) -> Measured:
    """Return attribution, true effect and error per token, and the errors as shares of the effects."""
    tokens = _errors(run)
    return Measured(tokens, tuple(_estimates(run, tokens)))


def _errors(run: HookedRun) -> dict[str, Tensor]:
    """Return attribution, true effect and their difference, per token; nan without a target.

    Logits are centred over the vocabulary. Losses are changes on removal (post set to 0): with
    ln_final's scale frozen, as DLA assumes, and with it live.

    Returns:
        For the MLP, signed values and the size of the error. For neurons, sums over neurons of the
        sizes of error and effect; the sums in loss are nan except at every `EVERY`-th scored token.
    """
    direction = target_direction(run)
    resid = resid_final(run)
    without = run.resid_mid + run.readout.b_out
    attributed = contributions(run)  # [token d_mlp]
    mlp = attributed.sum(-1)
    true_mlp = (direction * resid).sum(-1) / final_scale(run, resid)
    true_mlp = true_mlp - (direction * without).sum(-1) / final_scale(run, without)
    live, frozen = Ablation(run), Ablation(run, "frozen")
    counted = (run.target >= 0).nonzero().squeeze(-1)
    true = -live.target_logit(counted)  # [t d_mlp]
    nothing = torch.zeros_like(run.post)
    loss = loss_at_post(run, run.post)  # same code as the edited loss
    loss_live = loss_at_post(run, nothing) - loss
    loss_frozen = loss_at_post(run, nothing, "frozen") - loss
    some = every_nth(run, EVERY)
    neurons_live, neurons_frozen = (each.post(some, tolerance=TOLERANCE) for each in (live, frozen))
    return {
        "MLP: DLA": mlp,
        "MLP: direct effect": true_mlp,
        "MLP: error": (mlp - true_mlp).abs(),
        "MLP: effect": true_mlp.abs(),
        "neurons: error": scattered(run, counted, (attributed[counted] - true).abs().sum(-1)),
        "neurons: effect": scattered(run, counted, true.abs().sum(-1)),
        "MLP: error in loss": (loss_frozen - loss_live).abs(),
        "MLP: effect on loss": loss_live.abs(),
        "neurons: error in loss": scattered(
            run, some, (neurons_frozen - neurons_live).abs().sum(-1)
        ),
        "neurons: effect on loss": scattered(run, some, neurons_live.abs().sum(-1)),
    }


def _estimates(run: HookedRun, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield normalised mean absolute errors, and the correlation of DLA and direct effect, without BOS."""
    content = ~array(run.is_bos)
    columns = {name: values[content] for name, values in arrays(tokens).items()}
    string = array(run.string)[content]
    for part in PARTS:
        yield ratio(f"NMAE: {part}", columns[f"{part}: error"], columns[f"{part}: effect"], string)
        error, effect = columns[f"{part}: error in loss"], columns[f"{part}: effect on loss"]
        yield ratio(f"NMAE in loss: {part}", error, effect, string)
    yield correlation(
        "correlation of DLA and direct effect: MLP",
        columns["MLP: DLA"], columns["MLP: direct effect"], string,
    )  # fmt: skip


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a neuron that acts only through ln_final's scale, and a neuron under a constant final scale.

    Both runs have two dimensions, an RMS final norm, and a vocabulary of two tokens with logits -x and
    x; x is the first coordinate of the residual stream over S.

    First run: the residual stream before the MLP is (3, 0), and one neuron with activation 2 writes (0,
    4). So R = (3, 4) and S = 5 / sqrt 2; without the neuron S = 3 / sqrt 2. The neuron writes nothing
    that the logits read, so DLA is 0, and yet x is sqrt 2 without the neuron and .6 sqrt 2 with it.

    Second run: an epsilon of 1e24 keeps S constant (W_U is 1e12 times as large), and the neuron writes
    (1, 0). Both DLA and effect are 1.
    """
    run = planted(torch.tensor([[[2.0, -2.0]] * 3]))
    unembed = torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    resid = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(3, 2)
    norm_only = torch.tensor([[0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    rms = replace(run, readout=replace(run.readout, ln_centred=False, ln_eps=0.0))
    x, x_without = 0.6 * math.sqrt(2), math.sqrt(2)
    change = math.log1p(math.exp(-2 * x_without)) - math.log1p(math.exp(-2 * x))
    nan = math.nan
    yield (
        with_readout(rms, resid, W_out=norm_only, W_U=unembed),
        {
            "MLP: DLA": [0, 0, nan],
            "MLP: direct effect": [x - x_without, x - x_without, nan],
            "neurons: error": [x_without - x, x_without - x, nan],
            "neurons: effect": [x_without - x, x_without - x, nan],
            "MLP: effect on loss": [-change, -change, nan],
            "MLP: error in loss": [-change, -change, nan],
            "neurons: error in loss": [nan, -change, nan],  # BOS is not sampled
            "NMAE: MLP": 1,
        },
    )
    into_logits = torch.tensor([[0.5, 0.0], [0.0, 0.0]], dtype=torch.float64)
    constant = replace(rms, readout=replace(rms.readout, ln_eps=1e24))
    yield (
        with_readout(constant, resid, W_out=into_logits, W_U=unembed * 1e12),
        {
            "MLP: DLA": [1, 1, nan],
            "MLP: direct effect": [1, 1, nan],
            "MLP: error": [0, 0, nan],
            "neurons: error": [0, 0, nan],
            "MLP: error in loss": [0, 0, nan],
            "NMAE: MLP": 0,
        },
    )


PROBE = Probe(
    __doc__,
    gates=(
        Gate("entropy_neuron", "NMAE in loss: MLP", above=0.1),
        Gate("smear_shared", "NMAE: neurons", within=0.01),
        Gate("smear_shared", "NMAE: MLP", within=0.01),
    ),
    one_layer=True,
    tested="NMAE: MLP",
    claims=tuple(
        Claim(f"NMAE: {part}", f"Direct logit attribution is exact: {whole}.", within=1e-6)
        for part, whole in (("MLP", "of the whole MLP"), ("neurons", "of each neuron"))
    ),
    measure=measure,
    known=known,
    quantities={
        "MLP: DLA": Quantity(
            "logits", "the MLP's direct attribution to the target's centred logit"
        ),
        "MLP: direct effect": Quantity("logits", "the same logit minus its value without the MLP"),
        **{
            f"{part}: {what}": Quantity(unit, f"{meaning}; {whole}")
            for part, whole in PARTS.items()
            for what, unit, meaning in (
                ("error", "logits", "|DLA - direct effect|"),
                ("effect", "logits", "|direct effect|"),
                (
                    "error in loss",
                    "nats",
                    "|change of loss with final norm frozen - change with final norm live|",
                ),
                ("effect on loss", "nats", "|change of loss on removal| with final norm live"),
            )
        },
    },
    estimates={
        **{
            f"{what}: {part}": Quantity(
                "share of the effect", f"sum of errors over sum of effects; {whole}"
            )
            for what in ("NMAE", "NMAE in loss")
            for part, whole in PARTS.items()
        },
        "correlation of DLA and direct effect: MLP": Quantity("correlation", "over tokens"),
    },
    streams=("natural",),
    figures=(
        Figure("Error of DLA, as a share of the direct effect", ("NMAE: MLP", "NMAE: neurons")),
        Figure(
            "Error in loss, as a share of the effect on loss",
            ("NMAE in loss: MLP", "NMAE in loss: neurons"),
        ),
    ),
)
