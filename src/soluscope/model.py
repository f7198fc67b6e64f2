"""The language model that is trained: one code path for all variants.

Parameters have TransformerLens's names and shapes, so that conversion only loads them. Attention and
LayerNorm use PyTorch's fused kernels, which make a step faster than with HookedTransformer.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soluscope.config import CONSTANT, ModelConfig
from soluscope.constant_norm import EPS, ConstantNorm, constant_norms, with_constants
from soluscope.norms import LayerNorm, MidNorm
from soluscope.variants import Variant

if TYPE_CHECKING:  # training does not require jaxtyping
    from collections.abc import Callable

    from jaxtyping import Float, Int

    Resid = Float[Tensor, "batch pos d_model"]

Activations = dict[str, Tensor]
"""Stages by TransformerLens's hook names; a forward pass fills the dictionary that it receives."""

CHUNK_LOGITS_ABOVE = 2**28
"""Number of logits (1 GB in fp32) above which the loss is computed in chunks, if torch supports it."""


class Embed(nn.Module):
    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(d_vocab, d_model))


class PosEmbed(nn.Module):
    def __init__(self, ctx: int, d_model: int) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.empty(ctx, d_model))


class Unembed(nn.Module):
    def __init__(self, d_model: int, d_vocab: int) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(d_model, d_vocab))
        self.b_U = nn.Parameter(torch.zeros(d_vocab))


class Attention(nn.Module):
    """Causal multi-head attention with scores divided by sqrt(d_head)."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        d_head = d_model // n_heads
        self.W_Q, self.W_K, self.W_V = (
            nn.Parameter(torch.empty(n_heads, d_model, d_head)) for _ in range(3)
        )
        self.b_Q, self.b_K, self.b_V = (
            nn.Parameter(torch.zeros(n_heads, d_head)) for _ in range(3)
        )
        self.W_O = nn.Parameter(torch.empty(n_heads, d_head, d_model))
        self.b_O = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Resid) -> Resid:
        weight = torch.stack([self.W_Q, self.W_K, self.W_V])  # [qkv head d_model d_head]
        bias = torch.stack([self.b_Q, self.b_K, self.b_V])  # [qkv head d_head]
        n_heads, _, d_head = self.W_Q.shape
        joint = F.linear(x, weight.transpose(-1, -2).flatten(0, 2), bias.flatten())
        q, k, v = joint.unflatten(-1, (3, n_heads, d_head)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [batch head pos d_head]
        return z.transpose(1, 2).flatten(2) @ self.W_O.flatten(0, 1) + self.b_O


class MLP(nn.Module):
    """MLP with the stages pre -> mid -> post, which the variant defines."""

    def __init__(self, config: ModelConfig, variant: Variant, params: Any) -> None:
        super().__init__()
        d_model, d_mlp = config.d_model, config.d_mlp
        self.nonlinearity = variant.activation(d_mlp, params)
        self.out_scale: float | Tensor
        if isinstance(
            config.mlp_out_scale, str
        ):  # measured before the first step, and kept with the weights
            self.register_buffer("out_scale", torch.tensor(math.nan))
        else:
            self.out_scale = config.mlp_out_scale
        self.W_in = nn.Parameter(torch.empty(d_model, d_mlp))
        self.b_in = nn.Parameter(torch.zeros(d_mlp))
        self.W_out = nn.Parameter(torch.empty(d_mlp, d_model))
        self.b_out = nn.Parameter(torch.zeros(d_model))
        self.ln: MidNorm | None = variant.build_norm(d_mlp, params) if variant.build_norm else None

    def forward(self, x: Resid, record: Activations | None = None, prefix: str = "") -> Resid:
        pre = x @ self.W_in + self.b_in  # [batch pos d_mlp]
        # SoLU's activations are about 1/d_mlp with a variance of 1e-7, which bf16 cannot resolve.
        pre = pre.to(torch.promote_types(pre.dtype, torch.float32))
        mid = self.nonlinearity(pre)
        post = mid if self.ln is None else self.ln(mid)
        if record is not None:
            record |= {
                f"{prefix}hook_pre": pre,
                f"{prefix}hook_mid": mid,
                f"{prefix}hook_post": post,
            }
            if self.ln is not None:
                record[f"{prefix}ln.hook_scale"] = self.ln.denominator(self.ln.centred(mid))
        return post @ self.scaled_W_out() + self.b_out

    def scaled_W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Return alpha W_out, which a converted model has as its W_out."""
        is_one = isinstance(self.out_scale, float) and self.out_scale == 1
        return self.W_out if is_one else self.out_scale * self.W_out


class Block(nn.Module):
    def __init__(self, config: ModelConfig, variant: Variant, params: Any) -> None:
        super().__init__()
        self.ln1: MidNorm = LayerNorm(config.d_model, config.ln_eps)
        self.attn = Attention(config.d_model, config.n_heads)
        self.ln2: MidNorm = LayerNorm(config.d_model, config.ln_eps)
        self.mlp = MLP(config, variant, params)

    def forward(self, x: Resid, record: Activations | None = None, prefix: str = "") -> Resid:
        x = x + self.attn(self.ln1(x))
        out: Tensor = self.mlp(self.ln2(x), record, f"{prefix}mlp.")
        if record is not None:
            record |= {f"{prefix}hook_resid_mid": x, f"{prefix}hook_mlp_out": out}
        return x + out


