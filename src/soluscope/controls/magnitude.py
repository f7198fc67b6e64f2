"""C15: a per-token gain is needed and nothing is smeared. The same neuron is active at two heights.

32 neurons, eps 1e-12. Token A_k has x = 12 on neuron k and 0 elsewhere; token B_k has x = 1 on the same
neuron and 0 elsewhere, and the same answer. SoLU gives a_hi = 12 e^12 / (e^12 + 31) = 11.9977 and
a_lo = e / (e + 31) = .080616, and 0 elsewhere; so every code has one neuron, K = 1. LayerNorm erases the height:

    gain of A = 32 / (sqrt(31) a_hi) = .47904     gain of B = 32 / (sqrt(31) a_lo) = 71.293
    ratio 148.83

The logits are a random linear readout of hook_post, so they are equal for A_k and B_k. At one gain the
activations of B_k are those of A_k divided by 149. So in every model that is linear in a, with bias b, l(B_k) -
b = (l(A_k) - b) / 149: the prediction after B_k collapses to the bias, and the least mean KL divergence over
the text is .680 nats, where one distribution for all tokens has 1.53. A per-token gain is needed (H-dyn), but
no feature is spread over many neurons, and the activations that are small in a token are exactly 0 (H-smear is
false).

Source: protocol.md section 6, C15.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import VOCAB, A, B

N, N_EACH, EPS = 32, 32, 1e-12


def build() -> Planted:
    codes = _shell.one_hot(N_EACH, N)
    pre = torch.cat([codes[:1], 12 * codes, codes])
    model = _shell.anchored(pre, _shell.random_effect(1, _shell.post(pre, EPS), len(VOCAB)), EPS)
    pairs = [*_shell.contrasts(model, B[:16], A), *_shell.contrasts(model, A[:16], B)]
    return Planted(
        model, {"natural": _shell.natural(model, VOCAB), "pairs": _shell.pairs(pairs, VOCAB)}
    )


CONTROL = Control(
    section="C15",
    truth="The gain of B tokens is 149 times that of A tokens and their loss depends on it, but every token's "
    "code has one neuron.",
    build=build,
)
