"""P16's positive control: a ReLU network of few neurons, whose output moves in steps with rests between.

16 neurons, no mid norm, no LayerNorm in sight: what steps there are come from the nonlinearity. Token k has
x = 1 on neuron k and is silent elsewhere; BOS is silent altogether. With c = cos(pi/8) and embeddings that are
exactly orthogonal, at an angle theta on the way from token j to token k

    x_j = (cos theta - c) / (1 - c)     x_k = (sin theta - c) / (1 - c)     all others: -c / (1 - c) = -12.1

so neuron j fires up to 22.5 degrees, neuron k from 67.5 to 112.5, and in between nothing is written: a
plateau. O = relu(x_j) u_j + relu(x_k) u_k, with rows u of W_out of one length and cosine -1/15. From 0 to
pi/2 the path is |u| down and |u| up, 2 |u| in all, and its ends are |u_j - u_k| = |u| sqrt(32 / 15) apart:

    length         2 / sqrt(32 / 15) = 1.36931, where a linear MLP has 1.0980
    longest step   (cos(31 h) - cos(32 h)) / (1 - c) / 2 = .030390, h = pi/256, the last one before silence
    polytopes      neuron j fires for 1/8 of the half turn, neuron k for 1/4, none for 5/8: exp(entropy) 2.461;
                   at 257 points, of which 32, 63 and 162, 2.4472

Source: science.md section 7, P16, "C+ relu with few neurons".
"""

from __future__ import annotations

import math

import torch

from soluscope.controls import Control, Planted, _shell, _unnormed

N, LOGIT = 16, 3.0
EDGE = math.cos(math.pi / 8)
"""A neuron fires where the cosine with its token exceeds this."""
VOCAB = (_shell.BOS_TEXT, *(f"w{k}" for k in range(N)))


def build() -> Planted:
    b_in = -EDGE / (1 - EDGE)
    pre = b_in + torch.nn.functional.pad(torch.eye(N, dtype=torch.float64), (0, 0, 1, 0)) / (
        1 - EDGE
    )
    effect = _unnormed.next_in_line(N, LOGIT)
    model = _unnormed.unnormed(pre, effect, torch.relu, b_in)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="P16 C+",
    truth="Turning from one token to another the output falls to nothing, rests, and rises again: steps and "
    "plateaus that ReLU makes, without any norm.",
    build=build,
)
