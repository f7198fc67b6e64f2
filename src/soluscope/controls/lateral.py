"""C13: lateral inhibition. A neuron that writes nothing lowers all other activations through softmax.

32 neurons, kappa = 1e6 (eps 976.56), so the gain is one constant and cannot undo the effect of Z. Token k.c
has one of 16 contents, x = 1 on 8 of the first 31 neurons, and a competitor, the last neuron, at x = 0, 3,
4 or 5; x is 0 elsewhere. Then

    Z = 8 e + 23 + e^x = 45.746, 64.832, 99.344, 193.159

and the activations of the content are e / Z. The competitor's row of W_out is 0, and the other rows sum to
0, so m drops out: a logit is the gain times (e / Z) times the sum of W_out over the content's neurons. The
same content therefore predicts the same ranking of next tokens. The logits have standard deviation 4 where
the competitor is silent and 4 (45.746 / 193.159) = .95 where it is at 5, so Z decides whether a prediction
is sharp or vague. With Z replaced by one number (a pointwise unit) predictions are equally sharp everywhere,
which costs more than .1 nats. Freezing the gain costs nothing.

Source: protocol.md section 6, C13.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell

N, KAPPA = 32, 1e6
EPS = KAPPA / N**2
N_CONTENTS, COMPETITOR = 16, (0.0, 3.0, 4.0, 5.0)
VOCAB = (
    _shell.BOS_TEXT,
    *(f"{'bbAA'[c]}{k}.{c}" for c in range(len(COMPETITOR)) for k in range(N_CONTENTS)),
)


def build() -> Planted:
    content = _shell.codes(0, 1 + N_CONTENTS, 8, N, slice(0, N - 1))
    competitor = _shell.one_hot(1, N, first=N - 1)
    pre = torch.cat([content[:1], *(content[1:] + x * competitor for x in COMPETITOR)])
    effect = _shell.random_effect(1, _shell.post(content, EPS), len(VOCAB), sd=4.0)
    effect[:-1] -= effect[:-1].mean(0)
    effect[-1] = 0
    model = _shell.anchored(pre, effect, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB)})


CONTROL = Control(
    section="C13",
    truth="The sharpness of a prediction depends on a competitor that writes nothing, through softmax's "
    "denominator, and the gain is one constant.",
    build=build,
)
