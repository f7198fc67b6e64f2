"""The penalty on a peaked SoLU: by how much the entropy of its softmax lies below that of a uniform one.

Source: protocol.md section 7, P25.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from soluscope.model import Activations, LanguageModel
from soluscope.variants import SoftmaxUnit

if TYPE_CHECKING:  # training does not require jaxtyping
    from jaxtyping import Int


def loss_and_missing_entropy(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], bos: int
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats per token, and the missing entropy of SoLU's softmax in nats.

    The missing entropy is log n - H(p), the KL divergence of the softmax p over n neurons from the uniform
    distribution: 0 if all neurons have the same weight, log n if one neuron has all of it. It is averaged over the
    tokens that are not BOS, over the blocks of neurons that have separate softmaxes, and over layers.
    """
    record: Activations = {}
    loss = model.loss(tokens, bos, record=record)
    layers = range(len(model.blocks))
    missing = torch.stack([_missing(model, layer, record) for layer in layers]).mean(dim=0)
    counted = tokens != bos
    return loss, (
        missing * counted
    ).sum() / counted.sum()  # no mask as an index: compiled code has no such shapes


def _missing(model: LanguageModel, layer: int, record: Activations) -> Tensor:
    """Return log n - H(p) of each token in a block of the model, [batch pos]."""
    solu = cast(
        SoftmaxUnit, model.mlp(layer).nonlinearity
    )  # others are refused with the configuration
    log_p = solu.log_softmax(record[f"blocks.{layer}.mlp.hook_pre"])  # [batch pos block neuron]
    return (log_p.exp() * log_p).sum(dim=-1).mean(dim=-1) + math.log(log_p.shape[-1])
