"""SoLU, then a LayerNorm with one constant instead of the per-token scale.

A per-token scale lets the network undo SoLU's sharpening. The constant removes that route and leaves the
centring, the per-neuron weights and the bias unchanged.

Source: Elhage et al. 2022, section 4.3; freezing the scale is protocol.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import FrozenLayerNormParams, solu

if TYPE_CHECKING:
    from soluscope.norms import StaticNorm


def build_norm(d_mlp: int, params: FrozenLayerNormParams) -> StaticNorm:
    from soluscope.norms import FrozenBareLayerNorm, FrozenLayerNorm

    return FrozenLayerNorm(d_mlp) if params.affine else FrozenBareLayerNorm(d_mlp)


VARIANT = Variant(
    label="SoLU + LN",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=FrozenLayerNormParams,
    after="solu_gain",
    adds="centring and LayerNorm's affine parameters",
)
