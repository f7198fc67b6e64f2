"""GELU, then a LayerNorm: what the mid norm does without SoLU before it.

Its epsilon is the residual stream's 1e-5 unless given: GELU's outputs are not 1/d_mlp small, so
SoLU's kappa means nothing here.

Source: the control of Elhage et al. 2022 (GELU models with an extra LayerNorm); science.md section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import LayerNormParams, gelu

if TYPE_CHECKING:
    from soluscope.norms import LayerNorm


@dataclass(frozen=True)
class Params(LayerNormParams):
    eps: float | None = 1e-5
    """Epsilon of the mid norm, added to the variance."""


def build_norm(d_mlp: int, params: Params) -> LayerNorm:
    from soluscope.norms import LayerNorm

    return LayerNorm(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    nonlinearity=gelu,
    hooked_act_fn="solu_ln",  # so that hook_mid exists; the conversion sets the nonlinearity itself
    role="baseline",
    build_norm=build_norm,
    params=Params,
    after="gelu",
    adds="LayerNorm without SoLU",
)
