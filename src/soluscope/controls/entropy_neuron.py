"""C12: an entropy neuron. It writes into a direction that no logit reads; ln_final's scale flattens predictions.

32 neurons, kappa = 41.94 (eps .040957), as in SoLU-1L; activations are planned after SoLU
(`_shell.pre_for`). Tokens have .06 on 8 of the first 31 neurons, their content, and 0, .04, .08 or .12 on
the last neuron, the entropy neuron. The residual stream has one dimension per token and one more, z. W_U is
a multiple of the identity on the token dimensions and 0 on z, so z spans its whole null space. The content's
rows of W_out are random on the token dimensions and sum to 0, so the mean m drops out. The entropy neuron
writes to z alone, and its row is the longest.

There is no anchor. Let O be the content's output (of norm 8 at a median token), z the entropy neuron's
output, e the embedding (of norm .1) and d = 66. ln_final divides by S with
d S^2 = |O + e|^2 + z^2 - (z + .1)^2 / d. Centring subtracts z / d from all logits alike. So ablating the
neuron multiplies the logits by S / S' and changes nothing else. With z = -3.57, 5.65, 14.85 and 24 at the
four levels, zero-ablation lowers entropies by .19, .45, 1.23 and 1.62 nats on average. With ln_final's
scale held fixed, no probability changes.

Source: protocol.md section 6, C12; Stolfo et al. 2024 for entropy neurons.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell

N, KAPPA = 32, 41.94
EPS = KAPPA / N**2
N_TOKENS, CONTENT, LEVELS = 64, 0.06, (0.0, 0.04, 0.08, 0.12)
LENGTH, EMBEDDED, TOP_Z, SHARPNESS = 8.0, 0.1, 24.0, 2.5
"""Norm of the content's output at a median token, norm of an embedding, z at the highest level, and the
standard deviation of the logits at S = 1, which is the factor of W_U."""
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
    truth="One neuron of large norm writes into W_U's null space: it changes entropies through ln_final's scale, "
    "and changes no probability when that scale is held fixed.",
    build=build,
)
