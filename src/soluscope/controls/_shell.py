"""Common shell of the planted models: one layer, no attention, and weights that follow from a plan.

A control plans two things for every token: its pre-activations, and the effect of its neurons on the
logits. W_O and W_pos are 0, so the next token depends on the current token alone: a model is a table with
one row per token. The residual stream has three blocks: the identity of the token, the MLP's output
about the next token, and an anchor that no logit reads. The anchor is so long that the MLP cannot change
ln_final's scale. A logit therefore equals its planned value to a relative error of (|O| / anchor)^2 = 1e-8.

Source: protocol.md section 6, "Common shell".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.special import logsumexp, wrightomega
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope.data.streams import Stream

BOS = 0
BOS_TEXT = "<|BOS|>"
BOS_LOGIT = -30.0
"""BOS is never the next token: its probability is below 1e-12."""

N_CORRUPTIONS = 5
ANCHOR = 1e4
"""Length of the anchor, as a multiple of the longest output of the MLP."""


@dataclass(frozen=True)
class Pair:
    """A clean last word, the words that may replace it, and the two answers that distinguish them."""

    clean: int
    corrupt: tuple[int, ...]
    """N_CORRUPTIONS tokens, each of which may replace `clean`."""
    right: int
    """Answer of the clean row: the next token after `clean`."""
    wrong: int
    """Answer of the corrupt rows."""


def assemble(
    W_E: Float[Tensor, "d_vocab d_model"],
    pre: Float[Tensor, "d_vocab d_mlp"],
    W_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    eps: float,
) -> HookedTransformer:
    """Return a HookedTransformer with these weights, whose `hook_pre` at token t is `pre[t]`.

    Args:
        W_E: embeddings. Rows must be linearly independent, also after their means are subtracted, and
            must all have the same mean and the same norm, so that ln2's scale is one constant.
        pre: planned pre-activations; W_in is solved for them.
        W_out: output weights of the MLP.
        b_out: output bias of the MLP.
        W_U: unembedding.
        eps: epsilon of the mid norm. ln2 and ln_final have 1e-12.

    Raises:
        ValueError: if no W_in gives `pre`.
    """
    d_vocab, d_model = W_E.shape
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=d_model, n_ctx=64, d_head=1, n_heads=1, d_mlp=pre.shape[1],
            d_vocab=d_vocab, act_fn="solu_ln", normalization_type="LN", eps=1e-12,
            dtype=torch.float64, device="cpu", init_weights=False, model_name="planted",
        ),
        move_to_device=False,
    ).eval()  # fmt: skip
    block = model.blocks[0]
    block.mlp.ln.eps = eps
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (block.ln1, block.ln2, block.mlp.ln, model.ln_final):
            norm.w.fill_(1.0)
        model.embed.W_E.copy_(W_E)
        seen = block.ln2(W_E)
        W_in = torch.linalg.lstsq(seen, pre, driver="gels").solution
        if not torch.allclose(seen @ W_in, pre, atol=1e-10):
            raise ValueError(
                "no W_in gives these pre-activations, since W_E's rows depend on each other: pass a W_E whose "
                "rows are linearly independent after centring"
            )
        block.mlp.W_in.copy_(W_in)
        block.mlp.W_out.copy_(W_out)
        block.mlp.b_out.copy_(b_out)
        model.unembed.W_U.copy_(W_U)
        model.unembed.b_U[BOS] = BOS_LOGIT
    return model


def anchored(
    pre: Float[Tensor, "d_vocab d_mlp"], effect: Float[Tensor, "d_mlp d_vocab"], eps: float
) -> HookedTransformer:
    """Return the model whose logits at token t are post(t) @ effect, and -30 for BOS.

    Residual dimensions: one per token for its identity; one per token for its logit; two for the anchor,
    (R, -R) / sqrt 2, which does not change the mean. ln_final subtracts the mean from all logits alike, so
    no probability depends on the mean.

    Args:
        pre: pre-activations of each token.
        effect: change of each logit per unit of a neuron's hook_post. Rows must have mean 0.
        eps: epsilon of the mid norm.
    """
    d_vocab = len(pre)
    nothing = torch.zeros(d_vocab, d_vocab, dtype=pre.dtype)
    identity = torch.eye(d_vocab, dtype=pre.dtype)
    W_E = torch.cat([identity, nothing, nothing[:, :2]], dim=1)
    W_out = torch.nn.functional.pad(effect, (d_vocab, 2))
    anchor = ANCHOR * float((post(pre, eps) @ effect).norm(dim=-1).max())
    b_out = torch.zeros_like(W_E[0])
    b_out[-2], b_out[-1] = anchor / 2**0.5, -anchor / 2**0.5
    scale = (W_E[1] + b_out).std(correction=0)
    W_U = torch.cat([nothing, identity, nothing[:2]]) * scale
    return assemble(W_E, pre, W_out, b_out, W_U, eps)


def post(pre: Float[Tensor, "token d_mlp"], eps: float) -> Float[Tensor, "token d_mlp"]:
    """Return LayerNorm(SoLU(pre)), without gamma and beta."""
    mid = pre * pre.softmax(-1)
    return torch.nn.functional.layer_norm(mid, mid.shape[-1:], eps=eps)


def pre_for(mid: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "token d_mlp"]:
    """Return the pre-activations that SoLU maps to `mid`.

    a_j = x_j e^{x_j} / Z gives x_j = W(a_j Z), with Lambert's W; sum_j e^{x_j} = Z then determines Z.
    exp(W(a_j Z)) / Z decreases in Z from infinity to 0 for every a_j >= 0, so exactly one Z solves this.

    Raises:
        ValueError: if an activation is below 0, where x is not unique.
    """
    rows = []
    for a in mid.numpy():
        if a.min() < 0:
            raise ValueError(
                f"an activation is {a.min():g}, for which the pre-activation is not unique: pass activations "
                "of 0 or more"
            )
        with np.errstate(divide="ignore"):
            log_a = np.log(a)  # W(a Z) is wrightomega(log a + log Z), which never overflows

        def excess(log_z: float, log_a: Any = log_a) -> float:
            """Return log(sum_j e^{x_j} / Z) at this Z."""
            return float(logsumexp(wrightomega(log_a + log_z)) - log_z)

        low = high = np.log(len(a))  # all x are 0 or more, so Z is N or more
        while excess(high) > 0:
            high += 1.0
        log_z = brentq(excess, low - 1e-9, high, xtol=1e-14) if high > low else low
        rows.append(wrightomega(log_a + log_z))
    return torch.from_numpy(np.stack(rows))


def normal(seed: int, *shape: int) -> Tensor:
    """Draw standard normal numbers of this shape, in fp64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_effect(
    seed: int, like: Float[Tensor, "token d_mlp"], d_vocab: int, sd: float = 2.0
) -> Float[Tensor, "d_mlp d_vocab"]:
    """Draw a random readout of hook_post whose logits have standard deviation `sd` at the rms norm of `like`.

    Rows have mean 0, and the column of BOS's logit is 0.
    """
    effect = normal(seed, like.shape[1], d_vocab - 1)
    effect *= sd / like.square().sum(-1).mean().sqrt()
    effect -= effect.mean(-1, keepdim=True)
    return torch.nn.functional.pad(effect, (1, 0))


