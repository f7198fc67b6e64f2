"""Interval that contains the change of loss, from two cumulants and the range of delta."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from soluscope.hooked.ablation.edits import Edit, Second

ROUNDING = 8
"""Slack of the enclosure in units of the dtype's epsilon, per nat of delta's range (`up` + `down`)."""


class Bounds(NamedTuple):
    """Cumulants and interval of each pair's change of loss, before any evaluation; nats."""

    first: Float[Tensor, "t neuron"]
    """E_p[delta] - delta_target: the change to first order in delta, for an edit of any size."""
    second: Float[Tensor, "t neuron"]
    """Var_p[delta]: first + second / 2 is the change to second order."""
    low: Float[Tensor, "t neuron"]
    high: Float[Tensor, "t neuron"]
    """low <= change <= high; infinite if the pair must be recomputed from the edited stage on."""


def enclosure(edit: Edit, second: Second, dtype: torch.dtype) -> Bounds:
    variance = (
        ((edit.u @ second.EE) * edit.u).sum(-1)
        + 2 * edit.w * (edit.u * second.EB).sum(-1)
        + edit.w.square() * second.BB
    )
    width = edit.up + edit.down
    slack = ROUNDING * torch.finfo(dtype).eps * width
    first = edit.mean - edit.target
    most = (_phi(edit.up) * (variance + slack * width)).log1p().minimum(edit.up)
    least = (_phi(-edit.down) * (variance - slack * width).clamp_min(0)).log1p()
    low = (first + least - slack).masked_fill(edit.cancels, -torch.inf)
    high = (first + most + slack).masked_fill(edit.cancels, torch.inf)
    return Bounds(first, variance, low, high)


def _phi(x: Tensor) -> Tensor:
    """Return (e^x - 1 - x) / x^2, which is 1/2 at 0."""
    series = 1 / 2 + x / 6 + x.square() / 24
    return torch.where(x.abs() < 1e-4, series, (x.expm1() - x) / x.square())


def least_size(low: Tensor, high: Tensor) -> Tensor:
    """Return the smallest absolute value in an interval."""
    return torch.maximum(low, -high).clamp_min(0)
