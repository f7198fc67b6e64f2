"""c x e^x, neuron by neuron, without a norm: SoLU without the softmax's coupling of neurons.

If this variant is as good as SoLU times a constant, that arm does not require lateral inhibition. The constant c is
`mid.gain` / d_mlp. Beyond x = 30 the exponential is held at e^30, so that it cannot overflow.

The role is `other`: the plain arm, the static arms and the arms with LayerNorm all have SoLU before the gain.

Source: Elhage et al. 2022, section 4.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, exponential_unit

if TYPE_CHECKING:
    from soluscope.norms import Gain


def build_norm(d_mlp: int, params: StaticParams) -> Gain:
    from soluscope.norms import Gain

    return Gain(d_mlp)


VARIANT = Variant(
    label="x exp(x)",
    build_nonlinearity=exponential_unit,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces the nonlinearity and mlp.ln
    role="other",
    build_norm=build_norm,
    params=StaticParams,
)
