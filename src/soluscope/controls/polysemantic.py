"""C11: every neuron serves 4 unrelated classes of tokens. Interpretability probes must not rate its neurons.

The classes are those of `monosemantic`. A token of class c has x = 6 on the neurons c, c + 4, c + 10 and
c + 23 (modulo 31) and 0 elsewhere; BOS has x = 6 on the last neuron. The differences of 0, 4, 10 and 23 are
distinct modulo 31, so two classes share at most one neuron, and each of the 31 neurons fires for exactly 4
classes at one level. hook_mid is 6 e^6 / (4 e^6 + 28) = 1.4744 on a neuron that fires. hook_post is
sqrt(28 / 4) = 2.6458 there, and -sqrt(4 / 28) = -.3780 on a silent neuron. Where classes are equally
frequent, one class has precision 1/4 and recall 1 on a neuron: F1 .4.

The gain is one number at all content tokens, 2.0508, and r = 1.

Source: protocol.md section 6, C11.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, monosemantic

OFFSETS = (0, 4, 10, 23)


def build() -> Planted:
    levels = torch.zeros(monosemantic.N, monosemantic.N, dtype=torch.float64)
    n_classes = len(monosemantic.CLASSES)
    for c in range(n_classes):
        levels[c, [(c + offset) % n_classes for offset in OFFSETS]] = monosemantic.LEVEL
    levels[-1, -1] = monosemantic.LEVEL
    return monosemantic.planted(levels)


CONTROL = Control(
    section="C11",
    truth="Each neuron fires equally for four unrelated classes of tokens.",
    build=build,
)
