"""SoLU times one constant: no centring, no per-neuron gain, no bias, no per-token scale.

If this alone recovers what LayerNorm wins, LayerNorm's part was the size of the output.

Source: science.md section 3.
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
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu",
    adds="an output scale, one number for all tokens",
)
