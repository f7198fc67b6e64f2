"""Exact closed forms: what the loss would be under an edit of the MLP, without running the model again.

In a one-layer model an edit of a token's MLP changes only that token's logits, so every token is a
problem of its own. All of it holds for the last layer of deeper models too.

Source: science.md section 8.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from soluscope.activations import HookedRun

TOKENS_AT_ONCE = 512

FinalNorm = Literal["live", "frozen"]
"""Whether ln_final rescales after the edit, or keeps the scale it had without it."""


@torch.no_grad()
def loss_at_gain(
    run: HookedRun, gains: Float[Tensor, "token edit"], final_norm: FinalNorm = "live"
) -> Float[Tensor, "token edit"]:
    """Each token's loss if the mid norm had multiplied by `gains` instead of its own gain.

    post = gain * (centred * gamma) + beta, so what W_out writes splits into a static part and one
    that is proportional to the gain: R' = r0 + (gain / own gain) * o. Two vectors over the
    vocabulary a token then give the loss at any gain.

    Args:
        run: activations of a model whose mid norm is of that form, or has none (own gain 1).
        gains: one or more gains a token, above 0.
        final_norm: what ln_final does.

    Returns:
        Nats, nan where the token has no target.

    Source: science.md section 8.4; tests hold it to brute-force hooks.
    """
    out = run.readout
    U = out.ln_w[:, None] * out.W_U  # [d_model d_vocab]
    bias = out.ln_b @ out.W_U + out.b_U  # [d_vocab]
    losses = torch.full_like(gains, torch.nan)
    for block in (run.target >= 0).nonzero().squeeze(-1).split(TOKENS_AT_ONCE):
        alpha = gains[block] / run.gain[block, None]  # [token edit]
        static = run.resid_mid[block] + out.b_out + out.beta @ out.W_out  # r0
        dynamic = (run.post[block] - out.beta) @ out.W_out  # o
        r0, o = (part - part.mean(-1, keepdim=True) for part in (static, dynamic))
        A0, Ao = r0 @ U, o @ U  # [token d_vocab]
        square = (
            r0.square().mean(-1, keepdim=True)
            + 2 * alpha * (r0 * o).mean(-1, keepdim=True)
            + alpha.square() * o.square().mean(-1, keepdim=True)
        )  # [token edit]
        if final_norm == "frozen":
            square = (r0 + o).square().mean(-1, keepdim=True).expand_as(alpha)
        scale = (square + out.ln_eps).sqrt()
        for edit in range(alpha.shape[1]):
            logits = bias + (A0 + alpha[:, edit, None] * Ao) / scale[:, edit, None]
            chosen = logits.gather(-1, run.target[block, None]).squeeze(-1)
            losses[block, edit] = logits.logsumexp(-1) - chosen
    return losses
