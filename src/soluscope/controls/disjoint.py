"""C2: two codes on two separate blocks of neurons. Freezing the gain hurts, yet no per-token gain is needed.

64 neurons, eps 1e-12. Token A_k has x = 12 on neuron k of the first 32; token B_k has x = 1 on 8 of the
last 32; x is 0 elsewhere. As in `smear_shared`, but with 64 neurons: a_hi = 12 e^12 / (e^12 + 63) = 11.9954,
a_lo = e / (8 e + 56) = .03496, s2 = a^2 (k/64)(1 - k/64), and

    gain of A = 64 / (sqrt(63) a_hi) = .672197     gain of B = 8 / (sqrt(7) a_lo) = 86.482
    ratio 128.66                                   sd(log g) = 4.857 sqrt(p (1 - p)), p the share of A

One gain for all tokens therefore ruins both codes. But each neuron serves one kind of token, so the
constant gain 1 with gamma_j = .672197 on the first block and 86.482 on the second gives every logit
exactly: the mean m that is subtracted from all neurons adds m sum_j gamma_j W_out[j] to the output, and
W_out's rows sum to 0 within each block. A probe that reports that this model needs a per-token gain is wrong.

Source: protocol.md section 6, C2.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import VOCAB

N, N_EACH, EPS = 64, 32, 1e-12
BLOCKS = (slice(0, 32), slice(32, 64))
"""Neurons of the A tokens, and of the B tokens."""


def build() -> Planted:
    low = _shell.codes(0, 1 + N_EACH, 8, N, BLOCKS[1])
    pre = torch.cat([low[:1], 12 * _shell.one_hot(N_EACH, N), low[1:]])
    effect = _shell.random_effect(1, _shell.post(pre, EPS), len(VOCAB))
    for block in BLOCKS:
        effect[block] -= effect[block].mean(0)
    model = _shell.anchored(pre, effect, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C2",
    truth="The gain of B tokens is 129 times that of A tokens, and one constant gain with a per-neuron gamma "
    "computes the same logits.",
    build=build,
)
