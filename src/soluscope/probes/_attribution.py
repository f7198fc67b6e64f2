"""Direct logit attribution of the last MLP and of each of its neurons to the target's logit.

Logits are centred over the vocabulary, because the mean logit changes no probability. ln_final's scale is the
token's scale with everything in place. Without the MLP the scale would change, so the attribution is an
approximation (protocol.md section 7 P17).
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
    """Return u_y, the direction of the residual stream that raises the target's centred logit.

    The product of the residual stream and u_y, divided by ln_final's scale, is the target's centred
    logit. u_y contains ln_final's weights, and ln_final's centring if it centres. The biases of
    ln_final and of the unembedding are left out, because they add the same amount in every edit. nan
    where there is no target.
    """
    out = run.readout
    target = run.target.clamp(min=0)
    direction = (out.W_U - out.W_U.mean(-1, keepdim=True))[:, target].T * out.ln_w
    if out.ln_centred:
        direction = direction - direction.mean(-1, keepdim=True)
    return direction.where((run.target >= 0)[:, None], torch.nan)


def final_scale(run: HookedRun, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
    """Return ln_final's denominator for a residual stream."""
    if run.readout.ln_centred:
        resid = resid - resid.mean(-1, keepdim=True)
    return (resid.square().mean(-1) + run.readout.ln_eps).sqrt()


def resid_final(run: HookedRun) -> Float[Tensor, "token d_model"]:
    """Return the residual stream that ln_final reads."""
    return run.resid_mid + run.post @ run.readout.W_out + run.readout.b_out


def contributions(run: HookedRun) -> Float[Tensor, "token d_mlp"]:
    """Return each neuron's direct attribution, c_tj = h_tj W_out[j] . u_y / S.

    h is post, so c contains the mid norm's gamma and beta. b_out is the same at every token and belongs
    to no neuron's share. nan where there is no target.
    """
    scale = final_scale(run, resid_final(run))
    return run.post * (target_direction(run) @ run.readout.W_out.T) / scale[:, None]


def with_readout(run: HookedRun, resid_mid: Tensor | None = None, **weights: Any) -> HookedRun:
    """Return `run` with other weights after the mid norm, and with its losses recomputed."""
    changed = replace(
        run,
        readout=replace(run.readout, **weights),
        resid_mid=run.resid_mid if resid_mid is None else resid_mid,
    )
    return replace(changed, loss=loss_at_post(changed, changed.post))


def reading_one_neuron(run: HookedRun) -> HookedRun:
    """Return a planted run of two neurons whose first neuron writes x = post; the logits are -x and x.

    ln_final's epsilon is 1e24 and W_U is 1e12 times as large, which makes ln_final's scale constant.
    """
    run = replace(run, readout=replace(run.readout, ln_centred=False, ln_eps=1e24))
    return with_readout(
        run,
        resid_mid=torch.zeros_like(run.resid_mid),
        W_out=torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        W_U=torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64) * 1e12,
    )
