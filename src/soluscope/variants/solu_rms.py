"""SoLU, then an RMSNorm with a per-token scale: LayerNorm without centring and bias.

If this variant recovers the benefit of LN, the benefit requires neither the centring nor the bias.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"; the dose kappa is solu_ln's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import NormParams, solu

if TYPE_CHECKING:
    from soluscope.norms import RMSNorm


def build_norm(d_mlp: int, params: NormParams) -> RMSNorm:
    from soluscope.norms import RMSNorm

    return RMSNorm(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    label="SoLU + RMSNorm",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces mlp.ln by this norm
    role="per_token",
    build_norm=build_norm,
    params=NormParams,
    after="solu_frozen_rms",
    adds="a per-token scale from the mean square, with its gradient",
    twin="solu_frozen_rms",
)
