"""C6: the answer needs a high gain AND content. Only noising the gain shows its effect.

32 neurons, eps 1e-12. Clean tokens b_k have x = 1 on 8 of the first 16 neurons; corrupt tokens A_k have
x = 12 on one of the last 16; x is 0 elsewhere. The gains are those of `smear_shared`, 38.865 and .479039.
W_out is random on the first 16 neurons, where its rows sum to 0, and 0 on the last 16. A corrupt token's
a - m is -m on all of the first 16 neurons, so W_out maps it to 0. Because of the anchor a logit
difference is linear in g:

    d(clean) = g_b (content of b)      d(corrupt) = 0

    denoising, corrupt run with the clean gain:  g_b 0 = 0, recovers 0 of d(clean) - d(corrupt)
    noising, clean run with the corrupt gain:    g_A (content of b), removes 1 - g_A / g_b = .98767

The interaction of gain and direction, d(g_b, b) - d(g_A, b) - d(g_b, A) + d(g_A, A), is .98767 d(clean).

Source: protocol.md section 6, C6.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell

N, EPS = 32, 1e-12
N_CLEAN, N_CORRUPT = 24, 16
VOCAB = (
    _shell.BOS_TEXT,
    *(f"b{k}" for k in range(N_CLEAN)),
    *(f"A{k}" for k in range(N_CORRUPT)),
)


def build() -> Planted:
    content = slice(0, 16)
    low = _shell.codes(0, 1 + N_CLEAN, 8, N, content)
    pre = torch.cat([low, 12 * _shell.one_hot(N_CORRUPT, N, first=16)])
    effect = _shell.random_effect(1, _shell.post(low, EPS), len(VOCAB))
    effect[content] -= effect[content].mean(0)
    effect[16:] = 0
    model = _shell.anchored(pre, effect, EPS)
    corrupt = range(1 + N_CLEAN, len(VOCAB))
    pairs = [
        _shell.Pair(
            clean,
            tuple(corrupt[(clean + i) % N_CORRUPT] for i in range(_shell.N_CORRUPTIONS)),
            right,
            wrong,
        )
        for clean, (right, wrong) in enumerate(_shell.answers(model)[:N_CLEAN], start=1)
    ]
    twice = _shell.pairs(2 * pairs, VOCAB)  # in two contexts each, since an interval needs 30 pairs
    return Planted(model, {"natural": _shell.natural(model, VOCAB), "pairs": twice})


CONTROL = Control(
    section="C6",
    truth="The answer needs both a high gain and content: the clean gain recovers nothing in the corrupt run, and "
    "the corrupt gain removes 98.8% in the clean run.",
    build=build,
)
