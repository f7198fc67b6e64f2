"""What a probe sees: one layer's activations on one stream of text, token by token.

Models reach this module as HookedTransformers, wherever they come from, or under the same names
(bridge.py); nothing here knows how they were trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from soluscope.data.streams import Stream
from soluscope.errors import UserError
from soluscope.norms import MidNorm

ROWS_AT_ONCE = 16
LOGITS_AT_ONCE = 2**26
"""Most logits that a model is asked for in one go, for memory: 256 MB in fp32."""

CENTRES = {
    "LayerNorm": True, "LayerNormPre": True, "RMSNorm": False, "RMSNormPre": False,
    "NormalizationBridge": True, "LayerNormPreBridge": True,
    "RMSNormalizationBridge": False, "RMSNormPreBridge": False,
}  # fmt: skip
"""Whether a norm subtracts the mean, by its class in TransformerLens: four of 3.9, four of 4.x."""


@dataclass(frozen=True)
class Readout:
    """Weights between the mid norm and the logits, as they stand in the model (nothing folded)."""

    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    gamma: Float[Tensor, " d_mlp"]
    """Static gain of each neuron in the mid norm; ones where there is none."""
    beta: Float[Tensor, " d_mlp"]
    """Bias of the mid norm; zeros where there is none."""
    ln_w: Float[Tensor, " d_model"]
    ln_b: Float[Tensor, " d_model"]
    ln_eps: float
    ln_centred: bool
    """Whether ln_final subtracts the mean: True for LayerNorm, False for RMSNorm."""
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]


class Stages(NamedTuple):
    """What the MLP computes on the way, for residual streams of any shape [*place d_model]."""

    pre: Float[Tensor, "*place d_mlp"]
    mid: Float[Tensor, "*place d_mlp"]
    scale: Float[Tensor, "*place"]
    """The mid norm's denominator; ones where there is none."""
    post: Float[Tensor, "*place d_mlp"]
    out: Float[Tensor, "*place d_model"]
    """What is added to the residual stream, b_out included."""


@dataclass(frozen=True)
class Mlp:
    """ln2 and the MLP as a function of the residual stream: for edits that come before mid."""

    ln2: Callable[[Tensor], Tensor]
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    nonlinearity: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    """From mid to (scale [*place], post); None where there is no mid norm."""
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]

    @torch.no_grad()
    def __call__(self, resid_mid: Float[Tensor, "*place d_model"]) -> Stages:
        pre = self.ln2(resid_mid) @ self.W_in + self.b_in
        mid = self.nonlinearity(pre)
        scale, post = (mid.new_ones(mid.shape[:-1]), mid) if self.norm is None else self.norm(mid)
        return Stages(pre, mid, scale, post, post @ self.W_out + self.b_out)


