"""Activations of one layer on one stream of text, token by token: the input of every probe.

Models are HookedTransformers, or TransformerBridges wrapped under the same names (bridge.py). Nothing
here depends on how a model was trained.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
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
"""Largest number of logits per forward pass, to limit memory: 256 MB in fp32."""
NUMBERS_AT_ONCE = 2**20
"""Largest number of activations of one stage per forward pass without logits."""

CENTRES = {
    "LayerNorm": True, "LayerNormPre": True, "RMSNorm": False, "RMSNormPre": False,
    "NormalizationBridge": True, "LayerNormPreBridge": True,
    "RMSNormalizationBridge": False, "RMSNormPreBridge": False,
}  # fmt: skip
"""Centring of TransformerLens's norms, by class: True if the norm subtracts the mean. Four of 3.9, four of 4.x."""


@dataclass(frozen=True)
class Readout:
    """Weights between the mid norm and the logits, as stored in the model (nothing folded)."""

    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    gamma: Float[Tensor, " d_mlp"]
    """Per-neuron weight of the mid norm; ones if there is no such weight."""
    beta: Float[Tensor, " d_mlp"]
    """Per-neuron bias of the mid norm; zeros if there is no such bias."""
    ln_w: Float[Tensor, " d_model"]
    ln_b: Float[Tensor, " d_model"]
    ln_eps: float
    ln_centred: bool
    """Centring of ln_final: True if it subtracts the mean (LayerNorm), False if not (RMSNorm)."""
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]


class Stages(NamedTuple):
    """Intermediate values of the MLP, for residual streams of any shape [*place d_model]."""

    pre: Float[Tensor, "*place d_mlp"]
    mid: Float[Tensor, "*place d_mlp"]
    scale: Float[Tensor, "*place"]
    """Denominator of the mid norm; ones without a mid norm."""
    post: Float[Tensor, "*place d_mlp"]
    out: Float[Tensor, "*place d_model"]
    """Output of the MLP, which is added to the residual stream; b_out included."""


@dataclass(frozen=True)
class Mlp:
    """ln2 and the MLP as a function of the residual stream, for edits at a stage before mid."""

    ln2: Callable[[Tensor], Tensor]
    W_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, " d_mlp"]
    nonlinearity: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    """Function from mid to (scale [*place], post); None without a mid norm."""
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]

    @torch.no_grad()
    def __call__(self, resid_mid: Float[Tensor, "*place d_model"]) -> Stages:
        pre = self.ln2(resid_mid) @ self.W_in + self.b_in
        mid = self.nonlinearity(pre)
        scale, post = (mid.new_ones(mid.shape[:-1]), mid) if self.norm is None else self.norm(mid)
        return Stages(pre, mid, scale, post, post @ self.W_out + self.b_out)


@dataclass(frozen=True, eq=False)  # eq=False: hashed by identity, so results can be cached per run
class Text:
    """Tokens of one stream in reading order, one string after another, and their losses."""

    stream: str
    tokens: Int[Tensor, " token"]
    pos: Int[Tensor, " token"]
    """Position in the row; 0 is BOS."""
    string: Int[Tensor, " token"]
    """Index of the token's document or string, the unit that intervals resample."""
    target: Int[Tensor, " token"]
    """The next token; -1 at the end of a row and if the next token is BOS."""
    loss: Float[Tensor, " token"]
    """Cross-entropy of the target in nats; nan without a target."""

    @property
    def device(self) -> torch.device:
        return self.pos.device

    @property
    def is_bos(self) -> Bool[Tensor, " token"]:
        return self.pos == 0

    @property
    def scored(self) -> Bool[Tensor, " token"]:
        """Return a mask of the tokens that are not BOS and have a target."""
        return ~self.is_bos & (self.target >= 0)


