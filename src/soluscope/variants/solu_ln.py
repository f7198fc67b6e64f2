"""SoLU, then a LayerNorm with a per-token scale: the published model.

Source: Elhage et al. 2022, section 4.3; the dose kappa is protocol.md section 1.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import LayerNormParams, solu

if TYPE_CHECKING:
    from soluscope.norms import PerTokenNorm


def build_norm(d_mlp: int, params: LayerNormParams) -> PerTokenNorm:
    from soluscope.norms import BareLayerNorm, LayerNorm

    kind = LayerNorm if params.affine else BareLayerNorm
    return kind(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    label="SoLU + LN",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="per_token",
    build_norm=build_norm,
    params=LayerNormParams,
    after="solu_ln_det",
    adds="the gradient through the per-token scale",
    twin="solu_frozen_ln",
)