def one_hot(n: int, d_mlp: int, first: int = 0) -> Float[Tensor, "n d_mlp"]:
    """Return rows in which token k is on neuron `first` + k, modulo d_mlp."""
    return torch.eye(n, d_mlp, dtype=torch.float64).roll(first, dims=1)


def codes(
    seed: int, n: int, size: int, d_mlp: int, block: slice = slice(None)
) -> Float[Tensor, "n d_mlp"]:
    """Draw rows in which each token is on `size` random neurons of `block`; no two tokens share all of them."""
    rng = np.random.default_rng(seed)
    neurons = np.arange(d_mlp)[block]
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < n:
        drawn[tuple(sorted(rng.choice(neurons, size, replace=False).tolist()))] = None
    rows = torch.zeros(n, d_mlp, dtype=torch.float64)
    for row, members in zip(rows, drawn, strict=True):
        row[list(members)] = 1.0
    return rows


def logits(model: HookedTransformer) -> Float[Tensor, "d_vocab d_vocab"]:
    """Return the logits of the next token after each token."""
    with torch.no_grad():
        table: Tensor = model(torch.arange(model.cfg.d_vocab)[:, None])[:, 0]
    return table


def natural(
    model: HookedTransformer, vocab: Sequence[str], n_rows: int = 48, width: int = 33
) -> Stream:
    """Draw rows token by token from the model itself, so that no model has a lower expected loss on them.

    A constant that is fitted to n such tokens raises the loss on other tokens by about 1 / (2 n) nats even
    where the true effect is 0. A negative control with a bound of .001 nats thus needs some thousand tokens.
    """
    chances = logits(model).softmax(-1).numpy()
    chances[:, BOS] = 0.0
    ceilings = chances.cumsum(-1) / chances.sum(-1, keepdims=True)
    rows = np.full((n_rows, width), BOS)
    draws = np.random.default_rng(0).random((n_rows, width))
    for pos in range(1, width):
        rows[:, pos] = (ceilings[rows[:, pos - 1]] < draws[:, pos, None]).sum(-1)
    return _stream("natural", rows, range(n_rows), vocab)


