"""P5: Scale swap and dose curve

The tokens of a class (position group, fifth of the surprisal) are put in a random order from a fixed seed,
and each token gives its gain to the next. The donors of a class are thus exactly its members, and its log
ratios sum to 0.

Question:
    Does a token need its own gain, or is the gain of a similar token, or half or twice its own gain,
    as good?

Answers:
    above 0.001: The gain of a similar token is worse than the per-token gain: the loss rises.
    -0.001 to 0.001: The gain of a similar token is as good as the per-token gain; if similar tokens have nearly
        equal gains, or where the MLP's output is far longer than the rest of the residual stream, this shows
        nothing about the mid norm.
    below -0.001: The gain of a similar token is better than the per-token gain: the loss falls.

Formula:
    l(g_u) - l(g_t), where u has the position group (1, 2 to 15, from 16), stream and fifth of the
    surprisal of t;
    its slope on log(g_u / g_t);
    l(alpha g_t) - l(g_t), alpha = 2^-2 ... 2^2 in 17 steps

Reading:
    A per-token gain that matters (H-dyn) predicts that a swap costs loss in either direction (a positive slope
    for swaps to a higher gain, a negative slope for swaps to a lower one) and that the mean dose curve is sharp
    with its minimum at 1. Smearing predicts that diffuse codes pay a part of it; in `magnitude` no code is
    diffuse. A swap changes nothing where the gain is one constant, and within .001 nats where it varies without
    effect; but the donors of a token are of its class, so nothing follows where gains hardly differ within
    classes (sd of log(g_u / g_t)). If a swap costs nothing with ln_final live and more with its scale frozen,
    ln_final renormalises each token, and nothing follows about the mid norm (`swallowed`, P4). A steep dose
    curve alone shows only that the output scale matters, as it also does under a static gain. Swaps also cost
    loss where other values of gamma would suffice (C2, `disjoint`). Only training a static arm shows whether
    a per-token gain is needed.

Pitfalls:
    Regression to the mean: a token with an unusual gain mostly gets a more usual one, so that swaps up
    are of tokens with low gains and swaps down of tokens with high gains; read the two signs
    separately. The best dose of a single token is where its one target is most likely, often at an end
    of the range; only the best dose for all tokens shows whether gains are right. A swapped gain is
    off-distribution for the token, though not for the model. Tokens are matched within one stream; dose
    curves are of at most 2048 evenly spaced tokens.

Source:
    protocol.md sections 7 P5 and 8.4
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log, nan
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.hooked.ablation import FINAL_NORMS, FinalNorm, loss_at_gain
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._estimates import ratio, slope, sums_by_string
from soluscope.probes._tokens import array, arrays, diffuse

POSITION_GROUPS = (2, 16)
"""Positions at which the second and the third group begin; protocol.md section 5."""
N_SURPRISAL_BINS = 5
SEED = 0
SAME = 1e-5
"""Largest log ratio of two gains that counts as rounding."""

DOUBLINGS = tuple(i / 4 for i in range(-8, 9))
DOSES = tuple(2**x for x in DOUBLINGS)
N_DOSED = 2048
"""Maximum number of tokens with a dose curve, evenly spaced."""
BY_DIFFUSE = "swap, signed, diffuse codes"
FLAT = 1e-6
"""Smallest range of a dose curve, in nats, that is more than rounding; a flatter curve has no minimum."""


def measure(run: HookedRun) -> Measured:
    """Return the change of each token's loss under swaps and doses of the gain, and slopes and mean curves."""
    tokens = _changes_by_token(run)
    return Measured(tokens, tuple(_estimates(run, tokens)))