@dataclass(frozen=True, eq=False)  # a run is itself: what is computed from it can be kept by it
class HookedRun:
    """Activations of the last MLP on one stream. Tokens are in reading order, string after string."""

    stream: str
    tokens: Int[Tensor, " token"]
    pos: Int[Tensor, " token"]
    """Place in the row; 0 is BOS."""
    string: Int[Tensor, " token"]
    """Which document or string the token is of; what intervals resample."""
    target: Int[Tensor, " token"]
    """The next token, or -1 at a row's end and where it is BOS."""
    loss: Float[Tensor, " token"]
    """Cross-entropy of the target in nats; nan where there is none."""
    pre: Float[Tensor, "token d_mlp"]
    mid: Float[Tensor, "token d_mlp"]
    post: Float[Tensor, "token d_mlp"]
    scale: Float[Tensor, " token"]
    """The mid norm's denominator, hook_scale; ones where there is no mid norm."""
    resid_mid: Float[Tensor, "token d_model"]
    eps: float | None
    """Epsilon inside the denominator; None where the denominator is one constant, or there is none."""
    centres: bool
    """Whether the mid norm subtracts the mean over neurons; False where there is no mid norm."""
    readout: Readout
    mlp: Mlp
    vocab: tuple[str, ...] = ()
    """Text of each token of the vocabulary; empty where it is not known."""

    @property
    def is_bos(self) -> Bool[Tensor, " token"]:
        return self.pos == 0

    @property
    def gain(self) -> Float[Tensor, " token"]:
        """What the mid norm multiplies a token's centred activations by: 1 / hook_scale."""
        return self.scale.reciprocal()

    @property
    def engagement(self) -> Float[Tensor, " token"]:
        """r = s2 / (s2 + eps), fp64: 0 where the gain is one constant, 1 in a LayerNorm without epsilon.

        From s2 and never from the gain: at a tiny epsilon r rounds to 1 in fp32 (science.md 10).
        """
        s2 = self.s2
        return torch.zeros_like(s2) if self.eps is None else s2 / (s2 + self.eps)

    @property
    def s2(self) -> Float[Tensor, " token"]:
        """Variance of mid over neurons, or its mean square where the norm does not centre; fp64."""
        return self.centred.square().mean(-1)

    @property
    def centred(self) -> Float[Tensor, "token d_mlp"]:
        """mid minus its mean over neurons, or mid itself where the norm does not centre; fp64."""
        mid = self.mid.double()
        return mid - mid.mean(-1, keepdim=True) if self.centres else mid

    @property
    def scored(self) -> Bool[Tensor, " token"]:
        """The tokens that are not BOS and have a target."""
        return ~self.is_bos & (self.target >= 0)

    @property
    def mean_log_gain(self) -> Float[Tensor, ""]:
        """Log of the gain's geometric mean over tokens that are not BOS; fp64."""
        return self.gain.double().log()[~self.is_bos].mean()

    def subset(self, keep: Bool[Tensor, " token"]) -> HookedRun:
        """The same run with some of its tokens only."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        kept: dict[str, Any] = {k: v[keep] for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **kept)

    @cached_property
    def is_solu(self) -> bool:
        """Whether mid is x * softmax(x): read off the activations, not off a name."""
        pre, mid = self.pre[:256], self.mid[:256]
        return torch.allclose(pre * pre.softmax(-1), mid, rtol=1e-3, atol=1e-7)


def planted(
    mid: Float[Tensor, "row pos d_mlp"], *, eps: float | None = None, gain: float = 1.0
) -> HookedRun:
    """A run with activations given by hand, for known answers. Each row is a string.

    Args:
        mid: what the nonlinearity gave; pre is the same.
        eps: a LayerNorm with this epsilon follows; without it, the constant `gain` after centring.
        gain: that constant.

    Returns:
        fp64 activations. W_in is the identity and resid_mid is mid; W_out is zero, so the MLP has no
        effect on a loss of ln 2 everywhere.
    """
    mid = mid.double()
    n_rows, width, d_mlp = mid.shape

    def norm(mid: Tensor) -> tuple[Tensor, Tensor]:
        centred = mid - mid.mean(-1, keepdim=True)
        scale = torch.full_like(mid[..., 0], 1 / gain)
        if eps is not None:
            scale = (centred.square().mean(-1) + eps).sqrt()
        return scale, centred / scale[..., None]

    scale, post = norm(mid)
    target = torch.ones(n_rows, width, dtype=torch.long)
    target[:, -1] = -1
    loss = torch.full((n_rows, width), math.log(2), dtype=torch.float64)
    zeros = mid.new_zeros
    return HookedRun(
        stream="planted", tokens=torch.zeros_like(target).flatten(), target=target.flatten(),
        pos=torch.arange(width).expand(n_rows, width).flatten(),
        string=torch.arange(n_rows)[:, None].expand(n_rows, width).flatten(),
        loss=loss.where(target >= 0, torch.nan).flatten(), pre=mid.flatten(0, 1),
        mid=mid.flatten(0, 1), post=post.flatten(0, 1), scale=scale.flatten(),
        resid_mid=mid.flatten(0, 1), eps=eps, centres=True,
        readout=Readout(
            W_out=zeros(d_mlp, d_mlp), b_out=zeros(d_mlp), gamma=zeros(d_mlp) + 1,
            beta=zeros(d_mlp), ln_w=zeros(d_mlp) + 1, ln_b=zeros(d_mlp), ln_eps=1e-5,
            ln_centred=True, W_U=zeros(d_mlp, 2), b_U=zeros(2),
        ),
        mlp=Mlp(
            ln2=lambda resid: resid, W_in=torch.eye(d_mlp, dtype=mid.dtype), b_in=zeros(d_mlp),
            nonlinearity=lambda pre: pre, norm=norm, W_out=zeros(d_mlp, d_mlp), b_out=zeros(d_mlp),
        ),
    )  # fmt: skip


@torch.no_grad()
def observe(model: Any, stream: Stream) -> HookedRun:
    """Run a HookedTransformer over `stream` and keep what probes need of its last MLP, on the CPU.

    Raises:
        UserError: if the model has no MLP, a final norm that is neither LayerNorm nor RMSNorm, tokens
            that are not the stream's, or NaN weights (which are named).
    """
    check_model(model)
    if int(stream.tokens.max()) >= model.cfg.d_vocab:
        raise UserError(
            f"the text has token {int(stream.tokens.max())}, and the model knows {model.cfg.d_vocab}: "
            "it was made with another tokenizer; use the model's own"
        )
    block = model.blocks[-1]
    prefix = f"blocks.{model.cfg.n_layers - 1}."
    norm = getattr(block.mlp, "ln", None)
    has_norm = norm is not None
    names = {f"{prefix}mlp.hook_pre", f"{prefix}mlp.hook_post", f"{prefix}hook_resid_mid"}
    if has_norm:
        names |= {f"{prefix}mlp.hook_mid", f"{prefix}mlp.ln.hook_scale"}
    parts: list[dict[str, Tensor]] = []
    step = rows_at_once(stream.tokens.shape[1], model.cfg.d_vocab)
    for start in range(0, len(stream.tokens), step):
        rows = slice(start, start + step)
        tokens, keep = stream.tokens[rows], stream.keep[rows]
        logits, cache = model.run_with_cache(
            tokens.to(model.cfg.device), names_filter=names.__contains__
        )
        target = F.pad(tokens[:, 1:], (0, 1), value=-1)
        target = target.where(F.pad(keep[:, 1:], (0, 1)) & (target != stream.bos), -1)
        loss = F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            target.flatten().to(logits.device),
            ignore_index=-1,
            reduction="none",
        ).view(target.shape)
        post = cache[f"{prefix}mlp.hook_post"]
        part = {
            "tokens": tokens, "target": target, "string": stream.string[rows],
            "pos": torch.arange(tokens.shape[1]).expand(tokens.shape),
            "loss": loss.cpu().where(target >= 0, torch.nan),
            "pre": cache[f"{prefix}mlp.hook_pre"], "post": post,
            "mid": cache[f"{prefix}mlp.hook_mid"] if has_norm else post,
            "scale": cache[f"{prefix}mlp.ln.hook_scale"].squeeze(-1) if has_norm else post.new_ones(tokens.shape),
            "resid_mid": cache[f"{prefix}hook_resid_mid"],
        }  # fmt: skip
        parts.append({name: tensor.cpu()[keep] for name, tensor in part.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    centres, eps = _declared(norm)
    return HookedRun(
        stream=stream.name, eps=eps, centres=centres,
        readout=_readout(model, block), mlp=_mlp(block), vocab=stream.vocab, **joined,
    )  # fmt: skip


def _declared(norm: Any) -> tuple[bool, float | None]:
    """Return whether a mid norm centres, and its epsilon: its own declaration, or by CENTRES."""
    if norm is None:
        return False, None
    ours = getattr(norm, "original_component", norm)  # 4.x wraps it
    if isinstance(ours, MidNorm):
        return ours.centres, ours.eps
    return CENTRES[type(norm).__name__], norm.eps


def rows_at_once(width: int, d_vocab: int) -> int:
    """How many rows of `width` tokens a model reads in one go."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (width * d_vocab)))


