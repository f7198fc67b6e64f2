"""x e^x, then a LayerNorm: SoLU + LN without the softmax, which LayerNorm would undo if it had no epsilon.

LN(SoLU(x)) with epsilon eps equals LN(x e^x / N) with the per-token epsilon eps (Z / N)^2: softmax's denominator Z
cancels in everything but epsilon. So this variant and SoLU + LN differ only at tokens where epsilon counts. At a
kappa near 0 they are the same function. At a larger kappa their losses differ by the effect of Z through epsilon.

The role is `other`: as a second arm with LayerNorm it would repeat the tests of SoLU + LN.

Source: Elhage et al. 2022, section 4.3; protocol.md section 1.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import NormParams, exponential_unit

if TYPE_CHECKING:
    from soluscope.norms import LayerNorm


def build_norm(d_mlp: int, params: NormParams) -> LayerNorm:
    from soluscope.norms import LayerNorm

    return LayerNorm(d_mlp, params.epsilon(d_mlp))


VARIANT = Variant(
    label="x exp(x) + LN",
    build_nonlinearity=exponential_unit,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces the nonlinearity
    role="other",
    build_norm=build_norm,
    params=NormParams,
    after="expu",
    adds="LayerNorm in place of a constant",
)