@dataclass(frozen=True, eq=False)
class HookedRun(Text):
    """Activations of the last MLP on one stream, or on some whole rows of it."""

    pre: Float[Tensor, "token d_mlp"]
    mid: Float[Tensor, "token d_mlp"]
    post: Float[Tensor, "token d_mlp"]
    scale: Float[Tensor, " token"]
    """Denominator of the mid norm (hook_scale); ones without a mid norm."""
    resid_mid: Float[Tensor, "token d_model"]
    eps: float | None
    """Epsilon inside the denominator; None for a constant denominator, and without a mid norm."""
    centres: bool
    """Centring of the mid norm: True if it subtracts the mean over neurons; False without a mid norm."""
    readout: Readout
    mlp: Mlp
    vocab: tuple[str, ...] = ()
    """Text of each token of the vocabulary; empty if unknown."""

    @property
    def gain(self) -> Float[Tensor, " token"]:
        """Return the mid norm's factor on a token's centred activations: 1 / hook_scale."""
        return self.scale.reciprocal()

    @property
    def engagement(self) -> Float[Tensor, " token"]:
        """Return r = s2 / (s2 + eps), fp64: 0 for a constant gain, 1 for a LayerNorm without epsilon.

        r and the gain are each computed from s2, never the gain from r: at a tiny epsilon r rounds to 1
        (protocol.md section 8.8).
        """
        s2 = self.s2
        return torch.zeros_like(s2) if self.eps is None else s2 / (s2 + self.eps)

    @property
    def s2(self) -> Float[Tensor, " token"]:
        """Return the variance of mid over neurons, or its mean square if the norm does not centre; fp64."""
        return self.centred.square().mean(-1)

    @property
    def centred(self) -> Float[Tensor, "token d_mlp"]:
        """Return mid minus its mean over neurons, or mid itself if the norm does not centre; fp64."""
        mid = self.mid.double()
        return mid - mid.mean(-1, keepdim=True) if self.centres else mid

    @property
    def k_eff(self) -> Float[Tensor, " token"]:
        """Return K = |a|^2 / max(a)^2, the effective number of neurons that share a token's code; fp64."""
        square = self.mid.double().square()
        return square.sum(-1) / square.amax(-1)

    @property
    def mean_log_gain(self) -> Float[Tensor, ""]:
        """Return the log of the gain's geometric mean over tokens that are not BOS; fp64."""
        return self.gain.double().log()[~self.is_bos].mean()

    def subset(self, keep: Bool[Tensor, " token"] | Int[Tensor, " t"]) -> HookedRun:
        """Return the same run, restricted to the tokens in `keep`, a mask or indices."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        kept: dict[str, Any] = {k: v[keep] for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **kept)

    @cached_property
    def is_solu(self) -> bool:
        """Return whether mid is x * softmax(x), judged by the activations and not by a name."""
        pre, mid = self.pre[:256], self.mid[:256]
        return torch.allclose(pre * pre.softmax(-1), mid, rtol=1e-3, atol=1e-7)


def planted(
    mid: Float[Tensor, "row pos d_mlp"], *, eps: float | None = None, gain: float = 1.0
) -> HookedRun:
    """Return a run with the given activations, for tests with known answers. Each row is a string.

    Args:
        mid: output of the nonlinearity; pre is set to the same values.
        eps: epsilon of the LayerNorm after the nonlinearity. Without it, activations are centred and
            multiplied by `gain`.
        gain: constant gain; ignored if `eps` is given.

    Returns:
        A run with fp64 activations. W_in is the identity and resid_mid equals mid. W_out is zero, so the
        MLP has no effect on the loss, which is ln 2 at every target.
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
    target = torch.ones(n_rows, width, dtype=torch.long, device=mid.device)
    target[:, -1] = -1
    loss = mid.new_full((n_rows, width), math.log(2))
    zeros = mid.new_zeros
    return HookedRun(
        stream="planted", tokens=torch.zeros_like(target).flatten(), target=target.flatten(),
        pos=torch.arange(width, device=mid.device).expand(n_rows, width).flatten(),
        string=torch.arange(n_rows, device=mid.device)[:, None].expand(n_rows, width).flatten(),
        loss=loss.where(target >= 0, torch.nan).flatten(), pre=mid.flatten(0, 1),
        mid=mid.flatten(0, 1), post=post.flatten(0, 1), scale=scale.flatten(),
        resid_mid=mid.flatten(0, 1), eps=eps, centres=True,
        readout=Readout(
            W_out=zeros(d_mlp, d_mlp), b_out=zeros(d_mlp), gamma=zeros(d_mlp) + 1,
            beta=zeros(d_mlp), ln_w=zeros(d_mlp) + 1, ln_b=zeros(d_mlp), ln_eps=1e-5,
            ln_centred=True, W_U=zeros(d_mlp, 2), b_U=zeros(2),
        ),
        mlp=Mlp(
            ln2=lambda resid: resid, W_in=torch.eye(d_mlp).to(mid), b_in=zeros(d_mlp),
            nonlinearity=lambda pre: pre, norm=norm, W_out=zeros(d_mlp, d_mlp), b_out=zeros(d_mlp),
        ),
    )  # fmt: skip


