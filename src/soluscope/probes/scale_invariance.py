"""P15: Scale invariance

A LayerNorm without epsilon maps lambda * v and v to the same output, so each direction of the residual
stream has one meaning (Jorgensen). Epsilon breaks this invariance.

Question:
    Does a direction mean the same at any length, at the input of the MLP and across its mid norm?

Answers:
    above 0.01: A direction of the residual stream does not mean the same to the MLP at twice the length: the
        output changes by more than 1%.
    below 0.01: A direction of the residual stream means the same to the MLP at twice the length: the output
        changes by less than 1%; the mid norm is tested by another number.

Formula:
    |n(lambda a)| / |n(a)| = lambda sqrt((s2 + eps) / (lambda^2 s2 + eps)): 1 at every lambda where
    r = s2 / (s2 + eps) is 1 (invariant), lambda where r is 0 (linear);
    and post and O at lambda * resid against lambda = 1, lambda from 2^-6 to 2^6

Reading:
    Smearing needs a mid norm that amplifies small activations, and so an invariant one (error 0 at
    every lambda): a LayerNorm with r near 1. A norm that is pinned by epsilon is linear: it leaves
    small activations small. At ln2's input the errors should vanish in every model, which is
    Jorgensen's argument, until lambda shrinks the residual stream to the size of ln2's epsilon.

Pitfalls:
    The two tests are separate: doubling the residual stream tests ln2, not the mid norm. Invariance
    holds for one direction that is scaled as a whole, not for one of several directions in a sum. The
    MLP is evaluated at 1000 evenly spaced tokens, the mid norm's closed form at all tokens.

Source:
    Jorgensen 2023; protocol.md section 7 P15
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._estimates import ratio
from soluscope.probes._tokens import array, start_of_each_part

LAMBDAS = tuple(2.0**power for power in range(-6, 7))
N_TOKENS = 1000
"""Number of evenly spaced tokens at which the MLP is evaluated at each lambda."""

MID_ERRORS = {
    "invariance error of n": "| |n(lambda a)| / |n(a)| - 1 |: 0 where the mid norm is invariant",
    "linearity error of n": "| |n(lambda a)| / (lambda |n(a)|) - 1 |: 0 where the mid norm is linear",
}
RESIDUAL_ERRORS = {
    "relative change of post": "|post(lambda resid) - post| / |post|",
    "1 - cosine of post": "1 - cos(post(lambda resid), post)",
    "relative change of O": "|O(lambda resid) - O| / |O|, O = post W_out",
    "1 - cosine of O": "1 - cos(O(lambda resid), O)",
}


def measure(run: HookedRun) -> Measured:
    """Return the errors at lambda = 2 per token, and every error against lambda."""
    return Measured(_errors_at_2(run), tuple(_estimates(run)))


def _errors_at_2(run: HookedRun) -> dict[str, Tensor]:
    """Return the errors at lambda = 2: of the mid norm at every token, of the whole MLP at `N_TOKENS` tokens.

    Returns:
        nan at all other tokens, and where post or O is zero, so that no relative change is defined.
    """
    values = {f"{name} at 2": error for name, error in _mid_errors(run, 2.0).items()}
    chosen = start_of_each_part(torch.arange(len(run.pos), device=run.device), N_TOKENS)
    for name, error in _residual_errors(run, chosen, 2.0).items():
        column = torch.full_like(run.loss, torch.nan, dtype=torch.float64)
        values[f"{name} at 2"] = column.index_copy(0, chosen, error)
    return values


def _estimates(run: HookedRun) -> Iterator[Estimate]:
    """Yield every error against lambda, averaged over tokens that are not BOS."""
    content = run.subset(~run.is_bos)
    chosen = start_of_each_part(torch.arange(len(content.pos), device=run.device), N_TOKENS)
    for factor in LAMBDAS:
        errors = [
            (_mid_errors(content, factor), content.string),
            (_residual_errors(content, chosen, factor), content.string[chosen]),
        ]
        for values, string in errors:
            for name, error in values.items():
                ones = np.ones(len(error))
                yield ratio(name, array(error), ones, array(string), x=factor)


def _mid_errors(run: HookedRun, factor: float) -> dict[str, Tensor]:
    """Return the mid norm's errors by the closed form; a constant gain, or no norm, is linear."""
    s2 = run.s2
    grown = torch.full_like(s2, factor)
    if run.eps is not None:
        grown = factor * ((s2 + run.eps) / (factor**2 * s2 + run.eps)).sqrt()
    errors = (grown - 1).abs(), (grown / factor - 1).abs()
    return dict(zip(MID_ERRORS, errors, strict=True))