def pairs(selected: Iterable[Pair], vocab: Sequence[str]) -> Stream:
    """Return rows of BOS, two words, the last word and the answer.

    Each pair is one string: its clean row, then its corruptions. The logit difference of a pair is
    logit[right] - logit[wrong] at the second-to-last position of a row.
    """
    rows, strings = [], []
    rng = np.random.default_rng(1)
    for number, pair in enumerate(selected):
        context = rng.integers(1, len(vocab), 2).tolist()
        rows.append([BOS, *context, pair.clean, pair.right])
        rows += [[BOS, *context, corrupt, pair.wrong] for corrupt in pair.corrupt]
        strings += [number] * (1 + len(pair.corrupt))
    return _stream("pairs", np.array(rows), strings, vocab)


def answers(model: HookedTransformer) -> list[tuple[int, int]]:
    """Return the most likely and the least likely next token after each token except BOS."""
    table = logits(model)[1:, 1:]
    likeliest, unlikeliest = (1 + table.argmax(-1)).tolist(), (1 + table.argmin(-1)).tolist()
    return list(zip(likeliest, unlikeliest, strict=True))


def contrasts(model: HookedTransformer, clean: Iterable[int], corrupt: Sequence[int]) -> list[Pair]:
    """Return a pair for each clean token: its most and least likely answer, and the best corruptions.

    The corruptions are the N_CORRUPTIONS tokens after which logit[right] - logit[wrong] is lowest.

    Args:
        model: a planted model.
        clean: clean tokens, one per pair.
        corrupt: tokens that may replace a clean token; the clean token itself need not be excluded.
    """
    table, best = logits(model), answers(model)
    result = []
    for token in clean:
        right, wrong = best[token - 1]
        by_contrast = sorted(corrupt, key=lambda c: float(table[c, right] - table[c, wrong]))
        result.append(Pair(token, tuple(by_contrast[:N_CORRUPTIONS]), right, wrong))
    return result


def _stream(name: str, rows: object, strings: Iterable[int], vocab: Sequence[str]) -> Stream:
    tokens = torch.as_tensor(rows)
    string = torch.tensor(list(strings))[:, None].expand(tokens.shape)
    return Stream(
        name, tokens, string, torch.ones_like(tokens, dtype=torch.bool), BOS, tuple(vocab)
    )
