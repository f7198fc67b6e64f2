"""P17: Exactness of direct logit attribution

Direct logit attribution (DLA) divides what a component writes by the scale that ln_final has with
the component in place. Without the component that scale is another: the true direct effect is the
change of the target's centred logit when the component is taken out and ln_final rescales.

Question:
    Does direct logit attribution give the true direct effect of the MLP and of each neuron?

Formula:
    NMAE = sum |DLA - true| / sum |true|;
    DLA = h W_out . u_y / S;
    true = (R.u_y) / S(R) - (R'.u_y) / S(R'), R' the residual stream without the part;
    in loss: removal with S frozen against removal with S live

Reading:
    An error of 0 means that ln_final's scale is the same with and without the part, and DLA can be
    read as cause. Near 1, a part acts through the final norm rather than through what it writes to
    the logits. This is about ln_final, not the mid norm: smearing neither predicts an error nor its
    absence, but where the error is large, DLA-based evidence for or against smearing (P10) is weak.

Pitfalls:
    The direct effect is what removal does on the path to the unembedding alone: with one layer
    there is no other. Logits are centred over the vocabulary. Errors of single neurons are small
    where each is small against the residual stream: the whole MLP is the harder case.

Source:
    Baroni et al. 2025 (arXiv 2507.02559): exact once the final LayerNorm is gone;
    science.md sections 7 P17 and 8.2
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
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._attribution import (
    contributions,
    final_scale,
    resid_final,
    target_direction,
    with_readout,
)
from soluscope.probes._estimates import correlation, ratio
from soluscope.probes._tokens import arrays, every_nth, scattered

EVERY = 7
"""Neurons' losses are computed at every 7th token that has a target."""
TOLERANCE = 1e-6
"""Nats: how exact a single neuron's change of loss must be."""
PARTS = {
    "MLP": "the whole MLP's output, b_out left in place",
    "neurons": "each neuron on its own, summed over neurons",
}


def measure(run: HookedRun) -> Measured:
    """Return attribution, true effect and error per token, and the errors as shares of the effects."""
    tokens = _errors(run)
    return Measured(tokens, tuple(_estimates(run, tokens)))


def _errors(run: HookedRun) -> dict[str, Tensor]:
    """Return attribution, true effect and the difference of the two, one value a token; nan without a target.

    Logits are centred over the vocabulary. Losses are the change on removal (post set to 0): with
    ln_final's scale frozen, which is what the attributed logits imply, and with it live.

    Returns:
        For the MLP the signed values and the size of the error; for neurons the sums over neurons of
        the sizes of error and effect; in loss at every `EVERY`-th token only.
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
    loss = loss_at_post(run, run.post)  # run.loss is fp32, whatever the model
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
    """Normalised mean absolute errors, and how DLA and effect go together, without BOS."""
    content = ~run.is_bos.numpy()
    columns = {name: values[content] for name, values in arrays(tokens).items()}
    string = run.string.numpy()[content]
    for part in PARTS:
        yield ratio(f"NMAE: {part}", columns[f"{part}: error"], columns[f"{part}: effect"], string)
        error, effect = columns[f"{part}: error in loss"], columns[f"{part}: effect on loss"]
        yield ratio(f"NMAE in loss: {part}", error, effect, string)
    yield correlation(
        "correlation of DLA and direct effect: MLP",
        columns["MLP: DLA"], columns["MLP: direct effect"], string,
    )  # fmt: skip


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Two dimensions, an RMS final norm, two tokens in the vocabulary with logits -x and x.

    The residual stream before the MLP is (3, 0), and one neuron with activation 2 writes (0, 4):
    R = (3, 4), S = 5 / sqrt 2; without it S = 3 / sqrt 2. x is the first coordinate over S, so the
    neuron writes nothing that the logits see, DLA is 0, and yet x is sqrt 2 without it and .6 sqrt 2
    with it. With S held constant by an epsilon of 1e24 (and W_U as much larger), the neuron writing
    (1, 0) has both DLA and effect 1.
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
            "neurons: error in loss": [nan, -change, nan],  # BOS is never looked at
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
    measure=measure,
    known=known,
    quantities={
        "MLP: DLA": Quantity(
            "logits", "the MLP's direct attribution to the target's centred logit"
        ),
        "MLP: direct effect": Quantity("logits", "the same logit less what it is without the MLP"),
        **{
            f"{part}: {what}": Quantity(unit, f"{meaning}; {whole}")
            for part, whole in PARTS.items()
            for what, unit, meaning in (
                ("error", "logits", "|DLA - direct effect|"),
                ("effect", "logits", "|direct effect|"),
                (
                    "error in loss",
                    "nats",
                    "|change of loss, final norm frozen, less the same with it live|",
                ),
                ("effect on loss", "nats", "|change of loss on removal, final norm live|"),
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
        Figure("The same in nats of loss", ("NMAE in loss: MLP", "NMAE in loss: neurons")),
    ),
)
