"""SoLU, then a LayerNorm whose per-token scale has no gradient.

If this variant is as good as SoLU + LN, the forward pass needs the scale and the gradient through it is not needed.

Source: protocol.md section 4, "The chain".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import NormParams, solu

if TYPE_CHECKING:
    from soluscope.norms import DetachedLayerNorm


def build_norm(d_mlp: int, params: NormParams) -> DetachedLayerNorm:
    from soluscope.norms import DetachedLayerNorm

    return DetachedLayerNorm(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    label="SoLU + LN, scale without gradient",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="per_token",
    build_norm=build_norm,
    params=NormParams,
    after="solu_frozen_ln",
    adds="a per-token scale in the forward pass",
    twin="solu_frozen_ln",
)
