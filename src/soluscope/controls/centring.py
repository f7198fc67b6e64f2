"""C8: centring reorders small activations, and the gain is one constant.

32 neurons, eps 1e-12; activations are planned after SoLU (`_shell.pre_for`). The first 16 neurons carry
the signal. A tokens have 1.2 on one of them and .3 +- .03 on the other 15; B tokens have .2 +- .03 on all
16 (the +- is the token's code). The last 16 neurons write nothing: one of them has a higher activation, the
other 15 have equal lower ones, and the two levels are solved for so that every token has

    variance .06, hence gain .06^(-1/2) = 4.0825 (to 1e-11); mean .4 at A tokens, .16 at B tokens

On every signal neuron all A tokens thus lie above all B tokens before the norm, and the sign of a small
a - m shows the class: it is between -.13 and -.07 at A tokens (except on the neuron at 1.2) and between
.01 and .07 at B tokens. After the norm B tokens lie above the weak A activations. Count as many of a
neuron's highest activations as there are A tokens: the lower ones among these belong to A tokens before
the norm and to B tokens after it. The gain alone (g a) reorders nothing; centring alone (a - m) causes all
of the reordering.

The logits read each signal neuron at random, and the sum of the signal neurons, which carries the class:
4.0825 (1.2 + 15 .3 - 16 .4) = -2.86 at A tokens and 4.0825 16 (.2 - .16) = 2.61 at B tokens, up to the
codes. After A, B tokens are more likely by 2.86 nats; after B, A tokens by 2.61. Without centring both
sums are above 0.

Source: protocol.md section 6, C8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soluscope.controls import Control, Planted, _shell

N, N_SIGNAL, N_EACH, EPS = 32, 16, 32, 1e-12
VARIANCE, MEAN_A, MEAN_B = 0.06, 0.4, 0.16
MAIN, WEAK_A, WEAK_B, CODE = 1.2, 0.3, 0.2, 0.03
VOCAB = (
    _shell.BOS_TEXT,
    *(f"A{k}" for k in range(N_EACH)),
    *(f"b{k}" for k in range(N_EACH)),
)


def mid() -> Tensor:
    """Return the activations of BOS (a B token), the A tokens and the B tokens."""
    is_a = torch.tensor([text.startswith("A") for text in VOCAB])
    level = torch.where(is_a, WEAK_A, WEAK_B).double()[:, None]
    signal = level + CODE * _shell.normal(0, len(VOCAB), N_SIGNAL).sign()
    a_tokens = is_a.nonzero().squeeze(-1)
    signal[a_tokens, a_tokens % N_SIGNAL] = MAIN
    mean = torch.where(is_a, MEAN_A, MEAN_B).double()
    # The last 16: 15 at u - v and one at u + 15 v. Their sum is 16 u, their sum of squares 16 u^2 + 240 v^2.
    n = N - N_SIGNAL
    u = (N * mean - signal.sum(-1)) / n
    squares = N * (VARIANCE + mean.square()) - signal.square().sum(-1)
    v = ((squares - n * u.square()) / (n * (n - 1))).sqrt()
    rest = (u - v)[:, None].repeat(1, n)
    tokens = torch.arange(len(VOCAB))
    rest[tokens, tokens % n] = u + (n - 1) * v
    return torch.cat([signal, rest], dim=-1)


def build() -> Planted:
    pre = _shell.pre_for(mid())
    d_vocab = len(VOCAB)
    signal = _shell.post(pre, EPS)[:, :N_SIGNAL]
    towards_a = torch.zeros(d_vocab, dtype=torch.float64)
    towards_a[1:] = torch.tensor([0.5 if text.startswith("A") else -0.5 for text in VOCAB[1:]])
    effect = torch.zeros(N, d_vocab, dtype=torch.float64)
    effect[:N_SIGNAL] = _shell.random_effect(1, signal, d_vocab, sd=1.0)
    effect[:N_SIGNAL] -= effect[:N_SIGNAL].mean(0)  # so that the sum carries only the class
    effect[:N_SIGNAL] += towards_a
    model = _shell.anchored(pre, effect, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C8",
    truth="The mean over neurons differs between two classes of tokens and the gain does not: centring alone "
    "reorders small activations, and the logits read their sign.",
    build=build,
)
