"""`soluscope.logit_effect`: the tokens that a neuron raises and lowers."""

from __future__ import annotations

import pandas as pd
import torch

from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.neurons.logits import effect_on_logits, extremes
from soluscope.notebook.arguments import check_loaded, vocabulary, whole
from soluscope.text import readable


def logit_effect(model: SoluscopeTransformer, neuron: int, n: int = 10) -> pd.DataFrame:
    """Return the `n` tokens whose logits a neuron of the last layer raises most, and the `n` it lowers most.

    The effect on all logits is the vector

        B = (W_out[neuron] P * w) W_U    [d_vocab]

    where P subtracts the mean over d_model (only if ln_final does), and w [d_model] is the weight of ln_final. At a
    token where ln_final's scale is S, one unit of the neuron's hook_post changes the logits by B / S if S is held
    constant. The probe P17 measures how well this agrees with the effect of an ablation.

    Args:
        model: a model from `soluscope.load`.
        neuron: index of the neuron, from 0.
        n: number of tokens on each side.

    Returns:
        A table with 2n rows: `side` (`highest`, with the largest effect first, then `lowest`, with the smallest
        first), `token`, `text`, and `logit`, the token's element of B.

    Raises:
        UserError: if the model cannot be read, there is no such neuron, or the vocabulary has fewer than n tokens.

    Source: direct logit attribution, Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; B
    is B_j of protocol.md section 8.1.
    """
    check_loaded(model)
    neuron = whole("neuron", neuron, 0, model.cfg.d_mlp - 1)
    n = whole("n", n, 1, model.cfg.d_vocab)
    effect, texts = effect_on_logits(model, torch.tensor([neuron])), vocabulary(model)
    tables = []
    for side, (tokens, logits) in extremes(effect, n).items():
        columns = {
            "token": tokens[0].tolist(),
            "text": [readable(texts[token]) for token in tokens[0].tolist()],
            "logit": logits[0].tolist(),
        }
        tables.append(pd.DataFrame({"side": side} | columns))
    return pd.concat(tables, ignore_index=True)
