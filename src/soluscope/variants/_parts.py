"""Parts that several variants share: the nonlinearities and the parameters of the norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from soluscope.errors import UserError
from soluscope.reading import FilePath, only_seed_in_braces

if TYPE_CHECKING:
    from torch import Tensor

SOLU_1L_KAPPA = 41.94304
"""eps * d_mlp^2 of the pretrained SoLU-1L: 1e-5 * 2048^2 (protocol.md section 1.4)."""

LARGEST_EXPONENT = 30.0
"""Pre-activation from which x e^x is continued as a line through 0, x e^30, so that it cannot overflow."""


def gelu(pre: Tensor) -> Tensor:
    """Apply x * Phi(x) exactly, without the tanh approximation. [... d_mlp] -> same."""
    from torch.nn.functional import gelu

    return gelu(pre)


@dataclass(frozen=True)
class SoLU:
    """The function x * softmax(x), with a softmax over all neurons or over each of several blocks of neurons.

    Source: Elhage et al. 2022, sections 4.2 and 4.4.
    """

    n_blocks: int = 1
    """Number of blocks of equal size, in the order of the neurons."""

    def __call__(self, pre: Tensor) -> Tensor:
        """Return the activations, [... d_mlp] -> same."""
        if self.n_blocks == 1:
            return pre * pre.softmax(dim=-1)
        blocks: Tensor = pre.unflatten(-1, (self.n_blocks, -1))
        result: Tensor = (blocks * blocks.softmax(dim=-1)).flatten(-2)
        return result

    def log_softmax(self, pre: Tensor) -> Tensor:
        """Return the logarithm of the softmax, [... d_mlp] -> [... block neuron]."""
        blocks: Tensor = pre.unflatten(-1, (self.n_blocks, -1))
        return blocks.log_softmax(dim=-1)


solu = SoLU()


def exponential_unit(d_mlp: int, params: Any) -> Callable[[Tensor], Tensor]:
    """Return the function x e^x / N with N = `d_mlp`: SoLU with N in place of softmax's denominator Z.

    Z is N if all pre-activations are 0, and nearly N before training. With N in its place each neuron depends only
    on its own pre-activation, and the dose kappa and a constant gain have the same meaning as for SoLU.

    In fp32 e^x overflows at x = 88.7, and the square of x e^x, which a norm needs, at x = 40.7. Beyond x = 30 the
    exponential is therefore held at e^30, so values, squares and gradients stay finite. A neuron at 30 has 10^14
    times the activation of a neuron at 1, so no model that trains well comes near the bound.

    Source: Elhage et al. 2022, section 4.3; the bound is ours.
    """
    return partial(_exponential, d_mlp=d_mlp)


def _exponential(pre: Tensor, d_mlp: int) -> Tensor:
    return pre * pre.clamp(max=LARGEST_EXPONENT).exp() / d_mlp


@dataclass(frozen=True)
class NormParams:
    """Parameters of a per-token mid norm: its epsilon, given directly or as the dose kappa."""

    eps: float | None = None
    """Epsilon of the mid norm, added to the variance, or to the mean square in an RMSNorm. null: computed
    from kappa."""
    kappa: float | None = None
    """Dose eps * d_mlp^2, which is comparable across sizes. null, with eps null too: 41.94, as in SoLU-1L."""

    def __post_init__(self) -> None:
        if self.eps is not None and self.kappa is not None:
            raise UserError(
                f"mid.eps={self.eps} and mid.kappa={self.kappa} are both set: set one of them to null"
            )
        for name in ("eps", "kappa"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"mid.{name}={value} must be above 0")

    def epsilon(self, d_mlp: int) -> float:
        """Return the epsilon: eps, or kappa / N^2. Source: protocol.md section 1.4."""
        if self.eps is not None:
            return self.eps
        return (SOLU_1L_KAPPA if self.kappa is None else self.kappa) / d_mlp**2

    def dose(self, d_mlp: int) -> float:
        """Return kappa: epsilon times the square of the number of neurons that share a softmax."""
        return self.epsilon(d_mlp) * d_mlp**2


@dataclass(frozen=True)
class LayerNormParams(NormParams):
    """Parameters of a LayerNorm as mid norm."""

    affine: bool = True
    """false: no weight gamma and no bias beta of each neuron."""


@dataclass(frozen=True)
class BlockParams(NormParams):
    """Parameters of SoLU and LayerNorm within blocks of neurons."""

    n_blocks: int = 4
    """Number of blocks of equal size. Softmax and LayerNorm act within each block."""

    def check(self, d_mlp: int) -> None:
        """Refuse a number of blocks that does not divide the neurons.

        Raises:
            UserError: if a block has fewer than two neurons, or blocks differ in size.
        """
        if self.n_blocks < 1 or d_mlp % self.n_blocks or d_mlp // self.n_blocks < 2:
            raise UserError(
                f"mid.n_blocks={self.n_blocks} does not cut d_mlp={d_mlp} into equal blocks of two neurons or "
                "more: set it to a divisor of d_mlp"
            )

    def epsilon(self, d_mlp: int) -> float:
        """Return the epsilon: eps, or kappa over the square of a block's width, on which SoLU's outputs depend."""
        return super().epsilon(d_mlp // self.n_blocks)

    def dose(self, d_mlp: int) -> float:
        return super().epsilon(d_mlp // self.n_blocks) * (d_mlp // self.n_blocks) ** 2


@dataclass(frozen=True)
class StaticParams(NormParams):
    """Parameters of a static mid norm: a constant gain.

    With `gain=init`, the gain matches a per-token norm with this `eps` or `kappa`.
    """

    gain: int | float | FilePath = "init"
    """Constant gain. A number; or `init`: the untrained output rms on the first batches equals that of the
    per-token norm; or the folder of a finished run with a per-token norm ({seed} is replaced by the seed):
    the geometric mean of that run's gain, BOS left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gain, str):
            only_seed_in_braces("mid.gain", self.gain)
        elif not self.gain > 0:
            raise UserError(
                f"mid.gain={self.gain} must be above 0, 'init', or a finished run's folder"
            )


@dataclass(frozen=True)
class FrozenLayerNormParams(LayerNormParams, StaticParams):
    """Parameters of a LayerNorm with a constant gain."""
