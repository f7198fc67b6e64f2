"""Conversion of a run folder to a HookedTransformer: unfolded, strict, and refused if the two models disagree.

Nothing is folded, because TransformerLens's folding changes hook_post and replaces a custom mid norm without
warning (protocol.md section 3.3). `SoluscopeTransformer` folds on request and leaves the mid norm as it is. The
check runs the trained model and the hooked one on the same tokens.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerFast

from soluscope.constant_norm import EPS, gain_of
from soluscope.data.tokenizer import from_bytes
from soluscope.errors import UserError
from soluscope.model import Activations, LanguageModel
from soluscope.norms import MidNorm, check_norm
from soluscope.runs.folder import Run
from soluscope.runs.weights import Facts, initial_model

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest difference between the two models, relative to the largest value of the stage."""


class HookedMidNorm(MidNorm):
    """A mid norm with the hooks of TransformerLens's LayerNorm, in the same order.

    Each instance belongs to a subclass of this class and of the norm's own class, so it keeps the norm's
    declaration, tensors and formulas under their plain names.
    """

    hook_scale: (
        HookPoint  # the denominator: [batch pos 1], or [batch pos d_mlp] if one_scale is False
    )
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


@contextmanager
def _mid_norm_left_alone(cfg: HookedTransformerConfig) -> Iterator[None]:
    """Hide the mid norm from TransformerLens while it rewrites weights.

    TransformerLens decides by act_fn whether there is a mid norm, and folds it as a LayerNorm with the residual
    stream's epsilon.
    """
    act_fn, cfg.act_fn = cfg.act_fn, "relu"
    try:
        yield
    finally:
        cfg.act_fn = act_fn


