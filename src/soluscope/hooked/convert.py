"""Conversion of a run folder to a HookedTransformer: unfolded, strict, and refused if the two models disagree.

Nothing is folded, because folding changes hook_post and replaces a custom mid norm without warning
(protocol.md section 3.3). The check runs the trained model and the hooked one on the same tokens.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerFast

from soluscope.errors import UserError
from soluscope.model import Activations, LanguageModel
from soluscope.norms import MidNorm, check_norm
from soluscope.runs.folder import Run
from soluscope.runs.weights import Facts
from soluscope.variants import Variant

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest difference between the two models, relative to the largest value of the stage."""


class HookedMidNorm(MidNorm):
    """A mid norm with the hooks of TransformerLens's LayerNorm, in the same order.

    Each instance belongs to a subclass of this class and of the norm's own class, so it keeps the norm's
    declaration, tensors and formulas under their plain names.
    """

    hook_scale: HookPoint  # [batch pos 1], the denominator
    hook_normalized: HookPoint  # [batch pos d_mlp], before w and b

    @classmethod
    def of(cls, norm: MidNorm) -> HookedMidNorm:
        """Return a copy of `norm` with hooks."""
        hooked: Any = copy.deepcopy(norm)
        hooked.__class__ = type(cls.__name__, (cls, type(norm)), {})
        hooked.hook_scale, hooked.hook_normalized = HookPoint(), HookPoint()
        return cast(HookedMidNorm, hooked)

    def forward(self, mid: Float[Tensor, "batch pos d_mlp"]) -> Float[Tensor, "batch pos d_mlp"]:
        centred = self.centred(mid)
        scale = self.hook_scale(self.denominator(centred))
        return self.affine(self.hook_normalized(centred / scale))


class SoluscopeTransformer(HookedTransformer):
    """A HookedTransformer with the facts about its run or its published files."""

    facts: Facts


def load(run_dir: str | Path, device: str = "cpu") -> SoluscopeTransformer:
    """Load the model of a finished run as a HookedTransformer, with its tokenizer and its `facts`.

    Raises:
        UserError: if the run does not exist, is not finished or is broken, or if the two models disagree.
    """
    return load_run(Run(Path(run_dir)), device)


def load_run(run: Run, device: str = "cpu") -> SoluscopeTransformer:
    """Load the model of a `Run`, as `load` does from its folder."""
    hooked = to_hooked(run.load_model(), run.facts, run.variant, device)
    hooked.set_tokenizer(load_tokenizer(run.tokenizer, run.facts))
    return hooked


def to_hooked(
    trained: LanguageModel, facts: Facts, variant: Variant, device: str = "cpu"
) -> SoluscopeTransformer:
    """Convert `trained` to a HookedTransformer of the same dtype, and compare the two on random tokens.

    Raises:
        UserError: if logits, hook_mid, ln.hook_scale or hook_post differ (the message names the stage with
            the largest difference), or if a tensor is missing or unexpected.
    """
    dtype = trained.unembed.W_U.dtype
    hooked = SoluscopeTransformer(
        HookedTransformerConfig(
            n_layers=facts.n_layers, d_model=facts.d_model, n_ctx=facts.ctx,
            d_head=facts.d_model // facts.n_heads, n_heads=facts.n_heads, d_mlp=facts.d_mlp,
            d_vocab=facts.d_vocab, act_fn=facts.hooked_act_fn, normalization_type="LN",
            eps=facts.ln_eps, dtype=dtype, device=device, init_weights=False,
            default_prepend_bos=True, model_name=f"{facts.study}/{facts.run}",
        ),
        move_to_device=False,
    )  # fmt: skip
    for layer, block in enumerate(hooked.blocks):
        block.mlp.act_fn = variant.nonlinearity
        norm = trained.mlp(layer).ln
        if norm is not None:
            check_norm(norm, facts.d_mlp)
            if norm.is_layer_norm and hasattr(block.mlp, "ln"):
                block.mlp.ln.eps = norm.eps  # TransformerLens would use the residual stream's
            else:
                block.mlp.ln = HookedMidNorm.of(norm)
    state = trained.state_dict()
    buffers = {name for name, _ in hooked.named_buffers()} - state.keys()  # attention masks
    missing, unexpected = hooked.load_state_dict(state, strict=False)
    if unexpected or set(missing) - buffers:
        raise UserError(
            f"{facts.run} does not fit HookedTransformer: missing tensors {sorted(set(missing) - buffers)}, "
            f"unexpected tensors {unexpected}"
        )
    hooked.setup()  # names the hooks of the replaced norms
    hooked.facts = facts
    nn.Module.to(hooked, device).eval()  # HookedTransformer.to prints
    check_agreement(trained.to(device), hooked)
    return hooked


@torch.no_grad()
def check_agreement(trained: LanguageModel, hooked: SoluscopeTransformer) -> float:
    """Compare every stage of the two models on random tokens after BOS.

    Returns:
        The largest difference, relative to the largest value of its stage.

    Raises:
        UserError: if the difference is above the tolerance of the dtype.
    """
    facts = hooked.facts
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(facts.d_vocab, (4, facts.ctx), generator=generator)
    tokens[:, 0] = facts.bos
    tokens = tokens.to(trained.unembed.W_U.device)
    record: Activations = {}
    wanted = {"logits": trained(tokens, record)} | record
    logits, cache = hooked.run_with_cache(tokens)
    worst, where = 0.0, "logits"
    for name, expected in wanted.items():
        if name.endswith("hook_mid") and trained.mlp(0).ln is None:
            continue  # TransformerLens has no hook_mid without a mid norm, because mid is post
        if name != "logits" and name not in cache:
            raise UserError(
                f"the converted {facts.run} has no {name}: check hooked_act_fn in its variant's file"
            )
        actual = logits if name == "logits" else cache[name]
        difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not difference <= worst:
            worst, where = difference, name
    if not worst <= TOLERANCE[trained.unembed.W_U.dtype]:
        raise UserError(
            f"the converted {facts.run} disagrees with the trained model: {where} differs by "
            f"{worst:.2g} of its largest value, wanted at most {TOLERANCE[trained.unembed.W_U.dtype]:g}"
        )
    return worst


def load_tokenizer(path: Path, facts: Facts) -> PreTrainedTokenizerFast:
    """Load the study's tokenizer, which puts BOS first as TransformerLens expects.

    Raises:
        UserError: if the file is missing, or is not the tokenizer that the model was trained with.
    """
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}: move the run folder back into its study's folder")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != facts.tokenizer_hash:
        raise UserError(
            f"{path} (sha256 {digest[:12]}…) is not the tokenizer that {facts.run} was trained with "
            f"({facts.tokenizer_hash[:12]}…): move the run folder back into its study's folder"
        )
    tokenizer = Tokenizer.from_buffer(content)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokenizer.id_to_token(facts.bos),
        eos_token=tokenizer.id_to_token(facts.eos),
        pad_token=tokenizer.id_to_token(facts.pad),
        name_or_path=str(path.parent),  # TransformerLens reads it
        add_bos_token=True,
    )
