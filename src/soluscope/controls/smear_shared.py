"""C1: smearing. One population of neurons carries two codes, and only a per-token gain serves both.

32 neurons, eps 1e-12. Token A_k has x = 12 on neuron k and 0 elsewhere; token B_k has x = 1 on 8 of
the same 32 neurons and 0 elsewhere. The logits are a random linear readout of hook_post.

SoLU gives a_hi = 12 e^12 / (e^12 + 31) = 11.9977 on the neuron of an A token, a_lo = e / (8 e + 24) = .05942
on each of the 8 neurons of a B token, and 0 elsewhere. k equal activations a among 32 have
s2 = a^2 (k/32)(1 - k/32), so

    gain of A = 32 / (sqrt(31) a_hi) = .479039      gain of B = 4 / (sqrt(3) a_lo) = 38.865
    ratio 81.13                                     r = 1 to 2e-9
    sd(log g) = log(81.13) sqrt(p (1 - p)) = 2.195  with p, the share of A tokens, .525

The norm of post is sqrt(32) for both kinds, so both have logits of standard deviation 2.

No static readout suffices. With a constant gain the input of W_out is linear in a, and the activations of
B_k are (a_lo / a_hi) times the summed activations of those tokens A_j whose neurons j are B_k's 8. So in
every model that is linear in a, with bias b, l(B_k) - b = .00495 sum_j (l(A_j) - b): logits of 2 at B_k
require the logits of these A_j to sum to 400, but 8 such logits sum to about 6. Either B's predictions collapse
to the bias, or A's are ruined. The least mean KL divergence over tokens that any readout reaches at a
constant gain is .4020 nats; one distribution for all tokens has 1.5163. The problem is convex, and Newton's
method and a feasible point of its dual agree to 1e-4.

Source: protocol.md section 6, C1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soluscope.controls import Control, Planted, _shell

N, N_EACH, EPS = 32, 32, 1e-12
VOCAB = (
    _shell.BOS_TEXT,
    *(f"A{k}" for k in range(N_EACH)),
    *(f"b{k}" for k in range(N_EACH)),
)
A, B = range(1, 1 + N_EACH), range(1 + N_EACH, 1 + 2 * N_EACH)


def pre() -> Tensor:
    """Return the pre-activations of BOS (which has its own B code), the A tokens and the B tokens."""
    low = _shell.codes(0, 1 + N_EACH, 8, N)
    return torch.cat([low[:1], 12 * _shell.one_hot(N_EACH, N), low[1:]])


def build() -> Planted:
    x = pre()
    model = _shell.anchored(x, _shell.random_effect(1, _shell.post(x, EPS), len(VOCAB)), EPS)
    pairs = [*_shell.contrasts(model, B[:16], A), *_shell.contrasts(model, A[:16], B)]
    return Planted(
        model, {"natural": _shell.natural(model, VOCAB), "pairs": _shell.pairs(pairs, VOCAB)}
    )


CONTROL = Control(
    section="C1",
    truth="The gain of B tokens is 81 times that of A tokens, on the same neurons, and no readout without a "
    "per-token gain predicts well after both.",
    build=build,
)