def _checked(name: str) -> Callable[..., dict[str, Tensor]]:
    """Return HookedTransformer's method `name` from weights to rewritten weights, with a check of the result."""
    original = getattr(HookedTransformer, name)

    @functools.wraps(original)
    def rewrite(
        self: SoluscopeTransformer, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        before = self._copy_with(state_dict)
        with _mid_norm_left_alone(self.cfg):
            result: dict[str, Tensor] = original(self, dict(state_dict), *args, **kwargs)
        _check_same_function(before, self._copy_with(result), name)
        return result

    return rewrite


class SoluscopeTransformer(HookedTransformer):
    """A HookedTransformer with the facts about its run or its published files.

    The methods that rewrite weights keep every log-probability, or refuse. They leave the mid norm as it is, so
    the MLP's activations do not change either.
    """

    facts: Facts
    run_dir: Path | None = None
    """Folder of the run that the model was loaded from. None: the model does not belong to a study."""

    fold_layer_norm = _checked("fold_layer_norm")
    center_writing_weights = _checked("center_writing_weights")
    center_unembed = _checked("center_unembed")
    fold_value_biases = _checked("fold_value_biases")
    refactor_factored_attn_matrices = _checked("refactor_factored_attn_matrices")

    def load_and_process_state_dict(
        self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> None:
        """Load weights and process them as HookedTransformer does, but leave the mid norm as it is.

        Raises:
            UserError: if the weights do not fit the model, or if the processed model would compute other
                log-probabilities; the model is then unchanged.
        """

        def process(model: SoluscopeTransformer) -> SoluscopeTransformer:
            with _mid_norm_left_alone(model.cfg):
                super().load_and_process_state_dict(dict(state_dict), *args, **kwargs)
            return model

        before, after = self._copy_with(state_dict), process(self._copy_with(state_dict))
        _check_same_function(before, after, "the processing of weights")
        process(self)

    def get_residual(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        pos_offset: int,
        prepend_bos: bool | None = None,
        attention_mask: Int[Tensor, "batch offset_pos"] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Add the positions, as HookedTransformer does. Every forward pass and each step of `generate` calls this.

        Raises:
            UserError: if there are more tokens than the model has positions.
        """
        n_tokens = pos_offset + embed.shape[1]
        if attention_mask is not None:  # `generate` passes all embeddings beside an offset
            n_tokens = attention_mask.shape[1]
        if n_tokens > self.cfg.n_ctx:
            raise UserError(
                f"the input has {n_tokens} tokens, and the model has ctx={self.cfg.n_ctx} positions, BOS "
                "included: shorten the prompt, or lower max_new_tokens"
            )
        self._mark_bos(n_tokens, pos_offset, attention_mask)
        return super().get_residual(embed, pos_offset, prepend_bos, attention_mask, *args, **kwargs)

    def _mark_bos(self, n_tokens: int, pos_offset: int, attention_mask: Tensor | None) -> None:
        """Mark BOS for the mid norms that have a constant for it, after padding or in a later part of a row."""
        is_bos = None
        if attention_mask is not None:
            is_bos = (attention_mask == 1) & (attention_mask.cumsum(-1) == 1)
        elif pos_offset:
            is_bos = torch.arange(n_tokens, device=self.unembed.W_U.device) == 0
        for norm in self.modules():
            if isinstance(norm, MidNorm) and norm.bos_apart:
                norm.is_bos = is_bos

    def init_weights(self) -> None:
        """Refuse to draw new matrices beside the norms and biases of a trained model."""
        raise UserError(
            "init_weights would draw new matrices and keep the trained norms and biases: use "
            "HookedTransformer(model.cfg) for an untrained model"
        )

    def _copy_with(self, state_dict: dict[str, Tensor]) -> SoluscopeTransformer:
        """Return a copy in fp64 on the CPU, without hooks, with other weights.

        Raises:
            UserError: if the model is below fp32, or a tensor is missing, unexpected or of another shape.
        """
        if self.unembed.W_U.dtype not in TOLERANCE:
            raise UserError(
                f"the model is in {self.unembed.W_U.dtype}, to which rewritten weights would be rounded: use "
                "model.to(torch.float32) first"
            )
        twin: SoluscopeTransformer = copy.deepcopy(self).to("cpu", print_details=False)
        twin = twin.to(torch.float64, print_details=False)
        twin.reset_hooks(including_permanent=True)
        buffers = {name for name, _ in self.named_buffers()}  # attention masks, static gains
        shapes = [
            {name: tuple(tensor.shape) for name, tensor in state.items() if name not in buffers}
            for state in (self.state_dict(), state_dict)
        ]
        differing = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
        if differing:
            name = differing[0]
            raise UserError(
                f"the weights do not fit the model: {name} is {shapes[1].get(name, 'missing')} where the model "
                f"has {shapes[0].get(name, 'none')}; load the model again to process its own weights"
            )
        twin.load_state_dict(state_dict, strict=False)
        return twin


def load(run_dir: str | Path, device: str = "cpu", step: int | None = None) -> SoluscopeTransformer:
    """Load the model of a finished run as a HookedTransformer, with its tokenizer and its `facts`.

    Args:
        run_dir: the run's folder.
        device: `cpu` or `cuda`.
        step: training step whose weights are loaded, one of the steps that train.snapshots kept; 0 is the model
            before training. None: the final weights.

    Raises:
        UserError: if the run does not exist, is not finished or is broken, if it has no weights of that step, or if
            the two models disagree.
    """
    return load_run(Run(Path(run_dir)), device, step)


def load_run(run: Run, device: str = "cpu", step: int | None = None) -> SoluscopeTransformer:
    """Load the model of a `Run`, as `load` does from its folder."""
    run.check_links()
    hooked = to_hooked(*_at_step(run, step), device)
    hooked.set_tokenizer(load_tokenizer(run.tokenizer, run.facts))
    hooked.run_dir = run.dir.absolute()  # a notebook may change its working directory
    return hooked


def _at_step(run: Run, step: int | None) -> tuple[LanguageModel, Facts]:
    """Return a run's model after a training step, and the facts about it.

    Raises:
        UserError: if there are no such weights. Step 0 of a run that began with another run's weights has none.
    """
    facts = run.facts
    if step is None or step == facts.steps:
        return run.load_model(), facts
    if step == 0 and run.config.init_dir is None:
        model = initial_model(run.config, run.load_model(), facts.d_vocab)
    else:
        model = run.load_model(step)
    tokens = step * facts.tokens // facts.steps
    return model, replace(facts, steps=step, tokens=tokens, gain=gain_of(model.mlp(0).ln))


def load_untrained(run: Run, device: str = "cpu") -> SoluscopeTransformer | None:
    """Load a run's own initialisation; None for a run that began with the weights of another."""
    if run.config.init_dir is not None:
        return None
    initial = initial_model(run.config, run.load_model(), run.facts.d_vocab)
    return to_hooked(initial, run.facts, device)


def to_hooked(trained: LanguageModel, facts: Facts, device: str = "cpu") -> SoluscopeTransformer:
    """Convert `trained` to a HookedTransformer of the same dtype, and compare the two on random tokens.

    Where ln1, ln2 and ln_final divide by a constant, TransformerLens's LayerNorm has an epsilon so large that its
    scale is one number, and its weight holds the constant.

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
            eps=EPS if trained.is_constant else facts.ln_eps, dtype=dtype, device=device, init_weights=False,
            default_prepend_bos=True, model_name=f"{facts.study}/{facts.run}",
        ),
        move_to_device=False,
    )  # fmt: skip
    for layer, block in enumerate(hooked.blocks):
        block.mlp.act_fn = trained.mlp(layer).nonlinearity
        norm = trained.mlp(layer).ln
        if norm is not None:
            check_norm(norm, facts.d_mlp)
            if norm.is_layer_norm and hasattr(block.mlp, "ln"):
                block.mlp.ln.eps = norm.eps  # TransformerLens would use the residual stream's
            else:
                block.mlp.ln = HookedMidNorm.of(norm)
    state = trained.folded()
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


@torch.no_grad()
def _check_same_function(
    before: SoluscopeTransformer, after: SoluscopeTransformer, method: str
) -> None:
    """Compare the log-probabilities of a model before and after its weights are rewritten.

    Raises:
        UserError: if one differs by more than the rounding of fp32, in which TransformerLens rewrites.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (4, min(64, before.cfg.n_ctx))  # few, because a vocabulary may be long
    tokens = torch.randint(before.cfg.d_vocab, shape, generator=generator)
    expected, actual = (model(tokens).log_softmax(-1) for model in (before, after))
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE[torch.float32] * float(expected.abs().max()):
        raise UserError(
            f"{method} would make another model of {before.facts.run}: log-probabilities would move by up to "
            f"{difference:.2g}; leave the weights as they are, or fold no norm (fold_ln=False)"
        )


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
    tokenizer = from_bytes(content, f"cannot read {path}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokenizer.id_to_token(facts.bos),
        eos_token=tokenizer.id_to_token(facts.eos),
        pad_token=tokenizer.id_to_token(facts.pad),
        name_or_path=str(path.parent),  # TransformerLens reads it
        add_bos_token=True,
    )
