"""What the planted models share: one layer, no attention, and weights that follow from a plan.

A control plans, for every token, its pre-activations and what its neurons do to the logits. W_O and
W_pos are 0, so the next token depends on the current one alone: a model is a table with a row a token.
Three blocks of the residual stream hold what a token is, what the MLP says of the next one, and an
anchor that no logit reads. The anchor is so long that the MLP cannot move ln_final's scale, and a
logit is then what the plan says, to (|O| / anchor)^2 = 1e-8 of itself.

Source: science.md section 6, "Common shell".
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
"""Length of the anchor, in lengths of the longest that the MLP writes."""


@dataclass(frozen=True)
class Pair:
    """A clean last word, what may stand in its place, and the two answers that tell them apart."""

    clean: int
    corrupt: tuple[int, ...]
    """N_CORRUPTIONS tokens."""
    right: int
    """The clean row's answer: the next token after `clean`."""
    wrong: int
    """The corrupt rows' answer."""


def assemble(
    W_E: Float[Tensor, "d_vocab d_model"],
    pre: Float[Tensor, "d_vocab d_mlp"],
    W_out: Float[Tensor, "d_mlp d_model"],
    b_out: Float[Tensor, " d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    eps: float,
) -> HookedTransformer:
    """A HookedTransformer with these weights, whose `hook_pre` at token t is `pre[t]`.

    Args:
        W_E: linearly independent rows, also after their means are taken off. Of one mean and one
            norm, so that ln2's scale is one constant.
        pre: the plan; W_in is solved for it.
        eps: the mid norm's. ln2 and ln_final have 1e-12.

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
            raise ValueError("no W_in gives these pre-activations: W_E's rows depend on each other")
        block.mlp.W_in.copy_(W_in)
        block.mlp.W_out.copy_(W_out)
        block.mlp.b_out.copy_(b_out)
        model.unembed.W_U.copy_(W_U)
        model.unembed.b_U[BOS] = BOS_LOGIT
    return model


def anchored(
    pre: Float[Tensor, "d_vocab d_mlp"], effect: Float[Tensor, "d_mlp d_vocab"], eps: float
) -> HookedTransformer:
    """The model whose logits at token t are post(t) @ effect, and -30 for BOS.

    Residual dimensions: the token's own, one a token; the logits, one a token; two for the anchor,
    (R, -R) / sqrt 2, which leaves the mean alone. ln_final takes the mean off all logits alike, so
    that no probability depends on it.

    Args:
        pre: pre-activations of each token.
        effect: what one unit of a neuron's hook_post adds to each logit. Rows of mean 0.
        eps: the mid norm's.
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
    """LayerNorm of SoLU, without gain and bias."""
    mid = pre * pre.softmax(-1)
    return torch.nn.functional.layer_norm(mid, mid.shape[-1:], eps=eps)


def pre_for(mid: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "token d_mlp"]:
    """The pre-activations of which SoLU makes `mid`.

    a_j = x_j e^{x_j} / Z gives x_j = W(a_j Z), with Lambert's W; sum_j e^{x_j} = Z then fixes Z.
    exp(W(a_j Z)) / Z falls in Z for every a_j >= 0, from beyond all bounds to 0, so there is one Z.

    Raises:
        ValueError: if an activation is below 0, where x is not unique.
    """
    rows = []
    for a in mid.numpy():
        if a.min() < 0:
            raise ValueError(f"an activation is {a.min():g}: only 0 or more has one pre-activation")
        with np.errstate(divide="ignore"):
            log_a = np.log(a)  # W(a Z) is wrightomega(log a + log Z), which never overflows

        def excess(log_z: float, log_a: Any = log_a) -> float:
            """log(sum_j e^{x_j} / Z) at this Z."""
            return float(logsumexp(wrightomega(log_a + log_z)) - log_z)

        low = high = np.log(len(a))  # all x are 0 or more, so Z is N or more
        while excess(high) > 0:
            high += 1.0
        log_z = brentq(excess, low - 1e-9, high, xtol=1e-14) if high > low else low
        rows.append(wrightomega(log_a + log_z))
    return torch.from_numpy(np.stack(rows))


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, fp64."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_effect(
    seed: int, like: Float[Tensor, "token d_mlp"], d_vocab: int, sd: float = 2.0
) -> Float[Tensor, "d_mlp d_vocab"]:
    """A random readout of hook_post, whose logits have standard deviation `sd` at the rms norm of `like`.

    Rows have mean 0, and nothing is written on BOS's logit.
    """
    effect = normal(seed, like.shape[1], d_vocab - 1)
    effect *= sd / like.square().sum(-1).mean().sqrt()
    effect -= effect.mean(-1, keepdim=True)
    return torch.nn.functional.pad(effect, (1, 0))


def one_hot(n: int, d_mlp: int, first: int = 0) -> Float[Tensor, "n d_mlp"]:
    """Token k on neuron `first` + k."""
    return torch.eye(n, d_mlp, dtype=torch.float64).roll(first, dims=1)


def codes(
    seed: int, n: int, size: int, d_mlp: int, block: slice = slice(None)
) -> Float[Tensor, "n d_mlp"]:
    """Each token on its own random `size` neurons of the `block`; no two tokens on the same ones."""
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
    """Logits of the next token after each token."""
    with torch.no_grad():
        table: Tensor = model(torch.arange(model.cfg.d_vocab)[:, None])[:, 0]
    return table


def natural(
    model: HookedTransformer, vocab: Sequence[str], n_rows: int = 48, width: int = 33
) -> Stream:
    """Rows drawn token by token from the model itself: no model has less loss on them, on average.

    A constant that is fitted to n such tokens costs about 1/(2 n) of loss on others although it changes
    nothing: what a negative control is asked to show within .001 nats takes some thousand tokens.
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
    """Rows BOS, two words, last word, answer; each pair is one string: clean, then its corruptions.

    The logit difference of a pair is logit[right] - logit[wrong] at a row's last position but one.
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
    """The likeliest and the unlikeliest next token after each token but BOS."""
    table = logits(model)[1:, 1:]
    likeliest, unlikeliest = (1 + table.argmax(-1)).tolist(), (1 + table.argmin(-1)).tolist()
    return list(zip(likeliest, unlikeliest, strict=True))


def contrasts(model: HookedTransformer, clean: Iterable[int], corrupt: Sequence[int]) -> list[Pair]:
    """For each clean token its likeliest and unlikeliest answer, and the tokens that reverse them most.

    Args:
        clean: a pair each.
        corrupt: what may stand in a clean token's place; it need not exclude that token.
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
