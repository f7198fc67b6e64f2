"""Size of the MLP's output beside the residual stream, which decides how much ln_final rescales.

The stream after the MLP is r0 + o, and o is the part that the gain multiplies. ln_final keeps the direction only.
Where o is many times as long as r0, it undoes most of a change of the gain.

Source: protocol.md section 4, Cautions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from soluscope.hooked.activations import HookedRun


class OutputSize(NamedTuple):
    """Ratios of norms at each token; fp64."""

    whole: Float[Tensor, " token"]
    """|mlp_out| / |resid_mid|."""
    scaled: Float[Tensor, " token"]
    """|o| / |r0|, without their means over the stream's directions if ln_final centres."""


def output_size(run: HookedRun) -> OutputSize:
    """Return the size of the MLP's output beside the residual stream at each token."""
    out = run.readout
    scaled = ((run.post - out.beta) @ out.W_out).double()
    constant = (out.b_out + out.beta @ out.W_out).double()
    rest, mlp_out = run.resid_mid.double() + constant, scaled + constant
    if out.ln_centred:
        scaled, rest = (each - each.mean(-1, keepdim=True) for each in (scaled, rest))
    return OutputSize(
        mlp_out.norm(dim=-1) / run.resid_mid.double().norm(dim=-1),
        scaled.norm(dim=-1) / rest.norm(dim=-1),
    )
