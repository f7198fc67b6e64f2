"""Planted models with any nonlinearity and no mid norm, for truths that a SoLU model cannot have.

As in `_shell.py`, a model is a table with one row per token, and an anchor keeps ln_final's scale
constant. Each token has two dimensions to itself, on which its embedding is +1 and -1. Embeddings are
therefore exactly orthogonal and have mean 0, so ln2's centring changes nothing. Where the residual stream
turns by theta from token j to token k, the pre-activations are exactly
b + cos(theta) (x_j - b) + sin(theta) (x_k - b).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope.controls import _shell


def unnormed(
    pre: Float[Tensor, "d_vocab d_mlp"],
    effect: Float[Tensor, "d_mlp d_vocab"],
    nonlinearity: Callable[[Tensor], Tensor],
    b_in: float = 0.0,
) -> HookedTransformer:
    """Return the model whose logits at token t are nonlinearity(pre[t]) @ effect, and -30 for BOS.

    Args:
        pre: pre-activations of each token, `b_in` included.
        effect: change of each logit per unit of a neuron. Rows must have mean 0.
        nonlinearity: an elementwise function.
        b_in: input bias, the same for every neuron.
    """
    d_vocab, d_mlp = pre.shape
    d_model = 3 * d_vocab + 2
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=d_model, n_ctx=64, d_head=1, n_heads=1, d_mlp=d_mlp, d_vocab=d_vocab,
            act_fn="relu", normalization_type="LN", eps=1e-12, dtype=torch.float64, device="cpu",
            init_weights=False, model_name="planted",
        ),
        move_to_device=False,
    ).eval()  # fmt: skip
    block = model.blocks[0]
    block.mlp.act_fn = nonlinearity
    identity = torch.eye(d_vocab, dtype=pre.dtype)
    logits = slice(2 * d_vocab, 3 * d_vocab)
    anchor = _shell.ANCHOR * float((nonlinearity(pre) @ effect).norm(dim=-1).max())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (block.ln1, block.ln2, model.ln_final):
            norm.w.fill_(1.0)
        model.embed.W_E[:, :d_vocab] = identity
        model.embed.W_E[:, d_vocab : 2 * d_vocab] = -identity
        seen = block.ln2(model.embed.W_E)
        block.mlp.W_in.copy_(torch.linalg.lstsq(seen, pre - b_in, driver="gels").solution)
        block.mlp.b_in.fill_(b_in)
        block.mlp.W_out[:, logits] = effect
        block.mlp.b_out[-2:] = torch.tensor([anchor, -anchor]) / 2**0.5
        scale = (model.embed.W_E[1] + block.mlp.b_out).std(correction=0)
        model.unembed.W_U[logits] = identity * scale
        model.unembed.b_U[_shell.BOS] = _shell.BOS_LOGIT
    return model


def next_in_line(n: int, logit: float) -> Float[Tensor, "n n+1"]:
    """Return the readout in which neuron k raises the logit of token k + 2, and the last neuron that of token 1.

    Rows are `logit` (e - 1/n), with e one-hot: they have mean 0, squared norm logit^2 (1 - 1/n) and pairwise
    inner product -logit^2 / n. The column of BOS is 0.
    """
    rows = logit * (torch.eye(n, dtype=torch.float64).roll(1, dims=1) - 1 / n)
    return torch.nn.functional.pad(rows, (1, 0))
