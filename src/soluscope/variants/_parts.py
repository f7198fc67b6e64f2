"""What several variants share: the two nonlinearities and the parameters of their norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from soluscope.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SOLU_1L_KAPPA = 41.94304
"""eps * d_mlp^2 of the pretrained SoLU-1L: 1e-5 * 2048^2 (science.md section 1.4)."""


def gelu(pre: Tensor) -> Tensor:
    """x * Phi(x), exactly: not the tanh approximation. [... d_mlp] -> same."""
    from torch.nn.functional import gelu

    return gelu(pre)


def solu(pre: Tensor) -> Tensor:
    """x * softmax(x) over neurons. [... d_mlp] -> same. Source: Elhage et al. 2022, section 4.2."""
    return pre * pre.softmax(dim=-1)


@dataclass(frozen=True)
class LayerNormParams:
    """The per-token mid norm's epsilon, given as itself or as the dose it stands for."""

    eps: float | None = None
    """Epsilon of the mid norm, added to the variance, or to the mean square where it does not centre.
    null: taken from kappa."""
    kappa: float | None = None
    """eps * d_mlp^2, the dose that is comparable across sizes. null with eps null: SoLU-1L's 41.94."""

    def __post_init__(self) -> None:
        if self.eps is not None and self.kappa is not None:
            raise UserError(
                f"mid.eps={self.eps} and mid.kappa={self.kappa} are both given: set one of them to null"
            )
        for name in ("eps", "kappa"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"mid.{name}={value} must be above 0")

    def epsilon(self, d_mlp: int) -> float:
        """The epsilon itself. Source: science.md section 1.4, eps = kappa / N^2."""
        if self.eps is not None:
            return self.eps
        return (SOLU_1L_KAPPA if self.kappa is None else self.kappa) / d_mlp**2


@dataclass(frozen=True)
class StaticParams(LayerNormParams):
    """A constant gain. `eps` or `kappa` say which per-token norm `gain=init` is matched to."""

    gain: int | float | str = "init"
    """A number; `init`: output rms equal to the per-token norm's on the first batches, untrained; or
    the folder of a finished run with a per-token norm ({seed} is filled in): its geometric mean gain,
    BOS left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gain, str):
            try:
                self.gain.format(seed=0)
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(f"mid.gain={self.gain}: only {{seed}} is filled in") from error
        elif not self.gain > 0:
            raise UserError(
                f"mid.gain={self.gain} must be above 0, 'init', or a finished run's folder"
            )
