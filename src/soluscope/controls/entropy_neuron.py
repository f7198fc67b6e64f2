"""C12: an entropy neuron. It writes where no logit reads, and flattens predictions by ln_final's scale.

32 neurons, kappa = 41.94 (eps .040957), as in SoLU-1L; activations are planned after SoLU
(`_shell.pre_for`). Tokens have .06 on 8 of the first 31 neurons, their content, and 0, .04, .08 or .12 on
the last, the entropy neuron. The residual stream has one dimension a token and one more, z. W_U is a
multiple of the identity on the first and 0 on z, which is thus its whole null space. The content's rows of
W_out are random on the tokens' dimensions and add up to 0 (so the mean m drops out); the entropy neuron
writes on z alone, and has the longest row.

There is no anchor. With O what the content writes (of norm 8 at a median token), z what the neuron writes
and d = 66, ln_final divides by S with d S^2 = |O + e|^2 + z^2 - (z + .1)^2 / d, e the embedding, of norm
.1. Centring takes z / d off all logits alike. So ablating the neuron changes the logits by the factor
S / S' and nothing else. With z = -3.57, 5.65, 14.85 and 24 at its four levels, zero-ablation lowers
entropies by .19, .45, 1.23 and 1.62 nats on average; where ln_final's scale is held no probability changes.

Source: science.md section 6, C12; Stolfo et al. 2024 for entropy neurons.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell

N, KAPPA = 32, 41.94
EPS = KAPPA / N**2
N_TOKENS, CONTENT, LEVELS = 64, 0.06, (0.0, 0.04, 0.08, 0.12)
LENGTH, EMBEDDED, TOP_Z, SHARPNESS = 8.0, 0.1, 24.0, 2.5
"""Norms of what the content writes and of an embedding, z at the highest level, logits' spread at S = 1."""
ENTROPY_NEURON = N - 1
VOCAB = (_shell.BOS_TEXT, *(f"{'bbAA'[k % 4]}{k}" for k in range(N_TOKENS)))


def build() -> Planted:
    d_vocab = len(VOCAB)
    mid = CONTENT * _shell.codes(0, d_vocab, 8, N, slice(0, N - 1))
    mid[1:, ENTROPY_NEURON] = torch.tensor(LEVELS, dtype=mid.dtype).repeat(N_TOKENS // len(LEVELS))
    pre = _shell.pre_for(mid)
    post = _shell.post(pre, EPS)
    effect = _shell.random_effect(1, post, d_vocab)
    effect[:-1] -= effect[:-1].mean(0)
    effect[-1] = 0
    effect *= LENGTH / (post @ effect).norm(dim=-1).median()
    W_out = torch.nn.functional.pad(effect, (0, 1))
    W_out[ENTROPY_NEURON, -1] = TOP_Z / post[:, ENTROPY_NEURON].max()
    W_E = EMBEDDED * torch.eye(d_vocab, d_vocab + 1, dtype=mid.dtype)
    W_U = SHARPNESS * torch.eye(d_vocab + 1, d_vocab, dtype=mid.dtype)
    model = _shell.assemble(W_E, pre, W_out, torch.zeros_like(W_E[0]), W_U, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C12",
    truth="One neuron of large norm writes in W_U's null space: it changes entropies through ln_final's scale, "
    "and no probability where that scale is held.",
    build=build,
)
