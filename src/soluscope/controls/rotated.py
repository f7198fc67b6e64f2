"""C10, rotated: the classes of `monosemantic` in a basis that means nothing.

SoLU and LayerNorm single out the neurons, so no rotation of them leaves such a model as it is. A linear MLP
does not: with W_in Q and Q' W_out, Q orthogonal, every logit is what it was. 32 neurons, no nonlinearity, no
mid norm. A token of class c has 6 on direction c, which is row c of a random Q: its activations are 6 Q[c].
The tokens of a class are told apart from all others by one direction, but by no neuron.

Neuron j holds 6 Q[c, j] at class c: 31 numbers as if drawn from one Gaussian, in any orthogonal basis that is
not the classes' own. The excess kurtosis of 31 such numbers has a standard deviation of about sqrt(24 / 31)
= .9, the median over 32 neurons of it about .2, and the difference between two bases .3. So a
privileged-basis index of the kurtosis, 29.7 in `monosemantic`, lies within 1 of 0 here, before and after what
stands in a norm's place.

Source: science.md section 7, P13, "C- rotated C10".
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
    truth="Classes of tokens are directions, and no neuron is one of them: a rotation of the neurons changes "
    "nothing.",
    build=build,
)
