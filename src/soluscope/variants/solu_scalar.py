"""SoLU times one number that training changes, without centring, per-neuron weights, bias or per-token scale.

If this variant recovers what SoLU + LN gains over a constant, the gain has to adapt in training, but not per token.

Source: protocol.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import LearnedGain


def build_norm(d_mlp: int, params: StaticParams) -> LearnedGain:
    from soluscope.norms import LearnedGain

    return LearnedGain(d_mlp)


VARIANT = Variant(
    label="SoLU, learned gain",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_gain",
    adds="training of the output scale",
)
