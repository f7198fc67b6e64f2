"""Mid norms: post = (mid - centre) / denominator * w + b. Each declares what its parts are.

`gain` is 1 / denominator throughout, as in the papers; TransformerLens's hook_scale is the
denominator. Statistics are never computed below fp32: SoLU's variance is about 1e-7.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soluscope.errors import UserError

if TYPE_CHECKING:  # a bare machine trains without it
    from jaxtyping import Float

    Mid = Float[Tensor, "*batch d_mlp"]
    PerToken = Float[Tensor, "*batch 1"]


class MidNorm(nn.Module):
    """The formula, written once. A subclass declares the parts and computes the denominator.

    The conversion, the probes and training read the declared fields, and `check_norm` refuses a norm
    that computes something else.
    """

    centres: ClassVar[bool]
    """Whether the mean over neurons is subtracted from mid."""
    affine_part: ClassVar[tuple[str, ...]]
    """Parameters that follow the division: w, each neuron's gain, and b, its bias; both, one or none."""
    eps: float | None = None
    """Epsilon of a per-token denominator, sqrt(mean square of the centred mid + eps). None: the
    denominator is one constant for all tokens."""
    w: nn.Parameter
    b: nn.Parameter

    def __init__(self, length: int) -> None:
        super().__init__()
        for field in ("centres", "affine_part"):
            if not hasattr(self, field):
                raise UserError(f"the mid norm {type(self).__name__} declares no {field}")
        if "w" in self.affine_part:
            self.w = nn.Parameter(torch.ones(length))
        if "b" in self.affine_part:
            self.b = nn.Parameter(torch.zeros(length))

    @property
    def is_layer_norm(self) -> bool:
        """Whether the norm is LayerNorm as TransformerLens has it."""
        return self.centres and self.eps is not None and self.affine_part == ("w", "b")

    def centred(self, mid: Mid) -> Mid:
        """Return `mid`, minus its mean over neurons where the norm centres."""
        return mid - mid.mean(dim=-1, keepdim=True) if self.centres else mid

    def denominator(self, centred: Mid) -> PerToken:
        """Return what a token's centred activations are divided by."""
        raise NotImplementedError

    def affine(self, normalized: Mid) -> Mid:
        """Apply the static gain and bias of each neuron."""
        if "w" in self.affine_part:
            normalized = normalized * self.w
        return normalized + self.b if "b" in self.affine_part else normalized

    def forward(self, mid: Mid) -> Mid:
        centred = self.centred(mid)
        return self.affine(centred / self.denominator(centred))


