"""SoLU, then a LayerNorm that multiplies by one constant instead of each token's own scale.

A per-token scale lets the network undo SoLU's sharpening; a constant takes that route away and
leaves centring, gain and bias as they are.

Source: Elhage et al. 2022, section 4.3; freezing the scale is science.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import FrozenLayerNorm


def build_norm(d_mlp: int, params: StaticParams) -> FrozenLayerNorm:
    from soluscope.norms import FrozenLayerNorm

    return FrozenLayerNorm(d_mlp)


VARIANT = Variant(
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_gain",
    adds="centring and LayerNorm's affine parameters",
)
