"""SoLU times one constant, without centring, per-neuron weights, bias or per-token scale.

If this variant alone recovers the benefit of LN, the benefit comes from the size of the output.

Source: protocol.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import Gain


def build_norm(d_mlp: int, params: StaticParams) -> Gain:
    from soluscope.norms import Gain

    return Gain(d_mlp)


VARIANT = Variant(
    label="SoLU",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu",
    adds="an output scale, one number for all tokens",
)