def _changes_by_token(run: HookedRun) -> dict[str, Tensor]:
    """Return the change of each token's loss with another gain, in nats; nan at BOS and without a target.

    Returns:
        Each with ln_final live and with its scale frozen:
        the change of loss under a swap, as an absolute value, with its sign, with its sign only where
        the gain rose or only where it fell, and with its sign where the code is diffuse and 0 elsewhere; nan where
        no other token matches;
        the dose curve l(alpha g) - l(g) at `DOSES`; log2 of the alpha where it is lowest (by the parabola
        through the lowest three; nan where it is flat); and its second derivative in log alpha at 1, by
        differences: all nan except at `N_DOSED` evenly spaced tokens.
        Also the log ratio of the two gains.
    """
    gain = run.gain.double()
    donor = matched(run)
    swapped = donor >= 0
    log_ratio = torch.where(swapped, (gain[donor] / gain).log(), torch.nan)
    dosed = _evenly_spaced(run.scored)
    doses = run.gain[:, None] * run.gain.new_tensor(DOSES)
    step = (DOUBLINGS[1] - DOUBLINGS[0]) * torch.tensor(2.0).log()
    middle = DOSES.index(1.0)
    spread = diffuse(run)
    columns = {"log(g_u / g_t)": log_ratio}
    for final_norm, how in FINAL_NORMS.items():
        change = _changes(run, swapped, run.gain[donor, None], final_norm).squeeze(-1)
        curve = _changes(run, dosed, doses, final_norm)
        bend = curve[:, middle - 1] - 2 * curve[:, middle] + curve[:, middle + 1]
        columns |= {
            f"swap, absolute{how}": change.abs(),
            f"swap, signed{how}": change,
            f"swap up, signed{how}": change.where(log_ratio > SAME, torch.nan),
            f"swap down, signed{how}": change.where(log_ratio < -SAME, torch.nan),
            f"{BY_DIFFUSE}{how}": change.where(spread | change.isnan(), 0.0),
            f"log2 of the best dose{how}": torch.from_numpy(lowest(array(curve))),
            f"curvature at the own gain{how}": bend / step.square(),
        }
        columns |= {_at(dose, how): curve[:, i] for i, dose in enumerate(DOSES)}
    return columns


def matched(run: HookedRun) -> Tensor:
    """Return for each token its donor: a token of its position group and fifth of the surprisal.

    Returns:
        Indices of tokens, int64 [token]; -1 at BOS, without a target, and where no other token matches.
    """
    scored = run.scored.nonzero().squeeze(-1)
    group = torch.bucketize(run.pos, run.pos.new_tensor(POSITION_GROUPS), right=True)
    shares = (torch.arange(1, N_SURPRISAL_BINS) / N_SURPRISAL_BINS).to(run.device)
    surprisal = run.loss.double()
    edges = surprisal[scored].quantile(shares.double())
    likeness = group * N_SURPRISAL_BINS + torch.bucketize(surprisal, edges)
    generator = torch.Generator().manual_seed(SEED)
    scored = scored[torch.randperm(len(scored), generator=generator).to(run.device)]
    donor = torch.full_like(run.pos, -1)
    for kind in likeness[scored].unique().tolist():
        members = scored[likeness[scored] == kind]
        if len(members) > 1:
            donor[members] = members.roll(1)
    return donor


def _evenly_spaced(candidates: Tensor) -> Tensor:
    """Select at most `N_DOSED` evenly spaced candidates, bool [token]."""
    indices = candidates.nonzero().squeeze(-1)
    # Not `cache.evenly_spaced`, which rounds differently: for 1 in 150 lengths it selects a few other tokens.
    spaced = torch.linspace(0, len(indices) - 1, min(len(indices), N_DOSED), dtype=torch.float64)
    chosen = torch.zeros_like(candidates)
    chosen[indices[spaced.long().to(indices.device)]] = True
    return chosen


def _changes(run: HookedRun, kept: Tensor, gains: Tensor, final_norm: FinalNorm) -> Tensor:
    """Return loss at `gains` [token edit] minus loss at the unchanged gain, fp64; nan where not `kept`."""
    part = run.subset(kept)
    losses = loss_at_gain(part, torch.cat([part.gain[:, None], gains[kept]], dim=1), final_norm)
    losses = losses.double()
    changes = losses.new_full(gains.shape, torch.nan)
    changes[kept] = losses[:, 1:] - losses[:, :1]
    return changes


