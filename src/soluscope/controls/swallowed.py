"""C16: ln_final swallows the gain. The MLP's output is 10,000 times the rest of the stream.

The activations of `smear_shared`: the gain of B tokens is 81 times that of A tokens. Each code writes a
direction of the residual stream, with the length sqrt(32) W after the norm and W = 10,000 times the embedding's;
there is no anchor. ln_final divides by the stream's length, so the logits depend on the direction alone, and one
gain for all tokens changes a direction by at most 81 / 10,000. Freezing the gain costs less than .001 nats
with ln_final live, and over 1 nat with its scale frozen. Nothing follows about the mid norm from the zero: ln_final
rescales each token here, and would do so without the mid norm.

Source: protocol.md section 6, C16.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import EPS, VOCAB, pre

W = 1e4


def build() -> Planted:
    x = pre()
    d_vocab = len(VOCAB)
    post = _shell.post(x, EPS)
    effect = _shell.random_effect(1, post, d_vocab)
    nothing = torch.zeros(d_vocab, d_vocab, dtype=x.dtype)
    identity = torch.eye(d_vocab, dtype=x.dtype)
    W_E = torch.cat([identity, nothing], dim=1)
    W_out = W * torch.nn.functional.pad(effect, (d_vocab, 0))
    scale = (post @ W_out).std(dim=-1, correction=0).mean()
    W_U = torch.cat([nothing, identity]) * scale / W
    model = _shell.assemble(W_E, x, W_out, torch.zeros_like(W_E[0]), W_U, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C16",
    truth="The gain varies as in smear_shared, and ln_final's division makes the logits independent of it.",
    build=build,
)