def _readout(model: Any, block: Any) -> Readout:
    mlp, final = block.mlp, model.ln_final
    norm = getattr(mlp, "ln", None)
    n, d = mlp.W_out.shape
    return Readout(
        W_out=_own(mlp.W_out), b_out=_own(mlp.b_out), gamma=_own(getattr(norm, "w", None), n, 1.0, mlp),
        beta=_own(getattr(norm, "b", None), n, 0.0, mlp), ln_w=_own(getattr(final, "w", None), d, 1.0, mlp),
        ln_b=_own(getattr(final, "b", None), d, 0.0, mlp), ln_eps=final.eps,
        ln_centred=CENTRES[type(final).__name__],
        W_U=_own(model.unembed.W_U), b_U=_own(model.unembed.b_U),
    )  # fmt: skip


def _own(weight: Tensor | None, n: int = 0, otherwise: float = 0.0, like: Any = None) -> Tensor:
    """A weight on the CPU, outside the graph; where there is none, what its absence means.

    4.x stores transposes. Products with those round otherwise, so they are laid out as in 3.9.
    """
    if weight is not None:
        return weight.detach().cpu().contiguous()
    return torch.full((n,), otherwise, dtype=like.W_out.dtype)


def _mlp(block: Any) -> Mlp:
    """A copy on the CPU that later hooks on the model do not reach."""
    parts = copy.deepcopy(nn.ModuleList([block.ln2, block.mlp])).cpu()
    ln2, mlp = cast(Any, parts)
    norm: Any = getattr(mlp, "ln", None)

    def through(mid: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        watch = norm.hook_scale.register_forward_hook(lambda *args: seen.append(args[-1]))
        post = norm(mid)
        watch.remove()
        return seen[0].squeeze(-1).expand(mid.shape[:-1]), post

    return Mlp(
        ln2=ln2, W_in=_own(mlp.W_in), b_in=_own(mlp.b_in), nonlinearity=mlp.act_fn,
        norm=through if norm is not None else None, W_out=_own(mlp.W_out), b_out=_own(mlp.b_out),
    )  # fmt: skip


def check_model(model: Any) -> None:
    """Refuse what the probes cannot read, in one line."""
    if model.cfg.attn_only:
        raise UserError("the model has no MLP: the probes are about what stands in its middle")
    if type(model.ln_final).__name__ not in CENTRES:
        raise UserError(
            f"the model's final norm is {type(model.ln_final).__name__}: the closed forms need LayerNorm "
            "or RMSNorm before the unembedding"
        )
    norm = getattr(model.blocks[-1].mlp, "ln", None)
    ours = getattr(norm, "original_component", norm)
    if not (norm is None or isinstance(ours, MidNorm) or type(norm).__name__ in CENTRES):
        raise UserError(
            f"the model's mid norm is {type(norm).__name__}: wanted LayerNorm, RMSNorm or a MidNorm of "
            "soluscope.norms, which declares whether it centres and its epsilon"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"the model's {name} holds values that are not finite: train or load it again"
            )