def _residual_errors(run: HookedRun, chosen: Tensor, factor: float) -> dict[str, Tensor]:
    resid, is_bos = run.resid_mid[chosen], run.is_bos[chosen]
    original, other = (run.mlp(scaled, is_bos).post.double() for scaled in (resid, factor * resid))
    W_out = run.mlp.W_out.double()
    values: dict[str, Tensor] = {}
    errors = iter(RESIDUAL_ERRORS)
    for before, after in ((original, other), (original @ W_out, other @ W_out)):
        size = before.norm(dim=-1)
        values[next(errors)] = (after - before).norm(dim=-1) / size
        # Half the squared distance of the two unit vectors equals 1 - cos, without cancellation.
        apart = before / size[:, None] - after / after.norm(dim=-1, keepdim=True)
        values[next(errors)] = apart.square().sum(-1) / 2
    return values


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield two neurons at +1 and -1 (s2 = 1), under eps = 4 and under a constant gain.

    With eps = 4, |n(2a)| / |n(a)| = 2 sqrt(5 / 8). ln2 and W_in are the identity, so doubling the residual
    stream doubles a, and n keeps its direction. Under a constant gain everything is linear.
    """
    mid = torch.tensor([[[1.0, -1.0]]])
    grown = 2 * math.sqrt(5 / 8)
    run = planted(mid, eps=4.0)
    run = replace(run, mlp=replace(run.mlp, W_out=torch.eye(2, dtype=torch.float64)))
    yield (
        run,
        {
            "invariance error of n at 2": [grown - 1],
            "linearity error of n at 2": [1 - grown / 2],
            "relative change of post at 2": [grown - 1],
            "relative change of O at 2": [grown - 1],
            "1 - cosine of post at 2": [0],
            "1 - cosine of O at 2": [0],
        },
    )
    yield (
        planted(mid, gain=3.0),
        {
            "invariance error of n at 2": [1],
            "linearity error of n at 2": [0],
            "relative change of post at 2": [1],
            "relative change of O at 2": [math.nan],  # W_out is zero
        },
    )


PROBE = Probe(
    __doc__,
    gates=(
        Gate("uniform", "linearity error of n at 2", above=0.4, truth=0.5),
        Gate("uniform", "invariance error of n at 2", within=0.01),
        Gate("smear_shared", "invariance error of n at 2", within=0.01),
        Gate("pinned", "invariance error of n at 2", above=0.9, truth=1.0),
        Gate("pinned", "linearity error of n at 2", within=0.01),
        # The epsilon of their ln2 is 1e-12, so doubling the residual stream does not change the MLP's output.
        *(
            Gate(control, "relative change of O at 2", within=0.001)
            for control in ("uniform", "pinned")
        ),
    ),
    one_scale=True,
    tested="relative change of O at 2",
    measure=measure,
    known=known,
    quantities={
        **{
            f"{name} at 2": Quantity(
                "relative",
                meaning,
                more_smeared_when="lower" if name == "invariance error of n" else "neither",
            )
            for name, meaning in MID_ERRORS.items()
        },
        **{f"{name} at 2": Quantity("relative", text) for name, text in RESIDUAL_ERRORS.items()},
    },
    estimates={
        name: Quantity("relative", meaning)
        for name, meaning in (MID_ERRORS | RESIDUAL_ERRORS).items()
    },
    streams=("natural",),
    figures=(
        *(
            Figure(
                title,
                (name,),
                kind="curve",
                log_x=True,
                log_y=True,
                x_title="lambda",
            )
            for title, name in (
                ("Mid norm: error of invariance", "invariance error of n"),
                ("Mid norm: error of linearity", "linearity error of n"),
                ("Residual stream scaled: change of the MLP's output O", "relative change of O"),
                ("Residual stream scaled: change of the direction of O", "1 - cosine of O"),
            )
        ),
        Figure(
            "Mid norm at lambda = 2",
            ("invariance error of n at 2", "linearity error of n at 2"),
        ),
    ),
)
