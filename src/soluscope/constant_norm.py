"""Norms that lose their per-token scale during further training: constants replace it, in three stages.

Source: Baroni et al. 2025, "Transformers Don't Need LayerNorm at Inference Time"; protocol.md section 7, P7.
"""

from __future__ import annotations

import copy
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from soluscope.norms import MidNorm, StaticNorm

if TYPE_CHECKING:  # training does not require jaxtyping
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int

    from soluscope.norms import Mid

EPS = 1e20
"""Epsilon of a LayerNorm of TransformerLens that divides by a constant: sqrt(var + EPS) is 1e10 up to rounding.

Its weights are 1e10 times as large. The models that Baroni et al. released have an epsilon of 1e12."""
SHARE = 0.1
"""Weight of a batch in the running means. The first batches have equal weights."""
GROUPS = ("constant", "eos_constant", "bos_constant")
"""Buffers: the constants of content, of EOS and of BOS."""


class Stage(IntEnum):
    """Tokens at which a norm divides by the general constant."""

    LIVE = 0
    """None: each token has its own scale, and the constants follow the means of the batches."""
    APART = 1
    """All but EOS and BOS, which have separate constants."""
    EOS = 2
    """All but BOS."""
    ALL = 3


class ConstantNorm(MidNorm):
    """A norm whose denominator becomes the running mean of its former values.

    Each instance belongs to a subclass of this class and of the norm's own class, so it keeps the norm's
    centring, weights and bias. A model that is built or loaded has stage `ALL`; training sets earlier ones.
    """

    constant: Float[Tensor, " n"]
    """Denominator of content: one number, or one for each neuron if the norm has no one scale."""
    eos_constant: Float[Tensor, " n"]
    bos_constant: Float[Tensor, " n"]
    n_means: Int[Tensor, " group"]
    """Number of batches in the running mean of each of `GROUPS`."""
    stage: Stage
    marks: tuple[Bool[Tensor, "batch pos 1"], Bool[Tensor, "batch pos 1"]] | None
    """Masks of EOS and of BOS, which stages before `ALL` need."""
    live: Callable[[Tensor], Tensor]
    """Function from centred activations to the denominators of the norm that is replaced."""

    @classmethod
    def of(cls, norm: MidNorm, length: int) -> ConstantNorm:
        """Return `norm` for vectors of `length` numbers, with constants that are not yet known."""
        constant: Any = copy.deepcopy(norm)
        constant.__class__ = type(f"Constant{type(norm).__name__}", (cls, type(norm)), {})
        for name in GROUPS:
            size = 1 if norm.one_scale else length
            constant.register_buffer(name, torch.full((size,), torch.nan))
        constant.register_buffer("n_means", torch.zeros(len(GROUPS), dtype=torch.long))
        constant.stage, constant.marks, constant.eps = Stage.ALL, None, None
        constant.live = copy.deepcopy(norm).denominator  # of a copy, which keeps its epsilon
        return cast(ConstantNorm, constant)

    def present_gain(self) -> Float[Tensor, " n"]:
        """Return the reciprocal of the general constant."""
        return self.constant.reciprocal()

    def denominator(self, centred: Mid) -> Float[Tensor, "*batch n"]:
        if self.stage is Stage.LIVE:
            return self.live(centred)
        scale = self.constant.expand(*centred.shape[:-1], -1)
        if self.stage is Stage.ALL:
            return scale
        assert self.marks is not None, "stages before ALL need the masks of EOS and BOS"
        is_eos, is_bos = self.marks
        if self.stage is Stage.APART:
            scale = torch.where(is_eos, self.eos_constant, scale)
        return torch.where(is_bos, self.bos_constant, scale)

    def forward(self, mid: Mid) -> Mid:
        centred = self.centred(mid)
        scale = self.denominator(centred)
        if self.stage is Stage.LIVE and self.training and torch.is_grad_enabled():
            self._follow(scale.detach())
        return self.affine(centred / scale)

    def advance(self, stage: Stage) -> None:
        """Enter a stage. A constant that no batch has shown becomes the general one."""
        for name in GROUPS:
            constant = getattr(self, name)
            constant.copy_(torch.where(constant.isnan(), self.constant, constant))
        self.stage = stage

    @torch.no_grad()
    def _follow(self, scale: Float[Tensor, "batch pos n"]) -> None:
        """Move each constant towards the mean of its tokens' denominators in the batch."""
        assert self.marks is not None, "the running means need the masks of EOS and BOS"
        is_eos, is_bos = self.marks
        masks = (~(is_eos | is_bos), is_eos, is_bos)
        sums = torch.stack([(scale * mask).sum((0, 1)) for mask in masks])  # [group n]
        counts = torch.stack([mask.sum() for mask in masks]).to(sums)  # [group]
        if torch.distributed.is_initialized():  # each process has a part of the batch
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        self.n_means += counts > 0
        shares = self.n_means.clamp(min=1).reciprocal().clamp(min=SHARE)
        for name, total, count, share in zip(GROUPS, sums, counts, shares, strict=True):
            old, new = getattr(self, name), total / count
            moved = torch.where(old.isnan(), new, old + share * (new - old))
            old.copy_(torch.where(count > 0, moved, old))


def with_constants(norm: MidNorm, length: int) -> MidNorm:
    """Return a norm that can lose its per-token scale; a norm without such a scale is returned as it is."""
    return norm if isinstance(norm, StaticNorm) else ConstantNorm.of(norm, length)


def constant_norms(model: nn.Module) -> dict[str, ConstantNorm]:
    """Return the norms of a model that have constants, by name."""
    return {name: norm for name, norm in model.named_modules() if isinstance(norm, ConstantNorm)}


def gain_of(norm: MidNorm | None) -> float | None:
    """Return the gain that a norm has at all tokens, or None for another norm."""
    if isinstance(norm, StaticNorm) or (isinstance(norm, ConstantNorm) and norm.one_scale):
        return norm.present_gain().item()
    return None
