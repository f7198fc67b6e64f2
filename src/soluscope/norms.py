"""Mid norms: post = (mid - centre) / denominator * w + b, in one of three ways.

`gain` is 1 / denominator throughout, as in the papers; TransformerLens's hook_scale is the
denominator. Statistics are never computed below fp32: SoLU's variance is about 1e-7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # a bare machine trains without it
    from jaxtyping import Float

    Mid = Float[Tensor, "*batch d_mlp"]
    PerToken = Float[Tensor, "*batch 1"]


class MidNorm(nn.Module):
    """The formula, written once; subclasses say what the centre and the denominator are."""

    w: nn.Parameter
    b: nn.Parameter
    eps: float | None = None
    """The epsilon with which TransformerLens's own LayerNorm is this norm; None if none is."""

    def centred(self, mid: Mid) -> Mid:
        """`mid` less its mean over neurons."""
        return mid - mid.mean(dim=-1, keepdim=True)

    def denominator(self, centred: Mid) -> PerToken:
        """What a token's centred activations are divided by."""
        raise NotImplementedError

    def affine(self, normalized: Mid) -> Mid:
        """The static gain and bias of each neuron."""
        return normalized * self.w + self.b

    def forward(self, mid: Mid) -> Mid:
        centred = self.centred(mid)
        return self.affine(centred / self.denominator(centred))


class LayerNorm(MidNorm):
    """Each token by its own scale, sqrt(var + eps); var is the population's. Also ln1, ln2, ln_final."""

    def __init__(self, length: int, eps: float) -> None:
        super().__init__()
        self.eps: float = eps
        self.w = nn.Parameter(torch.ones(length))
        self.b = nn.Parameter(torch.zeros(length))

    def denominator(self, centred: Mid) -> PerToken:
        return (centred.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def forward(self, mid: Mid) -> Mid:
        return F.layer_norm(mid, self.w.shape, self.w, self.b, self.eps)  # one kernel, same formula


class StaticNorm(MidNorm):
    """One gain for all tokens. Unset (nan) until training has measured or read it."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(torch.nan))

    def denominator(self, centred: Mid) -> PerToken:
        return self.gain.reciprocal().expand(*centred.shape[:-1], 1)


class FrozenLayerNorm(StaticNorm):
    """LayerNorm with its denominator replaced by a constant; centring, gain and bias stay."""

    def __init__(self, d_mlp: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_mlp))
        self.b = nn.Parameter(torch.zeros(d_mlp))

    def forward(self, mid: Mid) -> Mid:
        return torch.addcmul(self.b, self.centred(mid), self.gain * self.w)  # same, in fewer passes


class Gain(StaticNorm):
    """A constant and nothing else."""

    def __init__(self, d_mlp: int) -> None:
        super().__init__()

    def centred(self, mid: Mid) -> Mid:
        return mid

    def affine(self, normalized: Mid) -> Mid:
        return normalized

    def forward(self, mid: Mid) -> Mid:
        return mid * self.gain


def gain_matching_layer_norm(
    norm: StaticNorm, mid: Float[Tensor, "token d_mlp"], eps: float
) -> float:
    """The constant with which `norm`'s output has the rms that LayerNorm's has on the same tokens.

    LayerNorm's output has mean square r = var / (var + eps) at a token, so the constant is
    sqrt(mean r / mean square of what `norm` multiplies), both over the tokens of `mid`.

    Source: science.md section 3, "c matched to LN output rms at init".
    """
    mid = mid.double()
    variance = mid.var(dim=-1, correction=0)
    engagement = variance / (variance + eps)
    return float((engagement.mean() / norm.centred(mid).square().mean()).sqrt())
