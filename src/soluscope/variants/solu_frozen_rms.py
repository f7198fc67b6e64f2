"""SoLU, then an RMSNorm with one constant instead of the per-token scale.

The static twin of solu_rms has per-neuron weights, but no centring, no bias and no per-token scale.

Source: as solu_frozen_ln, for the RMSNorm of Zhang and Sennrich 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import FrozenRMSNorm


def build_norm(d_mlp: int, params: StaticParams) -> FrozenRMSNorm:
    from soluscope.norms import FrozenRMSNorm

    return FrozenRMSNorm(d_mlp)


VARIANT = Variant(
    label="SoLU + RMSNorm",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces mlp.ln by this norm
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_gain",
    adds="a per-neuron weight",
)
