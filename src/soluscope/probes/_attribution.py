"""Direct logit attribution of the last MLP: what it, and each of its neurons, adds to the target's logit.

Logits are centred over the vocabulary: the mean logit moves no probability. ln_final's scale is the
one the token has with everything in place; that it would change without the MLP is what makes this an
approximation (science.md P17).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun


def target_direction(run: HookedRun) -> Float[Tensor, "token d_model"]:
    """u_y: the residual stream's product with it, over ln_final's scale, is the target's centred logit.

    ln_final's weights are in it, and its centring where it has one; its bias and the unembedding's
    add the same at every edit and are left out. nan where there is no target.
    """
    out = run.readout
    target = run.target.clamp(min=0)
    direction = (out.W_U - out.W_U.mean(-1, keepdim=True))[:, target].T * out.ln_w
    if out.ln_centred:
        direction = direction - direction.mean(-1, keepdim=True)
    return direction.where((run.target >= 0)[:, None], torch.nan)


def final_scale(run: HookedRun, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
    """ln_final's denominator for a residual stream."""
    if run.readout.ln_centred:
        resid = resid - resid.mean(-1, keepdim=True)
    return (resid.square().mean(-1) + run.readout.ln_eps).sqrt()


def resid_final(run: HookedRun) -> Float[Tensor, "token d_model"]:
    """The residual stream that ln_final reads."""
    return run.resid_mid + run.post @ run.readout.W_out + run.readout.b_out


def contributions(run: HookedRun) -> Float[Tensor, "token d_mlp"]:
    """c_tj = h_tj W_out[j] . u_y / S, each neuron's direct attribution; nan where there is no target.

    h is post, so a mid norm's gamma and beta are in it; b_out, the same at every token, is in no
    neuron's share.
    """
    scale = final_scale(run, resid_final(run))
    return run.post * (target_direction(run) @ run.readout.W_out.T) / scale[:, None]


def with_readout(run: HookedRun, resid_mid: Tensor | None = None, **weights: Any) -> HookedRun:
    """`run` with other weights after the mid norm, and the losses that it has with them."""
    changed = replace(
        run,
        readout=replace(run.readout, **weights),
        resid_mid=run.resid_mid if resid_mid is None else resid_mid,
    )
    return replace(changed, loss=loss_at_post(changed, changed.post))


def reading_one_neuron(run: HookedRun) -> HookedRun:
    """A planted run of two neurons whose first one writes x = post on logits of -x and x.

    An epsilon of 1e24 under weights 1e12 times as large makes ln_final's scale one number.
    """
    run = replace(run, readout=replace(run.readout, ln_centred=False, ln_eps=1e24))
    return with_readout(
        run,
        resid_mid=torch.zeros_like(run.resid_mid),
        W_out=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        W_U=torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) * 1e12,
    )
