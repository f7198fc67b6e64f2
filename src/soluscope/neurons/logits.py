"""The tokens that each neuron writes: the logits of W_out, ln_final and W_U."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.hooked.activations import CENTRES

NEURONS_AT_ONCE = 64


@torch.no_grad()
def effect_on_logits(
    model: Any, neurons: Int[Tensor, " neuron"]
) -> Float[Tensor, "neuron d_vocab"]:
    """Return B = (W_out P * w) W_U of some neurons of the last layer, on the CPU in fp64 (protocol.md section 8.1).

    P subtracts the mean over d_model (only if ln_final does), and w is the weight of ln_final.
    """
    final = model.ln_final
    written: Tensor = model.blocks[-1].mlp.W_out[neurons.to(model.cfg.device)].cpu().double()
    if CENTRES[type(final).__name__]:
        written = written - written.mean(-1, keepdim=True)
    if (weight := getattr(final, "w", None)) is not None:  # a folded norm has none
        written = written * weight.cpu().double()
    W_U: Tensor = model.unembed.W_U.cpu().double()
    return written @ W_U


def extremes(effect: Float[Tensor, "neuron d_vocab"], n: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return tokens and logits, [neuron n] each: the `highest`, largest first, and the `lowest`, smallest first."""
    order = effect.argsort(dim=-1, descending=True, stable=True)
    sides = {"highest": order[:, :n], "lowest": order.flip(-1)[:, :n]}
    return {side: (tokens, effect.gather(1, tokens)) for side, tokens in sides.items()}


def table(model: Any, n: int) -> pd.DataFrame:
    """Return the `n` highest and lowest logits of every neuron: neuron, side, rank, token, logit."""
    parts = []
    for some in torch.arange(model.cfg.d_mlp).split(NEURONS_AT_ONCE):
        for side, (tokens, logits) in extremes(effect_on_logits(model, some), n).items():
            rank = torch.arange(tokens.shape[1]).expand(tokens.shape)
            columns = {
                "neuron": some[:, None].expand(tokens.shape).flatten(), "side": side, "rank": rank.flatten(),
                "token": tokens.flatten(), "logit": logits.flatten(),
            }  # fmt: skip
            parts.append(pd.DataFrame(columns))
    joined = pd.concat(parts)
    return joined.sort_values(["neuron", "side", "rank"], ignore_index=True)
