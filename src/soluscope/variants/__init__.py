"""What a variant is: a nonlinearity and a mid norm. Each file in this folder defines one.

The model, the conversion and the report act on these fields, never on a variant's name. A new
variant is one file here and one YAML of the same name in configs/variant/. Variant files import
torch inside functions, so that their parameters can be read and checked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from soluscope.norms import MidNorm


@dataclass(frozen=True)
class NoParams:
    """A variant without parameters of its own."""


@dataclass(frozen=True)
class Variant:
    """How `pre` becomes `post`: post = norm(nonlinearity(pre)), each [batch pos d_mlp]."""

    nonlinearity: Callable[[Tensor], Tensor]
    hooked_act_fn: str
    """TransformerLens's act_fn; it must end in `_ln` where there is a mid norm, for hook_mid."""
    build_norm: Callable[[int, Any], MidNorm] | None = None
    """From d_mlp and the parameters to the mid norm. None: post is mid."""
    params: type = NoParams
