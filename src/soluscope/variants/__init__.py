"""Variants: a variant is a nonlinearity and a mid norm, and each file in this folder defines one.

The model, the conversion and the report use the fields below, never a variant's name. A new variant
is one file here and one YAML of the same name in configs/variant/. Variant files import torch inside
functions, so that their parameters can be read and checked without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

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
"""Values of act_fn that TransformerLens accepts; only solu_ln has a mid norm. The list is repeated here because
importing TransformerLens is slow."""


@runtime_checkable
class SoftmaxUnit(Protocol):
    """A nonlinearity with a softmax over neurons."""

    def __call__(self, pre: Tensor) -> Tensor:
        """Return the activations, [... d_mlp] -> same."""

    def log_softmax(self, pre: Tensor) -> Tensor:
        """Return the logarithm of the softmax, [... d_mlp] -> [... block neuron]."""


@dataclass(frozen=True)
class NoParams:
    """The empty parameters of a variant that has none."""


@dataclass(frozen=True)
class Variant:
    """The function from `pre` to `post`: post = norm(nonlinearity(pre)), each [batch pos d_mlp]."""

    hooked_act_fn: str
    """TransformerLens's act_fn, one of ACT_FNS. With a mid norm it must end in `_ln`, because hook_mid
    exists only then."""
    role: Literal["baseline", "plain", "static", "per_token", "other"]
    """Use of the variant in a comparison. static: one gain for all tokens, a candidate for the best static
    arm. per_token: a per-token gain. plain: SoLU without a norm. baseline: not SoLU. other: compared with the arms
    of these roles, but no arm is compared with it, and it is no candidate for any choice."""
    nonlinearity: Callable[[Tensor], Tensor] | None = None
    """Function from pre to mid. None: `build_nonlinearity` makes it."""
    build_nonlinearity: Callable[[int, Any], Callable[[Tensor], Tensor]] | None = None
    """Function from d_mlp and the parameters to the nonlinearity, if the nonlinearity depends on them."""
    build_norm: Callable[[int, Any], MidNorm] | None = None
    """Function from d_mlp and the parameters to the mid norm. None: post is mid."""
    params: type = NoParams
    label: str = ""
    """Name for people, such as `SoLU + LN`. The report adds the kind of gain and the settings that differ between
    arms: a variant and its static twin may share a label. Empty: the report uses the names of the arms."""
    adds: str = ""
    """Description of the difference from the previous variant in the chain: one step of the telescoping
    sum."""
    after: str = ""
    """Name of the previous variant in the chain. Empty: the variant is the root of the chain."""
    twin: str = ""
    """Name of the same variant with one gain for all tokens instead of a per-token gain. Empty: none exists."""

    def has_softmax(self, d_mlp: int, params: Any) -> bool:
        """Return whether the nonlinearity has a softmax over neurons, whose entropy training can change."""
        return isinstance(self.activation(d_mlp, params), SoftmaxUnit)

    def activation(self, d_mlp: int, params: Any) -> Callable[[Tensor], Tensor]:
        """Return the nonlinearity for `d_mlp` neurons and these parameters.

        Raises:
            UserError: if the variant declares none, or two.
        """
        if self.nonlinearity is not None and self.build_nonlinearity is None:
            return self.nonlinearity
        if self.nonlinearity is None and self.build_nonlinearity is not None:
            return self.build_nonlinearity(d_mlp, params)
        raise UserError(
            "the declaration has both or neither of nonlinearity and build_nonlinearity: give one of them"
        )


def chain_of(name: str) -> tuple[Step, ...]:
    """Return the chain that ends in variant `name`, beginning with its root; the root's `adds` is empty.

    Raises:
        UserError: if an `after` in the chain names an unknown variant, or the chain is a circle.
    """
    steps: list[Step] = []
    while name:
        if name in (step.variant for step in steps):
            circle = " after ".join([*(step.variant for step in steps), name])
            raise UserError(
                f"the chain of variants is a circle ({circle}): change `after` in one of them"
            )
        variant = plugins.pick("soluscope.variants", name)
        steps.append(Step(name, variant.adds if variant.after else ""))
        name = _checked(name, "after", variant.after)
    return tuple(reversed(steps))


def label_of(name: str) -> str:
    """Return the label of variant `name`; empty if it has none, or if its file no longer exists."""
    if name not in plugins.names("soluscope.variants"):
        return ""
    return str(plugins.pick("soluscope.variants", name).label)


def twin_of(name: str) -> str:
    """Return the name of the static twin of variant `name`, or an empty string.

    Raises:
        UserError: if `twin` names an unknown variant.
    """
    return _checked(name, "twin", plugins.pick("soluscope.variants", name).twin)


def check_variant(name: str, params: Any, d_mlp: int) -> None:
    """Refuse a variant with fields that contradict its norm or name unknown variants.

    The conversion, the probes and the comparison would otherwise give wrong results.

    Args:
        name: name of the variant.
        params: parameters of the variant.
        d_mlp: number of neurons.

    Raises:
        UserError: if `after` or `twin` is unknown, the role or the act_fn does not fit the norm, or the norm
            differs from its declared fields.
    """
    from soluscope.norms import check_norm

    chain_of(name)
    twin_of(name)
    variant: Variant = plugins.pick("soluscope.variants", name)
    norm = None
    try:
        variant.activation(d_mlp, params)
        if variant.build_norm is not None:
            norm = variant.build_norm(d_mlp, params)
            check_norm(norm, d_mlp)
    except UserError as error:
        raise UserError(f"variant {name}: {error}") from error
    if variant.hooked_act_fn not in ACT_FNS:
        raise UserError(
            f"variant {name} has hooked_act_fn={variant.hooked_act_fn!r}, but TransformerLens has only "
            + ", ".join(ACT_FNS)
        )
    if variant.hooked_act_fn.endswith("_ln") != (norm is not None):
        state = "no mid norm" if norm is None else "a mid norm"
        raise UserError(
            f"variant {name} has {state} and hooked_act_fn={variant.hooked_act_fn!r}: the name must end in "
            "_ln with a mid norm, and must not without a mid norm"
        )
    kind = _kind(norm)
    if variant.role not in ("baseline", "other", kind):
        raise UserError(
            f"variant {name} has role={variant.role!r}, but its norm implies role={kind!r}: change the role"
        )


def _kind(norm: MidNorm | None) -> str:
    """Return the role that a mid norm implies."""
    if norm is None:
        return "plain"
    if not norm.one_scale:
        return "other"
    return "static" if norm.eps is None else "per_token"


def _checked(name: str, field: str, other: str) -> str:
    """Return `other`, the variant that a field of variant `name` names; refuse an unknown variant."""
    try:
        if other:
            plugins.check_name("variant", other, plugins.names("soluscope.variants"))
    except UserError as error:
        raise UserError(f"variant {name} has {field}={other!r}: {error}") from error
    return other
