"""Mid norms: post = (mid - centre) / denominator * w + b. Each norm declares these parts.

`gain` is always 1 / denominator, as in the papers; TransformerLens's hook_scale is the denominator.
Statistics are never computed below fp32, because SoLU's variance is about 1e-7.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soluscope.errors import UserError

if TYPE_CHECKING:  # training does not require jaxtyping
    from jaxtyping import Bool, Float

    Mid = Float[Tensor, "*batch d_mlp"]
    PerToken = Float[Tensor, "*batch 1"]
    PerNeuron = Float[Tensor, "*batch d_mlp"]


class MidNorm(nn.Module):
    """Base class of the mid norms, with their common formula.

    A subclass declares the parts and computes the denominator. The conversion, the probes and training read
    the declared fields, and `check_norm` refuses a norm with a computation that differs from them.
    """

    centres: ClassVar[bool]
    """True if the mean over neurons, or over the neurons of each block, is subtracted from mid."""
    n_blocks: int = 1
    """Number of blocks of equal size, in the order of the neurons. Each block has its own mean and scale."""
    one_scale: ClassVar[bool] = True
    """True if one number for each token divides all of its neurons. If False, the denominator has a value for each
    neuron, the run has no gain or r, and probes that need them are left out."""
    affine_part: ClassVar[tuple[str, ...]]
    """Parameters applied after the division: ("w", "b"), ("w",), ("b",) or (). w has one weight per neuron,
    and b has one bias per neuron."""
    bos_apart: ClassVar[bool] = False
    """True if BOS has a separate constant, `bos_gain`. The norm then needs to know which tokens are BOS."""
    is_bos: Bool[Tensor, "*batch pos"] | None = None
    """Mask of BOS, read if `bos_apart`. The last positions count, if it has more than mid. None: mid has whole rows
    [batch pos d_mlp], and BOS is at position 0."""
    learned: ClassVar[tuple[str, ...]] = ()
    """Other parameters, which change the gain in training."""
    eps: float | None = None
    """Epsilon of a per-token denominator, sqrt(mean square of the centred mid + eps). None: the
    denominator is one constant for all tokens, or `one_scale` is False."""
    w: nn.Parameter
    b: nn.Parameter

    def __init__(self, length: int) -> None:
        super().__init__()
        for field in ("centres", "affine_part"):
            if not hasattr(self, field):
                raise UserError(
                    f"the mid norm {type(self).__name__} declares no {field}: set it in the class"
                )
        if "w" in self.affine_part:
            self.w = nn.Parameter(torch.ones(length))
        if "b" in self.affine_part:
            self.b = nn.Parameter(torch.zeros(length))

    @property
    def is_layer_norm(self) -> bool:
        """Return whether the norm is the LayerNorm of TransformerLens: centred, per-token, with w and b."""
        return self.centres and self.eps is not None and self.affine_part == ("w", "b")

    def centred(self, mid: Mid) -> Mid:
        """Return `mid`, minus its mean over neurons if the norm centres."""
        return mid - mid.mean(dim=-1, keepdim=True) if self.centres else mid

    def denominator(self, centred: Mid) -> PerToken | PerNeuron:
        """Return the divisor of each token's centred activations."""
        raise NotImplementedError

    def affine(self, normalized: Mid) -> Mid:
        """Apply the weight w and the bias b of each neuron, as far as `affine_part` declares them."""
        if "w" in self.affine_part:
            normalized = normalized * self.w
        return normalized + self.b if "b" in self.affine_part else normalized

    def forward(self, mid: Mid) -> Mid:
        centred = self.centred(mid)
        return self.affine(centred / self.denominator(centred))


