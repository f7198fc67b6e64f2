"""SoLU, then a LayerNorm with two constants instead of the per-token scale: one for BOS, one for all other tokens.

BOS has other activations than any other token, and LayerNorm gives it another gain. If this variant is better than
solu_frozen_ln, a part of the per-token scale is needed for BOS alone. Its constants are found in the same way, each
from its own tokens; a number in `mid.gain` is used for both.

Source: protocol.md section 3; BOS apart after Baroni et al. 2025, who remove LayerNorm with a sigma for BOS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import FrozenBosLayerNorm


def build_norm(d_mlp: int, params: StaticParams) -> FrozenBosLayerNorm:
    from soluscope.norms import FrozenBosLayerNorm

    return FrozenBosLayerNorm(d_mlp)


VARIANT = Variant(
    label="SoLU + LN, BOS apart",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces mlp.ln by this norm
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_frozen_ln",
    adds="a separate constant for BOS",
)