def observe(model: Any, stream: Stream) -> HookedRun:
    """Run a HookedTransformer over `stream` and return the activations of its last MLP, on the model's device.

    Raises:
        UserError: as `observe_blocks`.
    """
    blocks = list(observe_blocks(model, stream))
    names = [name for name, value in vars(blocks[0]).items() if isinstance(value, Tensor)]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(block, name) for block in blocks]) for name in names
    }
    return replace(blocks[0], **joined)


@torch.no_grad()
def observe_blocks(model: Any, stream: Stream, *, with_loss: bool = True) -> Iterator[HookedRun]:
    """Yield the same activations in blocks of whole rows, one for each forward pass.

    A model below fp32 is measured in fp32, with its rounded weights.

    Args:
        model: the model.
        stream: rows of tokens.
        with_loss: False to leave out the unembedding, most of the time of a small model. Every loss is then nan.

    Raises:
        UserError: if the model has no MLP, an unsupported final or mid norm, or weights that are not
            finite (the message names them); or if the stream has tokens outside the model's vocabulary.
    """
    check_model(model)
    model = _at_least_fp32(model)
    if int(stream.tokens.max()) >= model.cfg.d_vocab:
        raise UserError(
            f"the text has token {int(stream.tokens.max())}, but the model's vocabulary has {model.cfg.d_vocab} "
            "tokens: tokenise the text with the model's tokenizer"
        )
    block = model.blocks[-1]
    prefix = f"blocks.{model.cfg.n_layers - 1}."
    norm = getattr(block.mlp, "ln", None)
    has_norm = norm is not None
    names = {f"{prefix}mlp.hook_pre", f"{prefix}mlp.hook_post", f"{prefix}hook_resid_mid"}
    if has_norm:
        names |= {f"{prefix}mlp.hook_mid", f"{prefix}mlp.ln.hook_scale"}
    centres, eps = _declared(norm)
    readout, mlp = _readout(model, block), _mlp(block)
    width = stream.tokens.shape[1]
    step = (
        rows_at_once(width, model.cfg.d_vocab)
        if with_loss
        else max(1, NUMBERS_AT_ONCE // (width * mlp.W_in.shape[1]))
    )
    stop = {} if with_loss else {"stop_at_layer": model.cfg.n_layers}
    for start in range(0, len(stream.tokens), step):
        rows = slice(start, start + step)
        logits, cache = model.run_with_cache(
            stream.tokens[rows].to(model.cfg.device), names_filter=names.__contains__, **stop
        )
        post = cache[f"{prefix}mlp.hook_post"]
        tokens, string, keep = (
            part[rows].to(post.device) for part in (stream.tokens, stream.string, stream.keep)
        )
        target = F.pad(tokens[:, 1:], (0, 1), value=-1)
        target = target.where(F.pad(keep[:, 1:], (0, 1)) & (target != stream.bos), -1)
        loss = _losses(logits, target) if with_loss else post.new_full(target.shape, torch.nan)
        part = {
            "tokens": tokens, "target": target, "string": string,
            "pos": torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape),
            "loss": loss.where(target >= 0, torch.nan),
            "pre": cache[f"{prefix}mlp.hook_pre"], "post": post,
            "mid": cache[f"{prefix}mlp.hook_mid"] if has_norm else post,
            "scale": cache[f"{prefix}mlp.ln.hook_scale"].squeeze(-1) if has_norm else post.new_ones(tokens.shape),
            "resid_mid": cache[f"{prefix}hook_resid_mid"],
        }  # fmt: skip
        kept = keep.flatten().nonzero().squeeze(-1)  # once: each use of a mask waits for the device
        yield HookedRun(
            stream=stream.name, eps=eps, centres=centres, readout=readout, mlp=mlp, vocab=stream.vocab,
            **{name: tensor.flatten(0, 1)[kept] for name, tensor in part.items()},
        )  # fmt: skip