class PerTokenNorm(MidNorm):
    """A norm with a per-token scale: the root of the mean square of a token's activations plus epsilon."""

    eps: float

    def __init__(self, length: int, eps: float) -> None:
        super().__init__(length)
        self.eps = eps

    def denominator(self, centred: Mid) -> PerToken:
        return (centred.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()


class LayerNorm(PerTokenNorm):
    """LayerNorm: its denominator is sqrt(var + eps), with the population variance. Also ln1, ln2 and ln_final."""

    centres = True
    affine_part = ("w", "b")

    def forward(self, mid: Mid) -> Mid:
        return F.layer_norm(mid, self.w.shape, self.w, self.b, self.eps)  # one kernel, same formula


class DetachedLayerNorm(LayerNorm):
    """LayerNorm whose per-token scale has no gradient: the same outputs, and another backward pass."""

    def forward(self, mid: Mid) -> Mid:
        centred = self.centred(mid)
        return self.affine(centred / self.denominator(centred).detach())


class BareLayerNorm(PerTokenNorm):
    """LayerNorm without gamma and beta."""

    centres = True
    affine_part = ()


class RMSNorm(PerTokenNorm):
    """RMSNorm, that is LayerNorm without centring and bias: its denominator is sqrt(mean square + eps)."""

    centres = False
    affine_part = ("w",)

    def forward(self, mid: Mid) -> Mid:
        return F.rms_norm(mid, self.w.shape, self.w, self.eps)  # one call, same formula


class BlockLayerNorm(MidNorm):
    """LayerNorm within blocks of neurons: each block has its own mean and variance; w and b are per neuron."""

    centres = True
    affine_part = ("w", "b")
    one_scale = False

    def __init__(self, length: int, eps: float, n_blocks: int) -> None:
        super().__init__(length)
        self.n_blocks, self.block_eps = n_blocks, eps

    def centred(self, mid: Mid) -> Mid:
        blocks: Tensor = mid.unflatten(-1, (self.n_blocks, -1))
        return (blocks - blocks.mean(dim=-1, keepdim=True)).flatten(-2)

    def denominator(self, centred: Mid) -> PerNeuron:
        blocks: Tensor = centred.unflatten(-1, (self.n_blocks, -1))
        scale = (blocks.square().mean(dim=-1, keepdim=True) + self.block_eps).sqrt()
        return scale.expand_as(blocks).flatten(-2)


class StaticNorm(MidNorm):
    """A norm with one gain for all tokens. The gain is nan until training sets it or a checkpoint is loaded."""

    matched_to: ClassVar[type[PerTokenNorm]] = LayerNorm
    """Per-token norm with the output rms that `mid.gain=init` reproduces."""
    gain: Tensor
    """The gain before training."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.register_buffer("gain", torch.tensor(torch.nan))

    def present_gain(self) -> Float[Tensor, ""]:
        """Return the gain; it differs from `gain` if training changes it."""
        return self.gain

    def denominator(self, centred: Mid) -> PerToken:
        return self.present_gain().reciprocal().expand(*centred.shape[:-1], 1)


class FrozenLayerNorm(StaticNorm):
    """LayerNorm with a constant denominator; its centring, weights and bias are unchanged."""

    centres = True
    affine_part = ("w", "b")

    def forward(self, mid: Mid) -> Mid:
        return torch.addcmul(self.b, self.centred(mid), self.gain * self.w)  # same, in fewer passes


class FrozenBosLayerNorm(StaticNorm):
    """LayerNorm with one constant denominator for BOS and another for all other tokens."""

    centres = True
    affine_part = ("w", "b")
    bos_apart = True
    bos_gain: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.register_buffer("bos_gain", torch.tensor(torch.nan))

    def denominator(self, centred: Mid) -> PerToken:
        places, n_pos = centred.shape[:-1], centred.shape[-2]
        is_bos = self.is_bos
        if is_bos is None:
            is_bos = torch.arange(n_pos, device=centred.device) == 0
        gain = torch.where(is_bos[..., -n_pos:], self.bos_gain, self.gain)
        return gain.reciprocal().expand(places)[..., None]


class FrozenRMSNorm(StaticNorm):
    """RMSNorm with a constant denominator; its weights are unchanged."""

    centres = False
    affine_part = ("w",)
    matched_to = RMSNorm

    def forward(self, mid: Mid) -> Mid:
        return mid * (self.gain * self.w)  # same, in fewer passes


class FrozenBareLayerNorm(StaticNorm):
    """Centring and one constant, without weights and bias."""

    centres = True
    affine_part = ()


class Gain(StaticNorm):
    """A multiplication by one constant, without centring, weights or bias."""

    centres = False
    affine_part = ()

    def forward(self, mid: Mid) -> Mid:
        return mid * self.gain


class LearnedGain(StaticNorm):
    """A multiplication by one number that training changes, without centring, weights or bias.

    The number is gain exp(log_factor), which stays above 0. log_factor starts at 0 and has no weight decay.
    """

    centres = False
    affine_part: ClassVar[tuple[str, ...]] = ()
    learned = ("log_factor",)

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.log_factor = nn.Parameter(torch.zeros(()))

    def present_gain(self) -> Float[Tensor, ""]:
        return self.gain * self.log_factor.exp()

    def forward(self, mid: Mid) -> Mid:
        return mid * self.present_gain()


class RunningLayerNorm(LearnedGain):
    """LayerNorm with one gain for all tokens, which follows the batches in training and is constant afterwards.

    Before each pass of training, log_factor moves a part of the way to the value at which the gain is the geometric
    mean of 1 / sqrt(var + eps) over the batch's tokens. No gradient reaches it.
    """

    centres = True
    affine_part = ("w", "b")
    SHARE: ClassVar[float] = 0.01
    """Part of the way that one pass moves log_factor."""

    def __init__(self, length: int, eps: float) -> None:
        super().__init__(length)
        self.followed_eps = eps
        self.log_factor.requires_grad_(False)

    def forward(self, mid: Mid) -> Mid:
        centred = self.centred(mid)
        if self.training and torch.is_grad_enabled():
            self._follow(centred.detach())
        return torch.addcmul(self.b, centred, self.present_gain() * self.w)

    @torch.no_grad()
    def _follow(self, centred: Mid) -> None:
        log_gain = -(centred.square().mean(dim=-1) + self.followed_eps).log().mean() / 2
        if torch.distributed.is_initialized():  # each process has a part of the batch
            torch.distributed.all_reduce(log_gain)
            log_gain /= torch.distributed.get_world_size()
        self.log_factor.lerp_(log_gain - self.gain.log(), self.SHARE)


class DynamicTanh(LearnedGain):
    """w tanh(alpha mid) + b: a constant slope alpha, learned in training, and neurons that saturate at 1.

    The scale of a neuron, mid / tanh(alpha mid), grows with its activation from 1 / alpha on. alpha is gain
    exp(log_factor); `mid.gain=init` matches the rms of alpha mid, before the tanh.

    Source: Zhu et al. 2025, "Transformers without Normalization".
    """

    affine_part = ("w", "b")
    one_scale = False

    def denominator(self, centred: Mid) -> PerNeuron:
        squashed = (self.present_gain() * centred).tanh()
        is_flat = squashed == 0
        ratio = centred / squashed.masked_fill(is_flat, 1)
        return torch.where(is_flat, self.present_gain().reciprocal(), ratio)

    def forward(self, mid: Mid) -> Mid:
        return self.affine((self.present_gain() * mid).tanh())


def gain_matching_rms(norm: StaticNorm, mid: Float[Tensor, "token d_mlp"], eps: float) -> float:
    """Return the gain that makes the output rms of `norm` equal to that of its `matched_to` norm.

    The output of a per-token norm has mean square r = s2 / (s2 + eps) at each token. Here s2 is the variance of
    mid, or the mean square if that norm does not centre. The gain is therefore
    sqrt(mean r / mean square of `norm.centred(mid)`), with both means over the tokens of `mid`.

    Source: protocol.md section 3.1.
    """
    mid = mid.double()
    s2 = mid.var(dim=-1, correction=0) if norm.matched_to.centres else mid.square().mean(dim=-1)
    engagement = s2 / (s2 + eps)
    return float((engagement.mean() / norm.centred(mid).square().mean()).sqrt())


@torch.no_grad()
def check_norm(norm: MidNorm, d_mlp: int) -> None:
    """Refuse a mid norm with a computation that differs from its declared fields.

    Both are compared on a few random activations in fp64.

    Raises:
        UserError: if a part differs; the message names the first such part.
    """
    name = type(norm).__name__
    if not isinstance(norm, MidNorm):
        raise UserError(f"the mid norm {name} is not a subclass of MidNorm: derive it from MidNorm")
    named = {parameter for parameter, _ in norm.named_parameters()} - {*norm.learned}
    parameters = sorted(named, reverse=True)
    if not {*parameters} <= {"w", "b"} or parameters != [*norm.affine_part]:
        raise UserError(
            f"the mid norm {name} has the parameters ({', '.join(parameters)}) and declares "
            f"affine_part={norm.affine_part}: both must list the same of w and b, w first"
        )
    norm = copy.deepcopy(norm).cpu().double()
    generator = torch.Generator().manual_seed(0)
    mid = torch.rand(8, d_mlp, dtype=torch.float64, generator=generator) + 0.1
    mid *= torch.logspace(-2, 1, 8, dtype=torch.float64)[:, None]  # tokens of different sizes
    for parameter in norm.parameters():
        parameter.copy_(torch.rand(parameter.shape, dtype=torch.float64, generator=generator) + 0.5)
    for number, buffer in enumerate(norm.buffers(), start=3):
        buffer.fill_(number)  # different, so that a second constant shows
    blocks = mid.unflatten(-1, (norm.n_blocks, -1))
    centred = (blocks - blocks.mean(dim=-1, keepdim=True)).flatten(-2) if norm.centres else mid
    denominator = norm.denominator(centred)
    wanted_shape, each = ((8, 1), "token") if norm.one_scale else ((8, d_mlp), "neuron")
    if denominator.shape != wanted_shape:
        raise UserError(
            f"the mid norm {name} gives denominators of shape {[*denominator.shape]} for 8 tokens: "
            f"return one per {each}, {[*wanted_shape]}"
        )
    normalized = centred / denominator
    affine = normalized * getattr(norm, "w", 1.0) + getattr(norm, "b", 0.0)
    if not norm.one_scale:
        wanted, meaning = denominator, "one_scale=False"
    elif norm.eps is None:
        wanted, meaning = denominator[-1:].expand(8, 1), "eps=None, one constant for all tokens"
        if norm.bos_apart:
            wanted = torch.cat([denominator[:1], wanted[1:]])
            meaning = "bos_apart=True, one constant for all tokens but the first"
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
            raise UserError(f"the mid norm {name}: its {part} differs from the declared {declared}")
