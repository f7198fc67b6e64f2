"""What a probe sees: one layer's activations on one stream of text, token by token.

Models reach this module as HookedTransformers, wherever they come from; nothing here knows how they
were trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from soluscope.errors import UserError
from soluscope.streams import Stream

ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Readout:
    """Weights between the mid norm and the logits, as they stand in the model (nothing folded)."""

    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    beta: Float[Tensor, " d_mlp"]
    """Bias of the mid norm; zeros where there is none."""
    ln_w: Float[Tensor, " d_model"]
    ln_b: Float[Tensor, " d_model"]
    ln_eps: float
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]


@dataclass(frozen=True)
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
    readout: Readout

    @property
    def is_bos(self) -> Bool[Tensor, " token"]:
        return self.pos == 0

    @property
    def gain(self) -> Float[Tensor, " token"]:
        """What the mid norm multiplies a token's centred activations by: 1 / hook_scale."""
        return self.scale.reciprocal()

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
        fp64 activations. W_out is zero, so the MLP has no effect on a loss of ln 2 everywhere.
    """
    mid = mid.double()
    n_rows, width, d_mlp = mid.shape
    centred = mid - mid.mean(-1, keepdim=True)
    scale = torch.full_like(mid[..., 0], 1 / gain)
    if eps is not None:
        scale = (centred.square().mean(-1) + eps).sqrt()
    target = torch.ones(n_rows, width, dtype=torch.long)
    target[:, -1] = -1
    loss = torch.full((n_rows, width), math.log(2), dtype=torch.float64)
    zeros = mid.new_zeros
    return HookedRun(
        stream="planted", tokens=torch.zeros_like(target).flatten(), target=target.flatten(),
        pos=torch.arange(width).expand(n_rows, width).flatten(),
        string=torch.arange(n_rows)[:, None].expand(n_rows, width).flatten(),
        loss=loss.where(target >= 0, torch.nan).flatten(), pre=mid.flatten(0, 1),
        mid=mid.flatten(0, 1), post=(centred / scale[..., None]).flatten(0, 1),
        scale=scale.flatten(), resid_mid=zeros(n_rows * width, 2), eps=eps,
        readout=Readout(
            W_out=zeros(d_mlp, 2), b_out=zeros(2), beta=zeros(d_mlp), ln_w=zeros(2) + 1,
            ln_b=zeros(2), ln_eps=1e-5, W_U=zeros(2, 2), b_U=zeros(2),
        ),
    )  # fmt: skip


@torch.no_grad()
def observe(model: Any, stream: Stream) -> HookedRun:
    """Run a one-layer HookedTransformer over `stream` and keep what probes need, on the CPU.

    Raises:
        UserError: if the model has no MLP, more than one layer, or NaN weights (which are named).
    """
    check_model(model)
    block = model.blocks[-1]
    prefix = f"blocks.{model.cfg.n_layers - 1}."
    norm = getattr(block.mlp, "ln", None)
    has_norm = norm is not None
    names = {f"{prefix}mlp.hook_pre", f"{prefix}mlp.hook_post", f"{prefix}hook_resid_mid"}
    if has_norm:
        names |= {f"{prefix}mlp.hook_mid", f"{prefix}mlp.ln.hook_scale"}
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(stream.tokens), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        tokens, keep = stream.tokens[rows], stream.keep[rows]
        logits, cache = model.run_with_cache(
            tokens.to(model.cfg.device), names_filter=names.__contains__
        )
        target = F.pad(tokens[:, 1:], (0, 1), value=-1)
        target = target.where(F.pad(keep[:, 1:], (0, 1)) & (target != stream.bos), -1)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(),
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
            "scale": cache[f"{prefix}mlp.ln.hook_scale"].squeeze(-1) if has_norm else torch.ones(tokens.shape),
            "resid_mid": cache[f"{prefix}hook_resid_mid"],
        }  # fmt: skip
        parts.append({name: tensor.cpu()[keep] for name, tensor in part.items()})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return HookedRun(
        stream=stream.name, eps=getattr(norm, "eps", None),
        readout=_readout(model, block), **joined,
    )  # fmt: skip


def _readout(model: Any, block: Any) -> Readout:
    beta = getattr(getattr(block.mlp, "ln", None), "b", None)
    return Readout(
        W_out=block.mlp.W_out.detach().cpu(), b_out=block.mlp.b_out.detach().cpu(),
        beta=block.mlp.W_out.new_zeros(model.cfg.d_mlp).cpu() if beta is None else beta.detach().cpu(),
        ln_w=model.ln_final.w.detach().cpu(), ln_b=model.ln_final.b.detach().cpu(),
        ln_eps=model.ln_final.eps,
        W_U=model.unembed.W_U.detach().cpu(), b_U=model.unembed.b_U.detach().cpu(),
    )  # fmt: skip


def check_model(model: Any) -> None:
    """Refuse what the probes cannot read, in one line."""
    if model.cfg.attn_only:
        raise UserError("the model has no MLP: the probes are about what stands in its middle")
    if model.cfg.n_layers != 1:
        raise UserError(
            f"the model has {model.cfg.n_layers} layers: these probes are exact for one layer only"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"the model's {name} holds values that are not finite: train or load it again"
            )
