"""P22: Blocked norm

Elhage et al. split SoLU and its LayerNorm into blocks of neurons. Here the trained model is kept, and only
its gain is computed separately for each block. A block whose separate gain equals the joint gain is
unchanged.

Question:
    Do blocks of the hidden layer have different gains, and does the loss depend on the blocks sharing one
    gain?

Answers:
    above 0.001: The loss rises when each of four blocks of neurons uses its own gain in place of the joint
        gain.
    -0.001 to 0.001: For the loss, separate gains of four blocks of neurons are as good as the joint gain.
    below -0.001: The loss falls when each of four blocks of neurons uses its own gain in place of the joint
        gain.

Formula:
    g_b = (s2_b + eps)^(-1/2), with s2_b and m_b the variance and the mean over the block's neurons;
    post' = gamma (g_b (a - m_b) + g (m_b - m)) + beta;
    dL_t = l_t(post') - l_t

Reading:
    With a joint gain, the activations of other blocks amplify or attenuate a block that is silent at a token:
    smearing across blocks. Then gains differ between the blocks of a token, and the loss rises when each block
    uses its own gain. A change within .001 nats means that separate gains serve the loss as well as one gain
    for all neurons. A norm that epsilon pins has the same gain in every block. The loss also rises where other
    values of gamma could replace the joint gain (C2, `disjoint`). Only training a static arm shows whether a
    per-token gain is needed.

Pitfalls:
    The softmax stays joint. Blocks are cut in the order of the neurons: in a model that was trained without
    blocks they have no meaning, and gains differ between them by chance. A model that is retrained with
    blocks has the dose eps (N / b)^2, not eps N^2. A silent block has gain eps^(-1/2), but nothing to
    amplify.

Source:
    Elhage et al. 2022, section 4.4; protocol.md section 7 P22
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.ablation import disjoint_mean, loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Figure, Gate, Measured, Probe, Quantity

N_BLOCKS = (4, 8)
COLUMNS = {
    "sd of log g": ("log gain", "standard deviation of log g_b over the {} blocks of a token"),
    "own gains": ("nats", "loss with each of {} blocks at its own gain, minus the unedited loss"),
    "own gains, matched": (
        "nats",
        "the same, with each of {} blocks times one constant that keeps its output rms",
    ),
}


def measure(run: HookedRun) -> Measured:
    """Measure the spread of the blocks' gains, and the change of each token's loss under separate gains.

    The constants that match a block's rms are means over all other strings, without BOS. Gamma could
    absorb such a constant, so its effect is not that of a per-token gain.

    Returns:
        nan where the norm is not a LayerNorm with an epsilon, and where d_mlp cannot be cut into blocks
        of equal size, with at least two neurons each.
    """
    nothing = torch.full_like(run.loss, torch.nan, dtype=torch.float64)
    values: dict[str, Tensor] = {}
    for n_blocks in N_BLOCKS:
        even = run.mid.shape[-1] % n_blocks == 0 and run.mid.shape[-1] > n_blocks
        possible = even and run.eps is not None and run.centres
        columns = _columns(run, n_blocks) if possible else [nothing] * len(COLUMNS)
        named = [f"{name}, {n_blocks} blocks" for name in COLUMNS]
        values |= dict(zip(named, columns, strict=True))
    return Measured(values)


def _columns(run: HookedRun, n_blocks: int) -> list[Tensor]:
    """Return the three `COLUMNS`, each [token]."""
    mid = run.mid.double().unflatten(-1, (n_blocks, -1))  # [token block neuron]
    gamma = run.readout.gamma.double().view(n_blocks, -1)
    deviation = mid - mid.mean(-1, keepdim=True)
    variance = deviation.square().mean(-1)
    block_gain = (variance + run.eps).rsqrt()  # [token block]
    joint = run.gain.double()[:, None]
    rms_of = (
        replace(run, post=(joint.square() * variance)),
        replace(run, post=block_gain.square() * variance),
    )
    before, after = (disjoint_mean(each, "post") for each in rms_of)
    match = (before / after).where(after != 0, 1.0).sqrt()  # 0 if a block is always silent
    loss = loss_at_post(run, run.post)
    changes = []
    for gain in (block_gain, match * block_gain):
        added = gamma * (gain - joint)[..., None] * deviation
        changed = run.post + added.flatten(-2)
        changes.append(loss_at_post(run, changed.to(run.post.dtype)) - loss)
    return [block_gain.log().std(-1, correction=0), *changes]


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a LayerNorm with eight neurons in four blocks, and the same activations under a constant gain.

    Two blocks of two neurons are at 1 +- 1 and two at 1 +- 3, so s2_b is 1 or 9. eps is nearly 0, so
    log g_b is 0 in half of the blocks and -log 3 in the other half. Eight blocks would have one neuron
    each, and a constant gain has no epsilon: both give nan.
    """
    token = torch.tensor([2.0, 0, 2, 0, 4, -2, 4, -2])
    nothing = [math.nan] * 6
    yield (
        planted(token.expand(2, 3, 8), eps=1e-15),
        {
            "sd of log g, 4 blocks": [math.log(3) / 2] * 6,
            "own gains, 4 blocks": [0, 0, math.nan] * 2,  # W_out is zero
            "own gains, matched, 4 blocks": [0, 0, math.nan] * 2,
            "sd of log g, 8 blocks": nothing,
        },
    )
    yield (
        planted(token.expand(2, 3, 8), gain=2.0),
        {f"sd of log g, {n} blocks": nothing for n in N_BLOCKS},
    )


PROBE = Probe(
    __doc__,
    gates=(
        # At an A token (47% of tokens) one of 4 blocks has s2_b = 7/64 12^2 and the other three 0: log g_b is
        # -1.38 once and 13.8 three times, an sd of 6.58. So the mean sd is at least .47 * 6.58 = 3.1. In the
        # active block the gain falls from 5.75/a to 3.02/a, which halves A's logits.
        Gate("smear_shared", "sd of log g, 4 blocks", above=2.0),
        Gate("smear_shared", "own gains, 4 blocks", above=0.05),
        Gate("smear_shared", "own gains, matched, 4 blocks", above=0.05),
        # `disjoint` needs no per-token gain. Most of the rise is each block's constant, which matching absorbs.
        Gate("disjoint", "own gains, 4 blocks", above=0.05),
        Gate("disjoint", "own gains, matched, 4 blocks", above=0.001),
        Gate("pinned", "sd of log g, 4 blocks", within=0.01),
        Gate("pinned", "own gains, 4 blocks", within=0.001),
        Gate("pinned", "own gains, matched, 4 blocks", within=0.001),
    ),
    one_layer=True,
    one_scale=True,
    tested="own gains, matched, 4 blocks",
    measure=measure,
    known=known,
    quantities={
        f"{name}, {n} blocks": Quantity(
            unit, meaning.format(n), more_smeared_when="higher" if unit == "nats" else "neither"
        )
        for n in N_BLOCKS
        for name, (unit, meaning) in COLUMNS.items()
    },
    streams=("natural",),
    figures=(
        *(
            Figure(
                f"{n} blocks: loss at own gains minus the unedited loss",
                (f"own gains, {n} blocks", f"own gains, matched, {n} blocks"),
            )
            for n in N_BLOCKS
        ),
        Figure(
            "Spread of log gain over blocks", tuple(f"sd of log g, {n} blocks" for n in N_BLOCKS)
        ),
    ),
)