def lowest(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log2 of the dose at which each curve [... dose] is lowest; nan where the curve is flat.

    Between doses the minimum is that of the parabola through the lowest three. A curve that is lowest at
    the first or last dose has its minimum there.
    """
    last = len(DOUBLINGS) - 1
    index = np.nan_to_num(curves, nan=0.0).argmin(-1)
    inner = np.clip(index, 1, last - 1)[..., None]
    left, middle, right = (
        np.take_along_axis(curves, inner + k, axis=-1)[..., 0] for k in (-1, 0, 1)
    )
    bend = left - 2 * middle + right
    with np.errstate(divide="ignore", invalid="ignore"):
        between = index + 0.5 * (left - right) / bend
    ends = (index == 0) | (index == last)
    where = DOUBLINGS[0] + (DOUBLINGS[1] - DOUBLINGS[0]) * np.where(ends, index, between)
    result: NDArray[np.float64] = np.where(np.ptp(curves, axis=-1) > FLAT, where, np.nan)
    return result


def _at(dose: float, how: str) -> str:
    return f"l({dose:.3g} g) - l(g){how}"


def _estimates(run: HookedRun, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield slopes of the change on log(g_u / g_t), for all swaps and for each sign, and the mean dose curve.

    Swaps between equal gains change nothing and count for both signs. Where all gains are equal no slope
    is yielded.
    """
    string, columns = array(run.string), arrays(tokens)
    log_ratio = columns["log(g_u / g_t)"]
    signs = {"": ~np.isnan(log_ratio), ", up": log_ratio >= -SAME, ", down": log_ratio <= SAME}
    for how in FINAL_NORMS.values():
        for sign, rows in signs.items():
            if rows.any() and np.ptp(log_ratio[rows]) > SAME:
                change = columns[f"swap, signed{how}"][rows]
                yield slope(f"slope{sign}{how}", log_ratio[rows], change, string[rows])
        curve = [columns[_at(dose, how)] for dose in DOSES]
        counted = np.ones(len(string))
        for dose, column in zip(DOSES, curve, strict=True):
            yield ratio(f"dose curve{how}", column, counted, string, x=dose)
        sums, n = sums_by_string([*curve, counted], string)
        yield Estimate(f"log2 of the best dose for all{how}", sums, _lowest_mean, n)


def _lowest_mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return lowest(sums[:, :-1] / sums[:, -1:])


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield two tokens that differ only in their gains, 1 and 1/3, and the same under a constant gain.

    At alpha times its gain a token's loss is log(1 + 3^alpha): post is (1, -1) at both tokens, W_out copies
    it, ln_final's epsilon is so large that its scale is one constant, W_U maps alpha times this post to the
    logits (alpha ln 3, 0), and the target is the second token.
    """
    mid = torch.tensor([[[1.0, -1.0]] * 3, [[3.0, -3.0]] * 3])
    run = planted(mid, eps=1e-12)
    unembed = 1e6 * log(3) / 2 * torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    readout = replace(run.readout, W_out=torch.eye(2).double(), ln_eps=1e12, W_U=unembed)
    run = replace(run, readout=readout, resid_mid=torch.zeros_like(run.resid_mid))
    up, down = log(28) - log(4), log(1 + 3 ** (1 / 3)) - log(4)
    yield (
        run,
        {
            "log(g_u / g_t)": [nan, -log(3), nan, nan, log(3), nan],
            "swap, absolute": [nan, -down, nan, nan, up, nan],
            "swap, signed, final norm frozen": [nan, down, nan, nan, up, nan],
            "swap up, signed": [nan, nan, nan, nan, up, nan],
            "swap down, signed": [nan, down, nan, nan, nan, nan],
            _at(2, ""): [nan, log(10) - log(4), nan, nan, log(10) - log(4), nan],
            "log2 of the best dose": [nan, -2, nan, nan, -2, nan],
        },
    )
    yield planted(mid, gain=7.0), {"swap, absolute": [nan, 0, nan, nan, 0, nan]}


def _by_final_norm(quantities: dict[str, Quantity]) -> dict[str, Quantity]:
    return {
        f"{name}{how}": replace(quantity, meaning=quantity.meaning + how)
        for how in FINAL_NORMS.values()
        for name, quantity in quantities.items()
    }


PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_shared", "swap, absolute", above=0.1),
        Gate("smear_shared", "swap, absolute, final norm frozen", above=0.1),
        Gate("smear_shared", "swap up, signed", above=0.1),
        Gate("smear_shared", "swap down, signed", above=0.1),
        Gate("smear_shared", "slope, up", above=0.1),
        Gate("smear_shared", "slope, down", below=-0.1),
        Gate("smear_shared", "log2 of the best dose for all", within=0.25),
        Gate("disjoint", "swap, absolute", above=0.1),  # although no per-token gain is needed
        Gate("magnitude", "swap, signed", above=0.1),
        Gate("magnitude", BY_DIFFUSE, within=0.001),
        *(Gate(positive, BY_DIFFUSE, above=0.03) for positive in ("smear_shared", "ceiling")),
        Gate("swallowed", "swap, absolute", within=0.001),
        Gate("swallowed", "swap, absolute, final norm frozen", above=0.1),
        *(
            Gate(negative, f"swap, absolute{how}", within=0.001)
            for negative in ("absorbed", "uniform", "pinned")
            for how in FINAL_NORMS.values()
        ),
    ),
    one_layer=True,
    one_scale=True,
    tested="swap, signed",
    measure=measure,
    known=known,
    quantities={
        "log(g_u / g_t)": Quantity("log gain", "log ratio of the swapped gains", ("sd",)),
        **_by_final_norm(
            {
                "swap, absolute": Quantity(
                    "nats",
                    "size of the change of loss with the gain of a similar token",
                    ("mean", "median"),
                ),
                "swap, signed": Quantity(
                    "nats",
                    "change of loss with the gain of a similar token",
                ),
                BY_DIFFUSE: Quantity(
                    "nats",
                    "the part of that mean that tokens of diffuse code pay",
                    more_smeared_when="higher",
                ),
                "swap up, signed": Quantity(
                    "nats", "the same where the other token's gain is higher"
                ),
                "swap down, signed": Quantity(
                    "nats", "the same where the other token's gain is lower"
                ),
                "log2 of the best dose": Quantity(
                    "doublings of the gain",
                    "dose at which the token's dose curve is lowest, as log2",
                    ("median", "q05", "q95", "sd"),
                ),
                "curvature at the own gain": Quantity(
                    "nats / (log gain)^2", "second derivative of the dose curve in log gain, at 1"
                ),
                **{
                    _at(dose, ""): Quantity(
                        "nats", f"change of loss at {dose:.3g} times the gain", ()
                    )
                    for dose in DOSES
                },
            }
        ),
    },
    estimates=_by_final_norm(
        {
            "slope": Quantity("nats / log gain", "slope of the change of loss on log(g_u / g_t)"),
            "slope, up": Quantity(
                "nats / log gain",
                "the same over swaps to a gain as high or higher",
            ),
            "slope, down": Quantity(
                "nats / log gain",
                "the same over swaps to a gain as low or lower",
            ),
            "dose curve": Quantity("nats", "mean change of loss at x times the token's gain"),
            "log2 of the best dose for all": Quantity(
                "doublings of the gain", "dose at which the mean dose curve is lowest, as log2"
            ),
        }
    ),
    streams=("natural",),
    figures=(
        Figure(
            "Change of loss with the gain of a similar token",
            ("swap, absolute", "swap up, signed", "swap down, signed"),
        ),
        Figure(
            "Dose curve: change of loss at a multiple of the token's gain",
            tuple(f"dose curve{how}" for how in FINAL_NORMS.values()),
            kind="curve",
            log_x=True,
            x_title="multiple of the token's gain",
        ),
        Figure("Dose at which the mean dose curve is lowest", ("log2 of the best dose for all",)),
    ),
)
