"""P16's negative control: a linear MLP, whose output turns as smoothly as the residual stream does.

The model has the 16 neurons and the readout of `relu_few`, but no nonlinearity, no bias and no mid norm.
Token k has x = 1 on neuron k. On the way from token j to token k

    O = cos(theta) u_j + sin(theta) u_k     |dO / dtheta|^2 = |u|^2 (1 + sin(2 theta) / 15)

since the rows u of W_out have equal lengths and pairwise cosine -1/15. From 0 to pi/2 the path has length
|u| integral sqrt(1 + sin(2 theta) / 15) = 1.60370 |u|, and its first and last point are |u| sqrt(32 / 15)
apart, a ratio of 1.09798. No step is longer than sqrt(16 / 15) |u| pi / 256, which is .0079 of the length
(equal steps would be 1/128 = .0078). Orthogonal rows would give a circle, with 1.1107 and .0078.

Source: protocol.md section 7, P16.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell, _unnormed
from soluscope.controls.relu_few import LOGIT, VOCAB, N


def build() -> Planted:
    pre = torch.nn.functional.pad(torch.eye(N, dtype=torch.float64), (0, 0, 1, 0))
    model = _unnormed.unnormed(pre, _unnormed.next_in_line(N, LOGIT), lambda x: x)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="P16 C-",
    truth="The MLP is linear: its output follows the residual stream's direction without a step.",
    build=build,
)
