"""C4: a true LayerNorm whose gain never changes. All tokens permute one vector of activations.

32 neurons, eps 1e-12. Every token, BOS included, has the same 32 pre-activations, evenly spaced from -1 to 3,
on the neurons in a different order. SoLU treats all neurons alike, so its outputs are permuted in the same
way, and neither Z nor the mean nor the variance depends on the token:

    r = 1 to 1.1e-10; the gain is one number, 10.1374, and Z is one number.

So freezing, swapping or patching the gain has exactly no effect, although the norm divides by a per-token
scale: r alone does not show smearing.

Source: protocol.md section 6, C4.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from soluscope.controls import Control, Planted, _shell

N, N_EACH, EPS = 32, 32, 1e-12
VOCAB = (
    _shell.BOS_TEXT,
    *(f"A{k}" for k in range(N_EACH)),
    *(f"b{k}" for k in range(N_EACH)),
)


def pre() -> Tensor:
    """Return the pre-activations of each token."""
    levels = np.tile(np.linspace(-1.0, 3.0, N), (len(VOCAB), 1))
    return torch.from_numpy(np.random.default_rng(0).permuted(levels, axis=1))


def build() -> Planted:
    x = pre()
    model = _shell.anchored(x, _shell.random_effect(1, _shell.post(x, EPS), len(VOCAB)), EPS)
    content = range(1, len(VOCAB))
    pairs = _shell.contrasts(model, content[:32], content)
    return Planted(
        model,
        {"natural": _shell.natural(model, VOCAB, n_rows=192), "pairs": _shell.pairs(pairs, VOCAB)},
    )


CONTROL = Control(
    section="C4",
    truth="The norm is fully engaged (r = 1) and its gain is the same at every token.",
    build=build,
)
