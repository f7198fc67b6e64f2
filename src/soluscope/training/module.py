"""The loss, parameter groups and schedule of the SoLU-1L recipe, as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn

from soluscope.config import Config
from soluscope.data.cache import TokenCache
from soluscope.model import LanguageModel
from soluscope.runs.weights import build_model
from soluscope.training.device import on_cuda
from soluscope.training.entropy import loss_and_missing_entropy
from soluscope.training.init_from import load_origin
from soluscope.training.losing_norms import LosingNorms
from soluscope.training.out_scale import set_out_scale
from soluscope.training.static_gain import set_gain

if TYPE_CHECKING:  # training does not require jaxtyping
    from jaxtyping import Int


class TrainingModule(lightning.LightningModule):
    """Loss, parameter groups and schedule of the SoLU-1L recipe."""

    def __init__(self, config: Config, cache: TokenCache) -> None:
        super().__init__()
        self.config = config
        self.bos: int = cache.meta["bos"]
        self.model = build_model(config, cache.meta["d_vocab"])
        load_origin(self.model, config, cache)
        set_gain(self.model, config, cache)
        set_out_scale(self.model, config, cache)
        self.losing_norms = LosingNorms.of(self.model, config, cache)
        self.grad_norm = torch.tensor(math.nan)
        compiled = on_cuda(config) if config.train.compile is None else config.train.compile
        penalised = config.train.entropy_penalty != 0
        loss: Callable[..., Any] = self.model.loss
        if penalised:
            loss = partial(loss_and_missing_entropy, self.model)
        self.loss = torch.compile(loss) if compiled else loss

    def training_step(
        self, tokens: Int[Tensor, "batch pos"], index: int
    ) -> Tensor | dict[str, Tensor]:
        if self.losing_norms:
            self.losing_norms.advance(self.global_step)
        train = self.config.train
        if not train.entropy_penalty:
            loss: Tensor = self.loss(tokens, self.bos)
            return loss
        loss, missing = self.loss(tokens, self.bos)
        return {
            "loss": loss + train.entropy_penalty * missing,
            # Lightning divides only the loss by the number of micro-batches.
            "cross_entropy": loss.detach() / train.micro_batches,
        }

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters(), self.config.train.clip)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.config),
            betas=(self.config.train.beta1, self.config.train.beta2),
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate(step, self.config)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def parameter_groups(model: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """Return three groups for AdamW: the blocks' matrices, the unembedding, and all other parameters.

    The norms' weights get no weight decay, because decay would change the output scale of the static arms.

    Source: protocol.md section 3.2.
    """
    matrices, unembedding, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name == "unembed.W_U":
            unembedding.append(parameter)
        elif name.startswith("blocks.") and ".W_" in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    train = config.train
    return [
        {"params": matrices, "lr": train.lr, "weight_decay": train.weight_decay},
        {"params": unembedding, "lr": train.lr_rest, "weight_decay": train.weight_decay},
        {"params": rest, "lr": train.lr_rest, "weight_decay": 0.0},
    ]


def rate(step: int, config: Config) -> float:
    """Return the learning rate at an optimizer step, counted from 0, as a share of the peak rate."""
    train = config.train
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.final_lr_share + (1 - train.final_lr_share) * cosine
