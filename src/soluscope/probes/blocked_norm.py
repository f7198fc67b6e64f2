"""P22: Blocked norm

Elhage et al. split SoLU and its LayerNorm into blocks of neurons. Here the model stays as it was trained,
and only its gain is taken apart: a block whose own gain is the joint one stays as it is.

Question:
    Do parts of the hidden layer call for gains of their own, and does the loss depend on their
    sharing one?

Formula:
    g_b = (s2_b + eps)^(-1/2), with s2_b and m_b of the block's own neurons;
    post' = gamma (g_b (a - m_b) + g (m_b - m)) + beta;
    dL_t = l_t(post') - l_t

Reading:
    A joint gain lets a block that is silent at a token be turned up, or down, by what the others
    do: smearing across blocks. Then gains differ between the blocks of a token and the loss rises
    when each keeps to its own. A change within .001 nats says that one gain for all neurons carries
    nothing that a block's own would not. A norm that epsilon pins has the same gain in every block.
    The loss also rises where a gain for each neuron could do what the joint one does (C2,
    `disjoint`): whether a gain by token is needed is for P7 and P8.

Pitfalls:
    The softmax stays joint, and blocks are cut as neurons happen to lie: in a model that was not
    trained in blocks they mean nothing, and a spread of gains is what chance gives. A blocked model
    trained anew has the dose eps (N / b)^2, not eps N^2. A silent block has gain eps^(-1/2), with
    nothing to multiply.

Source:
    Elhage et al. 2022, section 4.4; science.md section 7 P22
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
    "sd of log g": ("log gain", "spread of log g_b over the {} blocks of a token"),
    "own gains": ("nats", "loss with each of {} blocks at its own gain, less loss as it is"),
    "own gains, matched": (
        "nats",
        "the same, each of {} blocks times one constant: output rms as it is",
    ),
}


def measure(run: HookedRun) -> Measured:
    """Spread of the blocks' gains, and the change of each token's loss under them.

    The constants that match a block's rms are taken over all strings but the token's own, without
    BOS: what gamma could take up at once is no effect of a gain by token.

    Returns:
        nan where the norm is not a LayerNorm with an epsilon, and where d_mlp does not fall into
        blocks of one size, of two neurons at least.
    """
    nothing = torch.full((len(run.pos),), torch.nan, dtype=torch.float64)
    values: dict[str, Tensor] = {}
    for n_blocks in N_BLOCKS:
        even = run.mid.shape[-1] % n_blocks == 0 and run.mid.shape[-1] > n_blocks
        possible = even and run.eps is not None and run.centres
        columns = _columns(run, n_blocks) if possible else [nothing] * len(COLUMNS)
        named = [f"{name}, {n_blocks} blocks" for name in COLUMNS]
        values |= dict(zip(named, columns, strict=True))
    return Measured(values)


def _columns(run: HookedRun, n_blocks: int) -> list[Tensor]:
    """The three of `COLUMNS`, each [token]."""
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
    match = (before / after).where(after != 0, 1.0).sqrt()  # a block that is silent throughout
    loss = loss_at_post(run, run.post)
    changes = []
    for gain in (block_gain, match * block_gain):
        added = gamma * (gain - joint)[..., None] * deviation
        changed = run.post + added.flatten(-2)
        changes.append(loss_at_post(run, changed.to(run.post.dtype)) - loss)
    return [block_gain.log().std(-1, correction=0), *changes]


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Eight neurons in four blocks of two, at 1 +- 1 in two blocks and 1 +- 3 in two: s2_b = 1 or 9.

    eps = 0 all but: log g_b = 0 or -log 3, half of each. In eight blocks of one neuron nothing varies.
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
        # At an A token (47% of tokens) one of 4 blocks has s2_b = 7/64 12^2 and the others 0: log g_b of
        # -1.38 and three times 13.8, an sd of 6.58. So the mean is at least .47 * 6.58 = 3.1. On the
        # one block that is on, the gain falls from 5.75/a to 3.02/a, and A's logits by half.
        Gate("smear_shared", "sd of log g, 4 blocks", above=2.0),
        Gate("smear_shared", "own gains, 4 blocks", above=0.05),
        Gate("smear_shared", "own gains, matched, 4 blocks", above=0.05),
        # No gain by token is needed there. Most of the rise is each block's constant, which matching takes up.
        Gate("disjoint", "own gains, 4 blocks", above=0.05),
        Gate("disjoint", "own gains, matched, 4 blocks", above=0.001),
        Gate("pinned", "sd of log g, 4 blocks", within=0.01),
        Gate("pinned", "own gains, 4 blocks", within=0.001),
        Gate("pinned", "own gains, matched, 4 blocks", within=0.001),
    ),
    one_layer=True,
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
                f"{n} blocks: loss at own gains less loss as it is",
                (f"own gains, {n} blocks", f"own gains, matched, {n} blocks"),
            )
            for n in N_BLOCKS
        ),
        Figure(
            "Spread of log gain over blocks", tuple(f"sd of log g, {n} blocks" for n in N_BLOCKS)
        ),
    ),
)
