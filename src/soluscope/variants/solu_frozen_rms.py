"""SoLU, then an RMSNorm that multiplies by one constant instead of each token's own scale.

The static twin of solu_rms: each neuron has a gain, and there is no centring, bias or per-token scale.

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
    nonlinearity=solu,
    hooked_act_fn="solu_ln",  # so that hook_mid exists; the conversion puts our norm at mlp.ln
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_gain",
    adds="a per-neuron gain",
)
