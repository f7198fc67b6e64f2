"""SoLU, then a LayerNorm with one gain for all tokens that follows LayerNorm's mean gain during training.

If this variant recovers what SoLU + LN gains over a constant, the gain has to adapt in training, but not per token
and not through a gradient. After training it is a constant.

Source: protocol.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import RunningLayerNorm


def build_norm(d_mlp: int, params: StaticParams) -> RunningLayerNorm:
    from soluscope.norms import RunningLayerNorm

    return RunningLayerNorm(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    label="SoLU + LN, running gain",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_frozen_ln",
    adds="a gain that follows the batches in training",
)
