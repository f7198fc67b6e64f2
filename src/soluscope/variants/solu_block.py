"""SoLU, then a LayerNorm, both within blocks of neurons: the large models of the SoLU paper.

Elhage et al. split softmax and LayerNorm over processors, so that neurons of different blocks influence each other
neither through Z nor through the gain. Here both have the same `mid.n_blocks` blocks, as in the paper. The dose is
kappa = eps (d_mlp / n_blocks)^2, because the outputs of SoLU depend on the width of a block.

A token has a scale for each block, so no single gain or r describes it. The norm declares `one_scale = False`: its
hook_scale has a value for each neuron, and probes that need one gain for each token are left out with this reason.
The role is `other`, because every comparison with role `per_token` rests on such a gain.

Source: Elhage et al. 2022, section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import BlockParams, SoLU

if TYPE_CHECKING:
    from torch import Tensor

    from soluscope.norms import BlockLayerNorm


def build_nonlinearity(d_mlp: int, params: BlockParams) -> Callable[[Tensor], Tensor]:
    params.check(d_mlp)
    return SoLU(params.n_blocks)


def build_norm(d_mlp: int, params: BlockParams) -> BlockLayerNorm:
    from soluscope.norms import BlockLayerNorm

    params.check(d_mlp)
    return BlockLayerNorm(d_mlp, params.epsilon(d_mlp), params.n_blocks)


VARIANT = Variant(
    label="SoLU + LN, blocks",
    build_nonlinearity=build_nonlinearity,
    hooked_act_fn="solu_ln",  # hook_mid exists only then; the conversion replaces the nonlinearity and mlp.ln
    role="other",
    build_norm=build_norm,
    params=BlockParams,
    after="solu_ln",
    adds="blocks of neurons, each with its own softmax and LayerNorm",
)
