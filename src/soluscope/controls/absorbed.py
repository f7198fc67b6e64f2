"""C5: the gain varies and has no effect. The MLP writes along the anchor alone.

Pre-activations, and hence gains, are those of `smear_shared`: .479039 after A tokens and 38.865 after B
tokens, sd(log g) = 2.2. W_out has rank one and points along the anchor, b_out, which no logit reads.
The logits come from the embeddings through a random table. The MLP can only change the length R of the
anchor, and by a share of at most 1e-6 whatever its neurons do: |n| is sqrt(32) at every token, and R is
1e6 sqrt(32) |w| for the row w of strengths. ln_final divides by that length, and the logits have standard
deviation 2. So no edit before or after the norm changes a loss by 1e-5 nats, and even a gain 81 times as
high changes it by less than 1e-3 nats.

Source: protocol.md section 6, C5.
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
    truth="The gain varies as in smear_shared, and no logit reads the output of the MLP.",
    build=build,
)
