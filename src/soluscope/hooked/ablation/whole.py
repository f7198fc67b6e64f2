"""Edits of a token's whole hidden layer: another gain, another post, and means for mean ablation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from soluscope.hooked.ablation.readout import (
    TOKENS_AT_ONCE,
    FinalNorm,
    Stage,
    centre_resid,
    cross_entropy,
    output_bias,
    resid_of,
    tile_size,
    token_blocks,
    unembed,
)
from soluscope.hooked.activations import HookedRun


@torch.no_grad()
def loss_at_gain(
    run: HookedRun, gains: Float[Tensor, "token edit"], final_norm: FinalNorm = "live"
) -> Float[Tensor, "token edit"]:
    """Return each token's loss with the mid norm's gain replaced by `gains`.

    post = gain * (centred * gamma) + beta, whether or not the norm centres. So R splits into a static part
    r0 and a part o that is proportional to the gain: R' = r0 + (new gain / old gain) o. Two
    vocabulary-length vectors per token then give the loss at any gain.

    Args:
        run: activations of a model with a mid norm of that form, or without a mid norm (gain 1).
        gains: one or more gains per token, above 0.
        final_norm: treatment of ln_final after the edit.

    Returns:
        Nats; nan for a token without a target.

    Source: protocol.md section 8.4. Tests compare the losses with brute-force hooks.
    """
    out, bias = run.readout, output_bias(run)
    losses = torch.full_like(gains, torch.nan)
    with_target = (run.target >= 0).nonzero().squeeze(-1)
    n_at_once = max(1, tile_size(gains) // (gains.shape[1] * len(bias)))
    for block in token_blocks(with_target, run, 8):
        alpha = gains[block] / run.gain[block, None]  # [token edit]
        r0 = centre_resid(run, run.resid_mid[block] + out.b_out + out.beta @ out.W_out)
        o = centre_resid(run, (run.post[block] - out.beta) @ out.W_out)
        square = (
            r0.square().mean(-1, keepdim=True)
            + 2 * alpha * (r0 * o).mean(-1, keepdim=True)
            + alpha.square() * o.square().mean(-1, keepdim=True)
        )  # [token edit]
        if final_norm == "frozen":
            square = (r0 + o).square().mean(-1, keepdim=True).expand_as(alpha)
        scale = (square + out.ln_eps).sqrt()
        A0, Ao = unembed(run, r0), unembed(run, o)  # [token d_vocab]
        weights = torch.stack([1 / scale, alpha / scale, torch.ones_like(scale)], dim=-1)
        vectors = torch.stack([A0, Ao, bias.expand_as(A0)], dim=1)
        target = run.target[block, None].expand_as(alpha)
        parts = (part.split(n_at_once) for part in (weights, vectors, target))
        losses[block] = torch.cat([cross_entropy(w @ v, y) for w, v, y in zip(*parts, strict=True)])
    return losses


@torch.no_grad()
def loss_at_post(
    run: HookedRun, post: Float[Tensor, "token d_mlp"], final_norm: FinalNorm = "live"
) -> Float[Tensor, " token"]:
    """Return each token's loss with hook_post replaced by `post`: any edit of any set of neurons at once.

    Args:
        run: activations of the model's last MLP.
        post: replacement of run.post. Zeros remove the neurons' whole output; b_out stays.
        final_norm: treatment of ln_final after the edit.

    Returns:
        Nats; nan for a token without a target.

    Source: protocol.md section 8.2, at the cost of one unembedding per token.
    """
    bias = output_bias(run)
    losses = torch.full_like(post[:, 0], torch.nan)
    for block in token_blocks((run.target >= 0).nonzero().squeeze(-1), run, 4):
        resid = resid_of(run, block, post)
        scale_resid = resid if final_norm == "live" else resid_of(run, block, run.post)
        scale = (scale_resid.square().mean(-1, keepdim=True) + run.readout.ln_eps).sqrt()
        losses[block] = cross_entropy(bias + unembed(run, resid) / scale, run.target[block])
    return losses


@torch.no_grad()
def disjoint_mean(run: HookedRun, stage: Stage) -> Float[Tensor, "token d_mlp"]:
    """Return mean activations for mean ablation, over all other strings and without BOS.

    A mean that included the string of the token would restore part of the ablated activation.

    Returns:
        One row per token, equal within a string; nan if there is no other string.

    Source: protocol.md section 8.7.
    """
    values: Tensor = getattr(run, stage)
    _, owner = run.string.unique(return_inverse=True)
    content = (~run.is_bos).nonzero().squeeze(-1)
    counts = torch.bincount(owner[content], minlength=int(owner.max()) + 1)[:, None]
    sums = values.new_zeros(len(counts), values.shape[1], dtype=torch.float64)
    for block in content.split(TOKENS_AT_ONCE):
        sums.index_add_(0, owner[block], values[block].double())
    others = (sums.sum(0) - sums) / (counts.sum() - counts)  # 0 / 0 is nan
    return others.to(values.dtype)[owner]
