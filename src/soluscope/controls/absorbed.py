"""C5: a gain that varies and reaches nothing. The MLP writes along the anchor alone.

Pre-activations, hence gains, are those of `smear_shared`: .479039 after A tokens and 38.865 after B
tokens, sd(log g) = 2.2. W_out has rank one and points along the anchor, b_out, which no logit reads;
the logits come from the embeddings, by a random table. The MLP can only change the anchor's length R, at
most by 1e-6 of it whatever it makes of its neurons: |n| is sqrt(32) at every token, and R is 1e6 sqrt(32)
|w| for the row w of strengths. ln_final divides by that length, and the logits are of standard deviation
2, so no edit before or after the norm changes a loss by 1e-5 nats, and 81 times the gain not by 1e-3.

Source: science.md section 6, C5.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import EPS, VOCAB, pre


def build() -> Planted:
    x = pre()
    d_vocab = len(VOCAB)
    W_E = torch.eye(d_vocab, d_vocab + 2, dtype=x.dtype)
    unit = torch.zeros_like(W_E[0])
    unit[-2], unit[-1] = 0.5**0.5, -(0.5**0.5)
    strength = _shell.normal(2, x.shape[1])
    anchor = 1e6 * x.shape[1] ** 0.5 * float(strength.norm()) * unit  # hook_post has norm sqrt(N)
    table = 2 * _shell.normal(3, d_vocab, d_vocab)
    table[:, _shell.BOS] = 0
    W_U = torch.zeros_like(W_E).T.contiguous()
    W_U[:d_vocab] = table * (W_E[0] + anchor).std(correction=0)
    model = _shell.assemble(W_E, x, strength[:, None] * unit, anchor, W_U, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C5",
    truth="The gain varies as in smear_shared, and nothing that the MLP writes reaches a logit.",
    build=build,
)