class PerTokenNorm(MidNorm):
    """Each token by its own scale, the root of its mean square plus epsilon."""

    eps: float

    def __init__(self, length: int, eps: float) -> None:
        super().__init__(length)
        self.eps = eps

    def denominator(self, centred: Mid) -> PerToken:
        return (centred.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class LayerNorm(PerTokenNorm):
    """sqrt(var + eps); var is the population's. Also ln1, ln2, ln_final."""

    centres = True
    affine_part = ("w", "b")

    def forward(self, mid: Mid) -> Mid:
        return F.layer_norm(mid, self.w.shape, self.w, self.b, self.eps)  # one kernel, same formula


class RMSNorm(PerTokenNorm):
    """sqrt(mean square + eps): LayerNorm without centring and without a bias."""

    centres = False
    affine_part = ("w",)

    def forward(self, mid: Mid) -> Mid:
        return F.rms_norm(mid, self.w.shape, self.w, self.eps)  # one call, same formula


class StaticNorm(MidNorm):
    """One gain for all tokens. Unset (nan) until training has measured or read it."""

    matched_to: ClassVar[type[PerTokenNorm]] = LayerNorm
    """Per-token norm whose output rms `mid.gain=init` gives this norm."""
    gain: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.register_buffer("gain", torch.tensor(torch.nan))

    def denominator(self, centred: Mid) -> PerToken:
        return self.gain.reciprocal().expand(*centred.shape[:-1], 1)


class FrozenLayerNorm(StaticNorm):
    """LayerNorm with its denominator replaced by a constant; centring, gain and bias stay."""

    centres = True
    affine_part = ("w", "b")

    def forward(self, mid: Mid) -> Mid:
        return torch.addcmul(self.b, self.centred(mid), self.gain * self.w)  # same, in fewer passes


class FrozenRMSNorm(StaticNorm):
    """RMSNorm with its denominator replaced by a constant; each neuron's gain stays."""

    centres = False
    affine_part = ("w",)
    matched_to = RMSNorm

    def forward(self, mid: Mid) -> Mid:
        return mid * (self.gain * self.w)  # same, in fewer passes


class Gain(StaticNorm):
    """A constant and nothing else."""

    centres = False
    affine_part = ()

    def forward(self, mid: Mid) -> Mid:
        return mid * self.gain


def gain_matching_rms(norm: StaticNorm, mid: Float[Tensor, "token d_mlp"], eps: float) -> float:
    """Return the gain that makes `norm`'s output rms equal to that of the norm it is matched to.

    A per-token norm's output has mean square r = s2 / (s2 + eps) at a token, with s2 the variance of
    mid, or its mean square where that norm does not centre. So the gain is
    sqrt(mean r / mean square of what `norm` multiplies), both over the tokens of `mid`.

    Source: science.md section 3, "c matched to LN output rms at init".
    """
    mid = mid.double()
    s2 = mid.var(dim=-1, correction=0) if norm.matched_to.centres else mid.square().mean(dim=-1)
    engagement = s2 / (s2 + eps)
    return float((engagement.mean() / norm.centred(mid).square().mean()).sqrt())


@torch.no_grad()
def check_norm(norm: MidNorm, d_mlp: int) -> None:
    """Refuse a mid norm that does not compute what it declares, on a few random activations in fp64.

    Raises:
        UserError: the first of its parts that differs.
    """
    name = type(norm).__name__
    if not isinstance(norm, MidNorm):
        raise UserError(f"the mid norm {name} is no subclass of MidNorm, which says what it is")
    parameters = sorted((parameter for parameter, _ in norm.named_parameters()), reverse=True)
    if not {*parameters} <= {"w", "b"} or parameters != [*norm.affine_part]:
        raise UserError(
            f"the mid norm {name} has the parameters ({', '.join(parameters)}) and declares "
            f"affine_part={norm.affine_part}: wanted the same of w and b in both, w first"
        )
    norm = copy.deepcopy(norm).cpu().double()
    generator = torch.Generator().manual_seed(0)
    mid = torch.rand(8, d_mlp, dtype=torch.float64, generator=generator) + 0.1
    mid *= torch.logspace(-2, 1, 8, dtype=torch.float64)[:, None]  # tokens of different sizes
    for parameter in norm.parameters():
        parameter.copy_(torch.rand(d_mlp, dtype=torch.float64, generator=generator) + 0.5)
    if isinstance(norm, StaticNorm):
        norm.gain.fill_(3.0)
    centred = mid - mid.mean(dim=-1, keepdim=True) if norm.centres else mid
    denominator = norm.denominator(centred)
    if denominator.shape != (8, 1):
        raise UserError(
            f"the mid norm {name} gives denominators of shape {[*denominator.shape]} for 8 tokens: "
            "wanted one a token, [8, 1]"
        )
    normalized = centred / denominator
    affine = normalized * getattr(norm, "w", 1.0) + getattr(norm, "b", 0.0)
    if norm.eps is None:
        wanted, meaning = denominator[:1].expand(8, 1), "eps=None, one constant for all tokens"
    else:
        wanted = (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
        meaning = f"eps={norm.eps:g}, sqrt(mean square + eps)"
    parts = (
        ("centred", norm.centred(mid), centred, f"centres={norm.centres}"),
        ("denominator", denominator, wanted, meaning),
        ("affine", norm.affine(normalized), affine, f"affine_part={norm.affine_part}"),
        ("forward", norm(mid), affine, "affine(centred / denominator)"),
    )
    for part, value, expected, declared in parts:
        if value.shape != expected.shape or not torch.allclose(value, expected, 1e-9, 1e-12):
            raise UserError(f"the mid norm {name}: its {part} is not that of {declared}")
