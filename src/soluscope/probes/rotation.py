"""P16: Rotation smoothness

The path starts at a token's residual stream, minus its mean if ln2 centres, and turns in the plane of a
second direction v at constant length. LayerNorm makes ln2's output depend on direction alone, so this
path is u cos theta + v sin theta after ln2's normalisation. ln2's weight and bias and the whole MLP act on
it unchanged.

The contribution of the mid norm is measured by following the same path with the gain held at its value at
theta = 0. Where the gain is one constant the two outputs are equal. This comparison runs from 0 to pi/2
only. Around the token's antipode pre-activations are the negatives of those of text, and a norm without
epsilon amplifies the last remnant of activation to full size; that one jump would dominate the result.

Question:
    When the residual stream turns away from a token's direction, does the MLP's output turn
    smoothly or in steps?

Answers:
    above 0.01: The gain adds steps: the longest step of the MLP's output is longer than with the gain held.
    -0.01 to 0.01: The gain adds no step: the longest step of the MLP's output is the same with the gain held.
    below -0.01: The gain makes the turn smoother: the longest step of the MLP's output is shorter than with the
        gain held.

Formula:
    path |resid| (u cos theta + v sin theta), theta in [0, pi], 256 steps;
    D = |O(theta) - O(0)| / |O(0)|;
    length = sum |dO| / |O(pi/2) - O(0)|;
    plateau = first theta with D >= D(pi/2) / 2, over pi/2;
    feature direction: d x_j / d resid, j = argmax x of the other token

Reading:
    A smooth MLP gives a length near 1.11, a longest step near 1/128 and half of the distance at .46 of pi/2, as
    if O were the path itself. Steps and plateaus show that directions fall into regions, each with one meaning.
    A norm that smears adds steps: on the way from one neuron's region to the next it amplifies the small
    activations in between to full size, so the longest step grows. If holding the gain changes nothing, all
    steps come from the nonlinearity. The gain also adds steps where other values of gamma would suffice (C2,
    `disjoint`). Only training a static arm shows whether a per-token gain is needed.

Pitfalls:
    A random direction leaves the region where text lies; another token's direction does not. Without
    biases every neuron changes sign exactly once in half a turn, in any model, so that with d_mlp much
    above 256 every step has a different pattern and there are 257 effective polytopes. A step shorter
    than pi/256 is not resolved. Paths start at 64 evenly spaced tokens; all other tokens are
    nan. Softmax makes steps without any norm: compare arms.

Source:
    requested in the comments on Jorgensen 2023; Janiak et al. 2024 for plateaus; protocol.md
    section 7 P16
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import nan, pi, sin, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._estimates import ratio
from soluscope.probes._tokens import array, scattered, start_of_each_part

N_TOKENS = 64
"""Maximum number of tokens at which a path starts, evenly spaced over the tokens that are not BOS."""
N_STEPS = 256
"""Number of steps from theta = 0 to pi."""
TOKENS_AT_ONCE = 8
ROUNDING = 1e-6
"""Share of the largest |pre-activation| at or below which a pre-activation counts as not firing."""
KINDS = {
    "random": "v is a random direction",
    "token": "v is the orthogonal part of another token's residual stream",
    "feature": "v is the direction in which the strongest neuron of another token fires more",
}
STATISTICS = {
    "length": (
        "ratio",
        "path length over the distance from first to last point, theta from 0 to pi/2",
    ),
    "longest step": (
        "share of length",
        "length of the longest step over that of the whole path, theta from 0 to pi/2",
    ),
    "longest step, added by the gain": (
        "share of length",
        "the same, minus its value with the gain held at its value at theta = 0",
    ),
    "turning": (
        "rad / rad",
        "summed angle between successive steps of O, over that of a circle, from 0 to pi",
    ),
    "sign switches": ("per neuron", "number of changes of sign of x, from 0 to pi"),
    "effective polytopes": (
        "count",
        "exp of the entropy of the share of points at each pattern of signs of x, from 0 to pi",
    ),
    "argmax switches": (
        "count",
        "number of changes of the neuron with the largest x, from 0 to pi",
    ),
    "plateau": (
        "share of pi/2",
        "first angle at which O is at least half as far from O(0) as at pi/2",
    ),
}


def measure(run: HookedRun) -> Measured:
    """Return the shape of the path of O = post W_out from `N_TOKENS` tokens, and the distance of O from O(0).

    Returns:
        nan at all other tokens; where the other token has the same direction, so that no second direction
        exists; and, except for switches, polytopes and turning, where O(0) is 0 or O does not move.
    """
    chosen = start_of_each_part((~run.is_bos).nonzero().squeeze(-1), N_TOKENS)
    paths = {kind: _Paths(run, chosen, kind) for kind in KINDS}
    tokens = {
        f"{name}: {kind}": scattered(run, chosen, column)
        for kind, of_kind in paths.items()
        for name, column in of_kind.statistics().items()
    }
    distances = {kind: of_kind.distance for kind, of_kind in paths.items()}
    return Measured(tokens, tuple(_estimates(distances, array(run.string[chosen]))))


def _estimates(distances: dict[str, Tensor], string: NDArray[np.int64]) -> Iterator[Estimate]:
    """Yield D(theta) = |O(theta) - O(0)| / |O(0)| against theta in degrees, averaged over tokens."""
    for kind, distance in distances.items():
        for step in range(0, N_STEPS + 1, N_STEPS // 16):
            yield ratio(
                f"D: {kind}",
                array(distance[:, step]),
                np.ones(len(string)),
                string,
                x=180 * step / N_STEPS,
            )


class _Paths:
    """Paths of O from the chosen tokens, and the switches of pre-activations along them, [token step]."""

    def __init__(self, run: HookedRun, chosen: Tensor, kind: str) -> None:
        start, side = _plane(run, chosen, kind)
        theta = torch.linspace(0, torch.pi, N_STEPS + 1, dtype=start.dtype)[:, None].to(run.device)
        blocks = []
        for block in torch.arange(len(chosen), device=run.device).split(TOKENS_AT_ONCE):
            path = start[block, None] * theta.cos() + side[block, None] * theta.sin()
            stages = run.mlp(path.to(run.resid_mid.dtype))
            out = (stages.post @ run.mlp.W_out).double()  # [token step d_model]
            static = (run.readout.beta @ run.mlp.W_out).double()
            held = static + (out - static) * (stages.scale / stages.scale[:, :1])[..., None]
            away, motion = out - out[:, :1], out.diff(dim=1)
            lengths = [_relative(vectors, out) for vectors in (away, motion, held.diff(dim=1))]
            turning = _angles(motion).nansum(-1) / (torch.pi * (N_STEPS - 1) / N_STEPS)
            fires = stages.pre > ROUNDING * stages.pre.abs().amax(-1, keepdim=True)
            sign_switches = _switches(fires).double().mean(-1)
            leaders = _switches(stages.pre.argmax(-1)).double()
            blocks.append((*lengths, turning, sign_switches, _effective_number(fires), leaders))
        no_side = (side == 0).all(-1)
        (
            self.distance,
            self.steps,
            self.held,
            self.turning,
            self.signs,
            self.patterns,
            self.leaders,
        ) = (
            torch.cat(parts).index_fill(0, no_side.nonzero().squeeze(-1), torch.nan)
            for parts in zip(*blocks, strict=True)
        )

    def statistics(self) -> dict[str, Tensor]:
        """Return each of `STATISTICS`, [token]."""
        quarter = N_STEPS // 2
        end = self.distance[:, quarter]
        reached = self.distance[:, : quarter + 1] >= end[:, None] / 2
        plateau = reached.double().argmax(-1).double() / quarter
        steps, held = self.steps[:, :quarter], self.held[:, :quarter]
        longest, longest_held = (each.amax(-1) / each.sum(-1) for each in (steps, held))
        values = (
            steps.sum(-1) / end, longest, longest - longest_held, self.turning, self.signs,
            self.patterns, self.leaders, plateau.where(end > 0, torch.nan),
        )  # fmt: skip
        return dict(zip(STATISTICS, values, strict=True))


def _relative(vectors: Tensor, out: Tensor) -> Tensor:
    """Return lengths of `vectors` [token step d_model] in units of |O(0)|; nan where |O(0)| is 0."""
    lengths: Tensor = vectors.norm(dim=-1)
    start: Tensor = out[:, :1].norm(dim=-1)
    return lengths / start.where(start > 0, torch.nan)


def _plane(run: HookedRun, chosen: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the path at theta = 0 and at theta = pi/2: orthogonal vectors of equal length, [token d_model].

    The second is 0 where v has the direction of the first, or its opposite.
    """
    start = run.resid_mid[chosen].double()
    if kind == "token":
        side = start.roll(len(start) // 2, 0)
    elif kind == "feature":
        strongest = run.pre[chosen].argmax(-1).roll(len(chosen) // 2, 0)
        side = _rise(run, chosen, strongest)
    else:
        generator = torch.Generator().manual_seed(0)
        side = torch.randn(start.shape, generator=generator, dtype=start.dtype).to(run.device)
    if _ln2_centres(run, chosen):
        start, side = (each - each.mean(-1, keepdim=True) for each in (start, side))
    length = start.norm(dim=-1, keepdim=True)
    unit = start / length
    across = side - (side * unit).sum(-1, keepdim=True) * unit
    size = across.norm(dim=-1, keepdim=True)
    same = size <= 1e-6 * side.norm(dim=-1, keepdim=True)
    return start, (length * across / size).masked_fill(same, 0.0)


def _rise(run: HookedRun, chosen: Tensor, neuron: Tensor) -> Tensor:
    """Return the gradient of x at each token's `neuron` with respect to the residual stream, [token d_model].

    It is the neuron's column of W_in, propagated back through ln2.
    """
    resid, reads = run.resid_mid[chosen], run.mlp.W_in.T[neuron]
    _, gradient = torch.autograd.functional.vjp(run.mlp.ln2, resid, reads.to(resid.dtype))
    result: Tensor = gradient.double()
    return result


def _ln2_centres(run: HookedRun, chosen: Tensor) -> bool:
    """Return whether ln2 subtracts the mean over d_model, by adding a constant to its input."""
    resid = run.resid_mid[chosen]
    before, after = (run.mlp.ln2(r) for r in (resid, resid + resid.abs().mean()))
    return torch.allclose(before, after, rtol=1e-3, atol=1e-4)


def _angles(motion: Tensor) -> Tensor:
    """Return angles between successive steps, [token step]; nan next to a step of length 0."""
    unit = motion / motion.norm(dim=-1, keepdim=True)
    before, after = unit[:, :-1], unit[:, 1:]
    # Twice the half-angle: arccos of the inner product would lose small angles to rounding.
    return 2 * torch.atan2((before - after).norm(dim=-1), (before + after).norm(dim=-1))


def _switches(state: Tensor) -> Tensor:
    """Count how often `state` [token step ...] changes from one step to the next."""
    return (state[:, 1:] != state[:, :-1]).sum(1)


def _effective_number(patterns: Tensor) -> Tensor:
    """Return exp of the entropy of the frequencies of `patterns` [token step neuron], [token]."""
    numbers = []
    for path in patterns:
        counts = torch.unique(path, dim=0, return_counts=True)[1]
        share = counts.double() / counts.sum()
        numbers.append((-(share * share.log()).sum()).exp())
    return torch.stack(numbers)


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield an MLP that is the identity, and an MLP that is ReLU, on two neurons.

    Identity: O moves along a circle. Every step is a chord of angle h = pi / 256, 128 chords to pi/2.
    D = 2 sin(theta / 2) is sqrt 2 at pi/2 and first reaches half of that at step 59 of 128. Each of two
    neurons changes sign once in half a turn, and so does their difference.

    ReLU from (1, 1): x = sqrt 2 (cos(theta - pi/4), cos(theta + pi/4)), or the same with the neurons
    exchanged. O moves along an arc to pi/4, where one neuron stops firing; then straight to (1, 0) at pi/2
    and to (0, 0) at 3/4 pi, where the other stops: a straight length of sqrt 2. O(pi/2) is at distance 1
    from O(0); the distance is 2 sqrt 2 sin(theta / 2), which first exceeds 1/2 at step 29 of 128. O turns by
    h between the 64 chords of the arc, of which the last is h/2 short of straight down; then by pi/2 + h/2:
    191.5 h in total.
    """
    chord = 2 * sin(pi / (2 * N_STEPS))
    eye = torch.eye(2, dtype=torch.float64)
    run = planted(torch.tensor([[[5.0, 1.0], [1.0, 2.0], [3.0, -1.0]]]))
    run = replace(run, mlp=replace(run.mlp, norm=None, W_out=eye))
    circle = {
        "length": N_STEPS // 2 * chord / sqrt(2),
        "longest step": 2 / N_STEPS,
        "longest step, added by the gain": 0,
        "turning": 1,
        "sign switches": 1,
        "argmax switches": 1,
        "plateau": 59 / 128,
    }
    yield run, {f"{name}: {kind}": [nan, v, v] for kind in KINDS for name, v in circle.items()}

    run = planted(torch.ones(1, 3, 2))
    run = replace(run, mlp=replace(run.mlp, norm=None, W_out=eye, nonlinearity=torch.relu))
    arc = N_STEPS // 4 * sqrt(2) * chord
    bent = {
        "length": arc + sqrt(2) - 1,
        "longest step": sqrt(2) * chord / (arc + sqrt(2) - 1),
        "longest step, added by the gain": 0,
        "turning": 191.5 / 255,
        "sign switches": 1,
        "plateau": 29 / 128,
    }
    yield (
        run,
        {f"{name}: {k}": [nan, v, v] for k in ("random", "feature") for name, v in bent.items()}
        | {f"{name}: token": [nan, nan, nan] for name in STATISTICS},
    )


PROBE = Probe(
    __doc__,
    gates=(
        # Between two A tokens x is 12 cos theta and 12 sin theta. Under a live norm O has constant length
        # and turns by atan(tan(theta) e^d), d = 12 (sin - cos): at 45 degrees by 6 sqrt 2 + 1 per unit of theta.
        # One step is thus (6 sqrt 2 + 1) pi / 256 = .1164 of a quarter circle, .0741 of the path. With the gain
        # held O moves inwards and out again, and no step exceeds .0379 of its path: the gain adds .036. Paths
        # from A to B and from B to A add more, paths from B to B nothing; the four kinds are about equally
        # frequent.
        Gate("smear_shared", "longest step, added by the gain: token", above=0.02),
        Gate("disjoint", "longest step, added by the gain: token", above=0.02),
        # ReLU makes steps at its edges and a linear MLP makes none; closed forms are in the controls' docstrings.
        Gate("relu_few", "longest step: token", above=0.02, truth=0.030390),
        Gate("relu_few", "length: token", above=1.2, truth=1.36931),
        Gate("relu_few", "effective polytopes: token", above=2, truth=2.4472),
        *(
            Gate("linear_mlp", f"{name}: {kind}", within=0.01, around=around)
            for kind in ("token", "feature")
            for name, around in (("length", 1.09798), ("longest step", 0.0079))
        ),
        *(
            Gate("linear_mlp", f"longest step, added by the gain: {kind}", within=0.01)
            for kind in KINDS
        ),
        Gate("pinned", "longest step, added by the gain: feature", within=0.01),
        Gate("pinned", "longest step, added by the gain: token", within=0.01),
        Gate("pinned", "longest step, added by the gain: random", within=0.01),
    ),
    one_scale=True,
    tested="longest step, added by the gain: token",
    measure=measure,
    known=known,
    quantities={
        f"{name}: {kind}": Quantity(unit, f"{meaning}; {which}", ("mean", "median"))
        for kind, which in KINDS.items()
        for name, (unit, meaning) in STATISTICS.items()
    },
    estimates={
        f"D: {kind}": Quantity("relative", f"|O(theta) - O(0)| / |O(0)|; {which}")
        for kind, which in KINDS.items()
    },
    streams=("natural",),
    figures=(
        *(
            Figure(
                f"Distance of O from its start, where {which}",
                (f"D: {kind}",),
                kind="curve",
                x_title="degrees turned",
            )
            for kind, which in KINDS.items()
        ),
        *(
            Figure(f"Shape of the path, where {which}", tuple(f"{s}: {kind}" for s in STATISTICS))
            for kind, which in KINDS.items()
        ),
    ),
)
