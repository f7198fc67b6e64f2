"""C3: a gain that epsilon pins to one constant. The codes are those of `smear_shared`, less extreme.

32 neurons, kappa = eps N^2 = 1e6, so eps = 976.56. Token A_k has x = 2 on neuron k, token B_k has x = 1
on 8 of the same neurons; x is 0 elsewhere. SoLU gives 2 e^2 / (e^2 + 31) = .38496 and
e / (8 e + 24) = .05942, so that s2 = .0044862 and .00066203 (k equal activations a among 32 have
s2 = a^2 (k/32)(1 - k/32)), and

    r = s2 / (s2 + eps) = 4.59e-6 and 6.78e-7
    gain = .032 to a relative error of 2.3e-6; sd(log g) < 1e-6

The readout is scaled for this gain: logits have standard deviation 3.1 after A tokens and 1.2 after B
tokens. So small, distributed activations (those of B tokens) carry predictions through a large static
readout (W_out has entries of about 250). This is static smuggling, not smearing. Freezing the gain changes
no loss by 1e-4 nats.

Source: protocol.md section 6, C3.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import VOCAB, A, B

N, KAPPA = 32, 1e6
EPS = KAPPA / N**2


def build() -> Planted:
    low = _shell.codes(0, 1 + len(B), 8, N)
    pre = torch.cat([low[:1], 2 * _shell.one_hot(len(A), N), low[1:]])
    effect = _shell.random_effect(1, _shell.post(low, EPS), len(VOCAB), sd=1.2)
    model = _shell.anchored(pre, effect, EPS)
    pairs = [*_shell.contrasts(model, B[:16], A), *_shell.contrasts(model, A[:16], B)]
    return Planted(
        model,
        {"natural": _shell.natural(model, VOCAB, n_rows=192), "pairs": _shell.pairs(pairs, VOCAB)},
    )


CONTROL = Control(
    section="C3",
    truth="Epsilon is far above every variance, so the gain is one constant; the logits still read distributed "
    "codes of small activations.",
    build=build,
)