class LanguageModel(nn.Module):
    """Embedding, learned positions, blocks, final LayerNorm, untied unembedding."""

    def __init__(
        self, config: ModelConfig, variant: Variant, params: Any, d_vocab: int, seed: int
    ) -> None:
        super().__init__()
        self.embed = Embed(d_vocab, config.d_model)
        self.pos_embed = PosEmbed(config.ctx, config.d_model)
        self.blocks = nn.ModuleList(Block(config, variant, params) for _ in range(config.n_layers))
        self.ln_final: MidNorm = LayerNorm(config.d_model, config.ln_eps)
        self.unembed = Unembed(config.d_model, d_vocab)
        self.on_tokens: Callable[[Tensor], None] | None = None
        """Function that receives the tokens of each pass; set by training that removes norms."""
        if config.norms == CONSTANT:
            self._make_constant(config)
        initialise(self, config.init_std, seed)

    def _make_constant(self, config: ModelConfig) -> None:
        """Replace every norm with a per-token scale by one that can divide by a constant."""
        for block in cast(list[Block], [*self.blocks]):
            block.ln1, block.ln2 = (
                with_constants(norm, config.d_model) for norm in (block.ln1, block.ln2)
            )
            if block.mlp.ln is not None:
                block.mlp.ln = with_constants(block.mlp.ln, config.d_mlp)
        self.ln_final = with_constants(self.ln_final, config.d_model)

    def mlp(self, layer: int) -> MLP:
        """Return the MLP of a block."""
        return cast(Block, self.blocks[layer]).mlp

    def folded(self) -> dict[str, Tensor]:
        """Return the weights of a model that has no alpha, and whose LayerNorms have an epsilon and no constant.

        alpha is folded into W_out. A constant of ln1, ln2 or ln_final is folded into the norm's weight; the epsilon
        is then `constant_norm.EPS`.
        """
        weights = {k: v for k, v in self.state_dict().items() if not k.endswith(".out_scale")}
        for layer in range(len(self.blocks)):
            weights[f"blocks.{layer}.mlp.W_out"] = self.mlp(layer).scaled_W_out()
        for name, norm in constant_norms(self).items():
            if not name.endswith(".mlp.ln"):
                for buffer, _ in norm.named_buffers():
                    del weights[f"{name}.{buffer}"]
                weights[f"{name}.w"] = norm.w * (math.sqrt(EPS) / norm.constant)
        return weights

    @property
    def is_constant(self) -> bool:
        """Return whether the model has no per-token scale, or loses it in training."""
        return isinstance(self.ln_final, ConstantNorm)

    def residual(
        self, tokens: Int[Tensor, "batch pos"], record: Activations | None = None
    ) -> Resid:
        """Return the residual stream after the final norm."""
        if self.on_tokens is not None:
            self.on_tokens(tokens)
        # Not W_E[tokens]: its gradient on several CPU threads depends on their order.
        x: Tensor = F.embedding(tokens, self.embed.W_E) + self.pos_embed.W_pos[: tokens.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, record, f"blocks.{index}.")
        return cast(Tensor, self.ln_final(x))

    def forward(
        self, tokens: Int[Tensor, "batch pos"], record: Activations | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return the logits, and store the stages in `record`, if given, under TransformerLens's hook names."""
        return self.residual(tokens, record) @ self.unembed.W_U + self.unembed.b_U

    def loss(
        self,
        tokens: Int[Tensor, "batch pos"],
        bos: int,
        reduction: str = "mean",
        record: Activations | None = None,
    ) -> Tensor:
        """Return the cross-entropy of the next tokens in nats per token, BOS targets left out.

        The stages are stored in `record`, if given, under TransformerLens's hook names.

        Returns:
            The mean over targets, or with `reduction="none"` one value per target [batch pos-1], 0 if the
            target is BOS.
        """
        targets = tokens[:, 1:]
        targets = targets.masked_fill(targets == bos, -100).flatten()
        hidden = self.residual(tokens, record)[:, :-1].flatten(
            0, 1
        )  # the last position has no target
        W_U, b_U = self.unembed.W_U.T, self.unembed.b_U
        # In bf16, torch 2.13's chunked loss is wrong by 0.2 nats; micro-batches save memory there instead.
        in_bf16 = torch.is_autocast_enabled(hidden.device.type)
        many = len(targets) * len(W_U) > CHUNK_LOGITS_ABOVE
        if many and not in_bf16 and hasattr(F, "linear_cross_entropy"):
            loss = F.linear_cross_entropy(
                hidden, W_U, targets, linear_bias=b_U, ignore_index=-100, reduction=reduction,
                options=nn.LinearCrossEntropyOptions(),
            )  # fmt: skip
        else:
            logits = F.linear(hidden, W_U, b_U)
            loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction)
        return loss.view(len(tokens), -1) if reduction == "none" else loss


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Draw all weights from N(0, std), W_pos from N(0, std / 2). The norms' weights stay 1, and biases stay 0.

    Each tensor has a separate generator, seeded by (seed, name). So a tensor that several variants share
    starts with the same values in all of them, as pairing requires.

    Source: protocol.md sections 3 and 3.2.
    """
    for name, parameter in model.named_parameters():
        if ".W_" not in name:
            continue
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
        scale = std / 2 if name.endswith("W_pos") else std
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
