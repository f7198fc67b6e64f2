"""What a variant is: a nonlinearity and a mid norm. Each file in this folder defines one.

The model, the conversion and the report act on these fields, never on a variant's name. A new
variant is one file here and one YAML of the same name in configs/variant/. Variant files import
torch inside functions, so that their parameters can be read and checked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from soluscope import plugins
from soluscope.errors import UserError
from soluscope.results import Step

if TYPE_CHECKING:
    from torch import Tensor

    from soluscope.norms import MidNorm


ACT_FNS = (
    "gelu",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "relu2",
    "silu",
    "solu",
    "solu_ln",
)
"""What TransformerLens takes as act_fn; solu_ln alone has a mid norm. Known here without loading it."""


@dataclass(frozen=True)
class NoParams:
    """A variant without parameters of its own."""


@dataclass(frozen=True)
class Variant:
    """How `pre` becomes `post`: post = norm(nonlinearity(pre)), each [batch pos d_mlp]."""

    nonlinearity: Callable[[Tensor], Tensor]
    hooked_act_fn: str
    """TransformerLens's act_fn, one of ACT_FNS; it must end in `_ln` where there is a mid norm, for
    hook_mid."""
    role: Literal["baseline", "plain", "static", "per_token"]
    """How a comparison uses the variant. static: one gain for all tokens, a candidate for the best
    static arm. per_token: a gain for each token. plain: SoLU without a norm. baseline: not SoLU."""
    build_norm: Callable[[int, Any], MidNorm] | None = None
    """From d_mlp and the parameters to the mid norm. None: post is mid."""
    params: type = NoParams
    adds: str = ""
    """What the variant adds to the one before it in the chain, in words: one step of the
    telescoping sum."""
    after: str = ""
    """Name of the variant before it in the chain. Empty: nothing stands before it."""
    twin: str = ""
    """Name of the variant that is the same with one gain for all tokens. Empty: there is none."""


def chain_of(name: str) -> tuple[Step, ...]:
    """Return the chain that ends in variant `name`, from its root, which adds nothing.

    Raises:
        UserError: if an `after` on the way names no variant, or the chain runs in a circle.
    """
    steps: list[Step] = []
    while name:
        if name in (step.variant for step in steps):
            circle = " after ".join([*(step.variant for step in steps), name])
            raise UserError(f"the chain of variants runs in a circle ({circle}): mend `after`")
        variant = plugins.pick("soluscope.variants", name)
        steps.append(Step(name, variant.adds if variant.after else ""))
        name = _checked(name, "after", variant.after)
    return tuple(reversed(steps))


def twin_of(name: str) -> str:
    """Return the name of the static twin of variant `name`, or an empty string.

    Raises:
        UserError: if `twin` names no variant.
    """
    return _checked(name, "twin", plugins.pick("soluscope.variants", name).twin)


def check_variant(name: str, params: Any, d_mlp: int) -> None:
    """Refuse a variant that the conversion, the probes or the comparison would read wrongly.

    Args:
        name: the variant's.
        params: its parameters.
        d_mlp: number of neurons.

    Raises:
        UserError: an unknown `after` or `twin`, a role or an act_fn that does not go with the norm, or
            a norm that does not compute what it declares.
    """
    from soluscope.norms import check_norm

    chain_of(name)
    twin_of(name)
    variant: Variant = plugins.pick("soluscope.variants", name)
    norm = None
    if variant.build_norm is not None:
        try:
            norm = variant.build_norm(d_mlp, params)
            check_norm(norm, d_mlp)
        except UserError as error:
            raise UserError(f"variant {name}: {error}") from error
    if variant.hooked_act_fn not in ACT_FNS:
        raise UserError(
            f"variant {name} has hooked_act_fn={variant.hooked_act_fn!r}: TransformerLens has "
            + ", ".join(ACT_FNS)
        )
    if variant.hooked_act_fn.endswith("_ln") != (norm is not None):
        state = "no mid norm" if norm is None else "a mid norm"
        raise UserError(
            f"variant {name} has {state} and hooked_act_fn={variant.hooked_act_fn!r}: wanted a name "
            "that ends in _ln where there is a mid norm, and no other"
        )
    kind = "plain" if norm is None else "static" if norm.eps is None else "per_token"
    if variant.role not in ("baseline", kind):
        raise UserError(f"variant {name} has role={variant.role!r}, and its norm makes it {kind!r}")


def _checked(name: str, field: str, other: str) -> str:
    """Return the variant that a field of variant `name` names; refuse an unknown one."""
    try:
        if other:
            plugins.check_name("variant", other, plugins.names("soluscope.variants"))
    except UserError as error:
        raise UserError(f"variant {name} has {field}={other!r}: {error}") from error
    return other
