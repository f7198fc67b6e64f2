"""P16's positive control: a ReLU network of few neurons, whose output moves in steps with plateaus between them.

16 neurons and no mid norm, so every step comes from the nonlinearity. Token k has x = 1 on neuron k and is
silent elsewhere; BOS is silent on all neurons. With c = cos(pi/8) and embeddings that are exactly
orthogonal, at an angle theta on the way from token j to token k

    x_j = (cos theta - c) / (1 - c)     x_k = (sin theta - c) / (1 - c)     all others: -c / (1 - c) = -12.1

so neuron j fires up to 22.5 degrees and neuron k from 67.5 to 112.5 degrees. Between these ranges the MLP
writes nothing: a plateau. O = relu(x_j) u_j + relu(x_k) u_k, where the rows u of W_out have equal lengths
and pairwise cosine -1/15. From 0 to pi/2 the path falls from |u| to 0 and rises to |u| again, so its length
is 2 |u|; its first and last point are |u_j - u_k| = |u| sqrt(32 / 15) apart:

    length         2 / sqrt(32 / 15) = 1.36931, where a linear MLP has 1.0980
    longest step   (cos(31 h) - cos(32 h)) / (1 - c) / 2 = .030390, h = pi/256: the last step before silence
    polytopes      neuron j fires for 1/8 of the half turn, neuron k for 1/4, none for 5/8: exp(entropy) 2.461;
                   at 257 points, of which 32, 63 and 162, 2.4472

Source: protocol.md section 7, P16.
"""

from __future__ import annotations

import math

import torch

from soluscope.controls import Control, Planted, _shell, _unnormed

N, LOGIT = 16, 3.0
EDGE = math.cos(math.pi / 8)
"""A neuron fires where the cosine between the residual stream and its token exceeds this value."""
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
    truth="From one token to another the output falls to 0, stays there, and rises again: ReLU makes steps and "
    "plateaus without any norm.",
    build=build,
)
