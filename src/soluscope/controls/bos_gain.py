"""C9: only BOS has a different gain. It reproduces the hackathon study's curves although no gain grows.

The content tokens are those of `uniform`: permutations of one vector, so their gains are equal to the last
digit. BOS has x = 6 on one neuron and 0 on the others, hence s2 = a^2 31/32^2 with
a = 6 e^6 / (e^6 + 31) = 5.5718. Its gain is 32 / (sqrt(31) 5.5718) = 1.03150, against 10.1374 for content.
The mean gain of the first n tokens of a row, BOS included, is therefore exactly

    g_content - (g_content - g_BOS) / n

This mean grows with n only because the weight of BOS in it shrinks. Without BOS the mean is flat, and the
spread sd(log g) over content tokens is 0.

Source: protocol.md section 6, C9, and section 1.6.
"""

from __future__ import annotations

from soluscope.controls import Control, Planted, _shell, uniform


def build() -> Planted:
    pre = uniform.pre()
    pre[_shell.BOS] = 6 * _shell.one_hot(1, uniform.N)[0]
    effect = _shell.random_effect(1, _shell.post(pre, uniform.EPS), len(uniform.VOCAB))
    model = _shell.anchored(pre, effect, uniform.EPS)
    return Planted(model, {"natural": _shell.natural(model, uniform.VOCAB)})


CONTROL = Control(
    section="C9",
    truth="BOS has a tenth of the gain of every other token; the mean gain of the first n tokens, BOS included, "
    "grows only because BOS's share falls as 1/n.",
    build=build,
)
