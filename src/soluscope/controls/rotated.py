"""C10, rotated: the classes of `monosemantic` in a basis of neurons without meaning.

SoLU and LayerNorm single out the neurons, so no SoLU model is unchanged by a rotation of its neurons. A
linear MLP is: with W_in Q and Q' W_out, Q orthogonal, every logit is unchanged. 32 neurons, no
nonlinearity, no mid norm. A token of class c has 6 on direction c, which is row c of a random Q: its
activations are 6 Q[c]. One direction distinguishes the tokens of a class from all others, but no neuron does.

Neuron j holds 6 Q[c, j] at class c: 31 numbers that look like draws from one Gaussian, in any orthogonal
basis other than that of the classes. The excess kurtosis of 31 such numbers has a standard deviation of
about sqrt(24 / 31) = .9, the median over 32 neurons one of about .2, and the difference between two bases
one of about .3. So a privileged-basis index of the kurtosis, which is 29.7 in `monosemantic`, lies within 1
of 0 here, at mid and at post alike.

Source: protocol.md section 7, P13.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell, _unnormed, monosemantic


def build() -> Planted:
    levels = monosemantic.LEVEL * _shell.one_hot(monosemantic.N, monosemantic.N)
    plain = levels[list(monosemantic.CLASS_OF)]
    rotation = torch.linalg.qr(_shell.normal(4, monosemantic.N, monosemantic.N)).Q
    effect = rotation.T @ _shell.random_effect(1, plain, len(monosemantic.VOCAB))
    model = _unnormed.unnormed(plain @ rotation, effect, lambda x: x)
    return Planted(model, {"natural": _shell.natural(model, monosemantic.VOCAB, n_rows=192)})


CONTROL = Control(
    section="C10, rotated",
    truth="Classes of tokens are directions, and no neuron is aligned with one: a rotation of the neurons changes "
    "no logit.",
    build=build,
)
