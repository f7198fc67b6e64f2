"""C1, graded: smearing as Elhage et al. saw it. The gain lifts B tokens above the weak activations of A tokens.

In `smear_shared` every neuron has A's activation above B's above 0, before the norm and after it: its
ranks never change, and a probe of ranks (P11) must find nothing there. Here A tokens have two levels.

32 neurons, eps 1e-12; activations are planned after SoLU (`_shell.pre_for`). The first 16 neurons carry the
signal: an A token has 4 on one of them and .6 on the other 15, a B token .06 on 8 of them; 0 elsewhere.
The means are m_A = 13 / 32 = .40625 and m_B = .48 / 32 = .015, the gains, 1 / sqrt(mean a^2 - m^2),

    gain of A = (21.4 / 32 - m_A^2)^(-1/2) = 1.40899     gain of B = 4 / (sqrt(3) .06) = 38.490

    on a signal neuron    A strong    A weak    B on     B off
    a                     4           .6        .06      0
    g a                   5.64        .85       2.31     0
    a - m                 3.59        .19       .045     -.015
    g (a - m)             5.06        .27       1.73     -.58

Before the norm every A token is above every B token: a weak activation still means A. The gain puts B
tokens between the strong and the weak activations of A tokens. Centring alone does not change the order.
The logits are a random readout of hook_post at the signal neurons.

Source: protocol.md section 7, P11; Elhage et al. 2022, section 6.4.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell

N, N_SIGNAL, EPS = 32, 16, 1e-12
STRONG, WEAK, ON = 4.0, 0.6, 0.06
A_EACH, N_B = 2, 32
"""Number of A tokens that are strong on the same neuron, and of B tokens."""
VOCAB = (
    _shell.BOS_TEXT,
    *(f"A{k}" for k in range(A_EACH * N_SIGNAL)),
    *(f"b{k}" for k in range(N_B)),
)


def build() -> Planted:
    low = ON * _shell.codes(0, 1 + N_B, 8, N, slice(0, N_SIGNAL))
    high = (STRONG - WEAK) * _shell.one_hot(N_SIGNAL, N).repeat(A_EACH, 1)
    high[:, :N_SIGNAL] += WEAK
    pre = _shell.pre_for(torch.cat([low[:1], high, low[1:]]))
    effect = _shell.random_effect(1, _shell.post(pre, EPS), len(VOCAB))
    effect[N_SIGNAL:] = 0
    model = _shell.anchored(pre, effect, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C1, graded",
    truth="On every neuron that fires, the gain lifts B tokens above the weak activations of A tokens; centring "
    "does not.",
    build=build,
)
