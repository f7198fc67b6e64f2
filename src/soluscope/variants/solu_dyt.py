"""SoLU, then tanh(alpha a) gamma + beta: no statistics of the token, but neurons that saturate.

If this variant is as good as SoLU + LN, a bounded output is enough, and no neuron's output has to depend on the
other neurons' activations after SoLU. alpha is one number that training changes; `mid.gain` sets its start.

The tanh acts on each neuron separately, so it has no scale in LayerNorm's sense, and kappa, gain and r are
undefined. It multiplies an activation a by tanh(alpha a) / a, which is alpha for small a and falls as 1 / a for
large a. The norm declares `one_scale = False`: its hook_scale is a / tanh(alpha a) for each neuron, and probes
that need one gain for each token are left out with this reason. The role is `other` and not `static`, because
static arms show the effect of one gain for all tokens.

Source: Zhu et al. 2025, "Transformers without Normalization"; protocol.md section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import DynamicTanh


def build_norm(d_mlp: int, params: StaticParams) -> DynamicTanh:
    from soluscope.norms import DynamicTanh

    return DynamicTanh(d_mlp)


VARIANT = Variant(
    label="SoLU + tanh",
    nonlinearity=solu,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces mlp.ln by this norm
    role="other",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_scalar",
    adds="a tanh, per-neuron weights and a bias",
)