def _losses(
    logits: Float[Tensor, "row pos d_vocab"], target: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos"]:
    """Return the cross-entropy of each target; 0 without a target."""
    return F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        target.flatten(),
        ignore_index=-1,
        reduction="none",
    ).view(target.shape)


def _at_least_fp32(model: Any) -> Any:
    """Return the model, or a copy in one dtype of fp32 or more if its weights or its activations are below it.

    Raises:
        UserError: if a TransformerBridge is below fp32.
    """
    dtypes = {parameter.dtype for _, parameter in model.named_parameters()}
    if isinstance(model, nn.Module):
        dtypes |= {cast(Any, model).cfg.dtype}  # of the activations; model.half() leaves it at fp32
    wanted = functools.reduce(torch.promote_types, dtypes, torch.float32)
    if dtypes == {wanted}:
        return model
    if not isinstance(model, nn.Module):
        names = ", ".join(sorted(map(str, dtypes)))
        raise UserError(f"the bridge's weights are {names}: build it from weights in torch.float32")
    return copy.deepcopy(cast(Any, model)).to(wanted, print_details=False)


def _declared(norm: Any) -> tuple[bool, float | None]:
    """Return whether a mid norm centres, and its epsilon: as the norm declares, or else from CENTRES."""
    if norm is None:
        return False, None
    ours = getattr(norm, "original_component", norm)  # 4.x wraps it
    if isinstance(ours, MidNorm):
        return ours.centres, ours.eps
    return CENTRES[type(norm).__name__], norm.eps


def rows_at_once(width: int, d_vocab: int) -> int:
    """Return how many rows of `width` tokens a model reads per forward pass."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (width * d_vocab)))


def _readout(model: Any, block: Any) -> Readout:
    mlp, final = block.mlp, model.ln_final
    norm = getattr(mlp, "ln", None)
    n, d = mlp.W_out.shape
    return Readout(
        W_out=_weight(mlp.W_out), b_out=_weight(mlp.b_out), gamma=_weight(getattr(norm, "w", None), n, 1.0, mlp),
        beta=_weight(getattr(norm, "b", None), n, 0.0, mlp), ln_w=_weight(getattr(final, "w", None), d, 1.0, mlp),
        ln_b=_weight(getattr(final, "b", None), d, 0.0, mlp), ln_eps=final.eps,
        ln_centred=CENTRES[type(final).__name__],
        W_U=_weight(model.unembed.W_U), b_U=_weight(model.unembed.b_U),
    )  # fmt: skip


def _weight(weight: Tensor | None, n: int = 0, otherwise: float = 0.0, like: Any = None) -> Tensor:
    """Return a weight, detached; a missing weight is `n` times the value `otherwise`.

    4.x stores transposes. Products with a transpose round differently, so the layout is made that of 3.9.
    """
    if weight is not None:
        return weight.detach().contiguous()
    return torch.full((n,), otherwise, dtype=like.W_out.dtype, device=like.W_out.device)


def _mlp(block: Any) -> Mlp:
    """Return a copy, which hooks added to the model later do not affect."""
    parts = copy.deepcopy(nn.ModuleList([block.ln2, block.mlp]))
    ln2, mlp = cast(Any, parts)
    norm: Any = getattr(mlp, "ln", None)

    def through(mid: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        watch = norm.hook_scale.register_forward_hook(lambda *args: seen.append(args[-1]))
        post = norm(mid)
        watch.remove()
        return seen[0].squeeze(-1).expand(mid.shape[:-1]), post

    return Mlp(
        ln2=ln2, W_in=_weight(mlp.W_in), b_in=_weight(mlp.b_in), nonlinearity=mlp.act_fn,
        norm=through if norm is not None else None, W_out=_weight(mlp.W_out), b_out=_weight(mlp.b_out),
    )  # fmt: skip


def check_model(model: Any) -> None:
    """Refuse a model that the probes cannot read, in one line."""
    if model.cfg.attn_only:
        raise UserError(
            "the model has no MLP, and the probes read MLP activations: choose another model"
        )
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
                f"the model's {name} holds values that are not finite: train or load the model again"
            )
