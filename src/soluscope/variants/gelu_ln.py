"""GELU, then a LayerNorm: the control that shows the effect of a mid norm without SoLU.

Its default epsilon is 1e-5, as in the residual stream. GELU's outputs are not as small as 1/d_mlp, so
SoLU's kappa is not a meaningful default here.

Source: the control of Elhage et al. 2022 (GELU models with an extra LayerNorm); protocol.md section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import NormParams, gelu

if TYPE_CHECKING:
    from soluscope.norms import LayerNorm


@dataclass(frozen=True)
class Params(NormParams):
    eps: float | None = 1e-5
    """Epsilon of the mid norm, added to the variance."""


def build_norm(d_mlp: int, params: Params) -> LayerNorm:
    from soluscope.norms import LayerNorm

    return LayerNorm(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    label="GELU + LN",
    nonlinearity=gelu,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces the nonlinearity
    role="baseline",
    build_norm=build_norm,
    params=Params,
    after="gelu",
    adds="LayerNorm without SoLU",
)
