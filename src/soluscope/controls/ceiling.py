"""C14: smearing at a low r. Most tokens have their gain at its ceiling, 1 / sqrt(eps), and the others do not.

64 neurons, of which 32 stand in a circle. Token A_k has x = 12 on neuron k of the circle and 0 elsewhere; token
B_k has x = 1 on neuron k and the 7 after it, and 0 elsewhere. B tokens are about 70% of the text. As in
`smear_shared`, but with 64 neurons: a_hi = 12 e^12 / (e^12 + 63) = 11.9954, a_lo = e / (8 e + 56) = .034963, and

    s2 of A = a_hi^2 63 / 64^2 = 2.21316     s2 of B = a_lo^2 (1/8)(7/8) = 1.3370e-4
    eps = 25 s2 of B = .0033426              r of A = .9985, r of B = 1/26 = .0385
    gain of A = .6717                        gain of B = 16.961, at most 1 / sqrt(eps) = 17.297
    ratio 25.25

So r is below .05 at the typical token, and the gain differs 25-fold between tokens: amplification is relative:
the readout sees the gain of B over the gain of A. The readout of the circle's neurons varies smoothly round
it, so that the 8 neurons of a B token agree and its logits are nearly of the size of those of A (without that
they would be a fifth). As in `smear_shared`, no readout at one gain serves both codes: the least mean KL
divergence that any reaches, over the text, is .107 nats, where one distribution for all tokens has .326.

The lowest nine tenths of a B token's activations hold two of the 8 neurons of its code.

Source: protocol.md sections 1.3 and 6, C14.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import VOCAB, A, B

N, N_EACH, N_CODE = 64, 32, 8
A_LO = math.e / (N_CODE * math.e + N - N_CODE)
EPS = 25 * A_LO**2 * (N_CODE / N) * (1 - N_CODE / N)
WIDTH = 3.0
"""Distance on the circle over which the neurons' readouts resemble each other, in neurons."""
MORE_B = 1.0
"""Logits that every B token has more, so that B tokens are common."""


def pre() -> Tensor:
    """Return the pre-activations of BOS (which has the code of B_0), the A tokens and the B tokens."""
    each = _shell.one_hot(N_EACH, N)
    low = torch.stack([each.roll(-k, dims=0)[:N_CODE].sum(0) for k in range(N_EACH)])
    return torch.cat([low[:1], 12 * each, low])


def effect() -> Tensor:
    """Return the effect of each neuron on each logit, smooth round the circle; the rows have mean 0."""
    rough = _shell.random_effect(1, _shell.post(pre(), EPS)[list(A)], len(VOCAB), sd=1.5)
    ahead = (torch.arange(N_EACH)[:, None] - torch.arange(N_EACH)).remainder(N_EACH)
    distance = torch.minimum(ahead, N_EACH - ahead).double()
    smooth = rough.clone()
    smooth[:N_EACH] = (-(distance**2) / (2 * WIDTH**2)).exp() @ rough[:N_EACH]
    result: Tensor = smooth * rough[:N_EACH].norm() / smooth[:N_EACH].norm()
    return result


def build() -> Planted:
    model = _shell.anchored(pre(), effect(), EPS)
    model.unembed.b_U.data[list(B)] += MORE_B
    pairs = [*_shell.contrasts(model, B[:16], A), *_shell.contrasts(model, A[:16], B)]
    return Planted(
        model, {"natural": _shell.natural(model, VOCAB), "pairs": _shell.pairs(pairs, VOCAB)}
    )


CONTROL = Control(
    section="C14",
    truth="r is .0385 at most tokens, their gain is 25 times that of the others, on the same neurons, and no "
    "readout without a per-token gain predicts well after both.",
    build=build,
)
