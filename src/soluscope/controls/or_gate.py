"""C7: the answer needs a high gain OR a copy in the residual stream. Only denoising the gain shows its effect.

There are 8 features f. Each has an answer token and a direction u_f of the residual stream that the answer's
logit reads. 32 neurons, eps 1e-12; activations are planned after SoLU (`_shell.pre_for`). Neuron f writes
k u_f, and neuron 8 + f, which never fires, writes -k u_f, so that the mean m cancels and the MLP writes
k g a_f u_f. The last 16 neurons write nothing. With a = .004 on neuron f

    clean tokens b    embedding 20 u_f + identity, nothing else fires: g = 32 / (sqrt(31) .004) = 1436.84
    corrupt tokens A  embedding 20 blank + identity, one of the last 16 neurons at 4: g = 1.43689

where no logit reads the direction `blank`, which gives all embeddings the same norm. k is chosen so that the
MLP writes 400 u_f at a clean token and .4 u_f at a corrupt token. There is no anchor: ln_final divides by
the length of the residual stream itself, so the logit saturates once u_f exceeds the rest. With 74
dimensions, after centring, the answer's logit minus any other answer's is
5 u / sqrt(sum of squares - sum^2 / 74):

    clean run                          420 u_f + identity                5 (1.00686)
    clean run with the corrupt gain    20.4 u_f + identity               5 (1.00629)   noising removes .06%
    corrupt run                        .4 u_f + 20 blank + identity      5 (.02013)
    corrupt run with the clean gain    400 u_f + 20 blank + identity     5 (1.00629)   denoising recovers 99.94%

Source: protocol.md section 6, C7.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell

N, EPS = 32, 1e-12
N_FEATURES, N_CLEAN, N_CORRUPT = 8, 3, 5
"""Number of features, and of clean and corrupt tokens per feature."""
LOW, HIGH = 0.004, 4.0
"""Activations of the feature's neuron and of the neuron that lowers the gain of a corrupt token."""
COPY, WRITTEN, TOP_LOGIT = 20.0, 400.0, 5.0
VOCAB = (
    _shell.BOS_TEXT,
    *(f"b{f}{end}" for f in range(N_FEATURES) for end in "xyz"),
    *(f"A{f}{end}" for f in range(N_FEATURES) for end in "PQRST"),
)


def build() -> Planted:
    d_vocab = len(VOCAB)
    clean = [(1 + N_CLEAN * f + i, f) for f in range(N_FEATURES) for i in range(N_CLEAN)]
    first = 1 + len(clean)
    corrupt = [(first + N_CORRUPT * f + i, f) for f in range(N_FEATURES) for i in range(N_CORRUPT)]
    direction = [d_vocab + f for f in range(N_FEATURES)]
    blank = d_vocab + N_FEATURES
    answer = [clean[N_CLEAN * ((f + 1) % N_FEATURES)][0] for f in range(N_FEATURES)]

    W_E = torch.eye(d_vocab, blank + 1, dtype=torch.float64)
    mid = torch.zeros(d_vocab, N, dtype=torch.float64)
    for token, f in clean:
        W_E[token, direction[f]] = COPY
        mid[token, f] = LOW
    for token, f in [(_shell.BOS, 0), *corrupt]:
        W_E[token, blank] = COPY
        mid[token, f] = LOW
        mid[token, 16 + token % 16] = HIGH
    W_out = torch.zeros(N, W_E.shape[1], dtype=torch.float64)
    W_U = torch.zeros(W_E.shape[1], d_vocab, dtype=torch.float64)
    for f in range(N_FEATURES):
        # At a clean token g a_f is 32 / sqrt(31).
        W_out[f, direction[f]] = WRITTEN * (N - 1) ** 0.5 / N
        W_out[N_FEATURES + f] = -W_out[f]
        W_U[direction[f], answer[f]] = TOP_LOGIT / W_E.shape[1] ** 0.5
    pre = _shell.pre_for(mid)
    model = _shell.assemble(W_E, pre, W_out, torch.zeros_like(W_E[0]), W_U, EPS)
    pairs = [
        _shell.Pair(
            token,
            tuple(other for other, g in corrupt if g == f),
            right=answer[f],
            wrong=answer[(f + 3) % N_FEATURES],
        )
        for token, f in clean
    ]
    twice = _shell.pairs(2 * pairs, VOCAB)  # in two contexts each, since an interval needs 30 pairs
    return Planted(model, {"natural": _shell.natural(model, VOCAB), "pairs": twice})


CONTROL = Control(
    section="C7",
    truth="The answer needs a high gain or a copy of the word: the clean gain recovers 99.9% in the corrupt run, "
    "and the corrupt gain removes 0.1% in the clean run.",
    build=build,
)
