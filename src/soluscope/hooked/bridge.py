"""Probes on TransformerLens 4.x, which has TransformerBridge where 3.9 has HookedTransformer.

    model = bridge.load("runs/demo/solu_ln-s0")       # in an environment with 4.x: make test-tl4
    run = observe(model, stream)                      # and any probe on it

A bridge built by TransformerLens is read in the same way: `HookedBridge(boot_tl_legacy(...))`. Models are
unfolded, like the models of convert.py and for the same reasons. The project itself installs 3.9.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.errors import UserError
from soluscope.model import Activations, LanguageModel
from soluscope.norms import MidNorm
from soluscope.runs.folder import Run
from soluscope.runs.weights import Facts

try:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformer_lens.model_bridge.sources.native import NativeModel
    from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint
except ImportError as error:
    raise UserError(
        f"soluscope.hooked.bridge is for TransformerLens 4.x ({error}): with 3.9 use soluscope.load"
    ) from error

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest difference between the two models, as in convert.py."""


class MidNormBridge(NormalizationBridge):
    """A mid norm of soluscope with 4.x's hooks. 4.x's own norm would use the residual stream's epsilon."""

    property_aliases: dict[str, str] = {}  # noqa: RUF012  # w and b are the norm's own names

    def forward(self, hidden_states: Float[Tensor, "*place d_mlp"], **kwargs: Any) -> Tensor:
        norm: MidNorm = self.original_component
        centred = norm.centred(self.hook_in(hidden_states))
        scale = self.hook_scale(norm.denominator(centred))
        out: Tensor = self.hook_out(norm.affine(self.hook_normalized(centred / scale)))
        return out


class HookedBridge:
    """A TransformerBridge with the attributes of a HookedTransformer that `observe` reads.

    4.x has all of 3.9's names except two: hook_mid, which is the input of the mid norm, and act_fn.
    """

    facts: Facts

    def __init__(self, bridge: Any) -> None:
        self.bridge, self.cfg = bridge, bridge.cfg
        self.ln_final, self.unembed = bridge.ln_final, bridge.unembed
        self.named_parameters = bridge.named_parameters
        self.blocks = []
        for block in () if self.cfg.attn_only else bridge.blocks:
            block.mlp.act_fn = block.mlp.original_component.act
            ln2 = copy.copy(block.ln2)
            ln2._forward_pre_hooks = OrderedDict()  # the block's hooks fail once the block is gone
            self.blocks.append(SimpleNamespace(ln2=ln2, mlp=block.mlp))

    def run_with_cache(
        self, tokens: Int[Tensor, "batch pos"], names_filter: Callable[[str], bool]
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
        """Return the logits, and the activations with a 3.9 name that passes the filter."""
        names = {
            four: four.replace("mlp.ln.hook_in", "mlp.hook_mid") for four in self.bridge.hook_dict
        }
        wanted = {four: three for four, three in names.items() if names_filter(three)}
        logits, cache = self.bridge.run_with_cache(
            tokens, names_filter=wanted.__contains__, return_cache_object=False
        )
        return logits, {wanted[name]: tensor for name, tensor in cache.items()}


def load(run_dir: str | Path) -> HookedBridge:
    """Load the model of a finished run as a TransformerBridge, with its `facts`.

    Raises:
        UserError: if the run does not exist, is not finished or is broken, or if the two models disagree.
    """
    run = Run(Path(run_dir))
    trained, facts = run.load_model(), run.facts
    norms = [trained.mlp(layer).ln for layer in range(facts.n_layers)]
    nonlinearity, act_fn = trained.mlp(0).nonlinearity, facts.hooked_act_fn
    model = HookedBridge(to_bridge(trained.folded(), nonlinearity, act_fn, norms, facts.ln_eps))
    model.facts = facts
    check_agreement(trained, model)
    return model


def to_bridge(
    state: dict[str, Tensor],
    nonlinearity: Callable[[Tensor], Tensor],
    act_fn: str,
    norms: Sequence[MidNorm | None],
    ln_eps: float,
) -> Any:
    """Build a TransformerBridge from weights under HookedTransformer's names.

    Args:
        state: the weights; their shapes give all sizes.
        nonlinearity: function from pre to mid, the same in all layers.
        act_fn: TransformerLens's name of the nonlinearity.
        norms: each layer's mid norm, with its tensors; None for a layer without a mid norm.
        ln_eps: epsilon of ln1, ln2 and ln_final.

    Raises:
        UserError: if a tensor is missing or unexpected.
    """
    n_heads, d_model, d_head = state["blocks.0.attn.W_Q"].shape
    config = TransformerBridgeConfig(
        n_layers=len(norms), d_model=d_model, d_head=d_head, n_heads=n_heads,
        n_ctx=len(state["pos_embed.W_pos"]), d_vocab=len(state["embed.W_E"]),
        d_mlp=state["blocks.0.mlp.W_in"].shape[1], eps=ln_eps, normalization_type="LN",
        act_fn=act_fn, positional_embedding_type="standard",
    )  # fmt: skip
    native = NativeModel(config).to(state["unembed.W_U"].dtype)
    for block, norm in zip(native.layers, norms, strict=True):
        block.mlp.act, block.mlp.ln = nonlinearity, norm

    def hook_mid_norms(adapter: Any) -> None:
        if norms[0] is not None:
            parts = adapter.component_mapping["blocks"].submodules["mlp"].submodules
            parts["ln"] = MidNormBridge(name="ln", config=adapter.cfg)

    bridge = build_bridge_from_module(
        native, "TransformerLensNative", tl_config=config, post_adapter_hook=hook_mid_norms
    )
    others = {name: tensor for name, tensor in state.items() if ".mlp.ln." not in name}
    try:
        bridge.load_state_dict(convert_tl_checkpoint(others, config))
    except (RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"the weights do not fit TransformerBridge: {problem}") from error
    return bridge.eval()


@torch.no_grad()
def check_agreement(trained: LanguageModel, model: HookedBridge) -> float:
    """Compare every stage of the two models on random tokens after BOS, as convert.py does.

    Returns:
        The largest difference, as a share of the stage's largest value.

    Raises:
        UserError: if the difference is above the tolerance of the dtype.
    """
    facts = model.facts
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(facts.d_vocab, (4, facts.ctx), generator=generator)
    tokens[:, 0] = facts.bos
    record: Activations = {}
    wanted = {"logits": trained(tokens, record)} | record
    logits, cache = model.run_with_cache(tokens, record.__contains__)
    computed = {"logits": logits} | cache
    differences = {
        name: float((computed[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        for name, expected in wanted.items()
        if name in computed  # without a mid norm there is no hook_mid, because mid is post
    }
    where = max(differences, key=lambda name: differences[name])
    tolerance = TOLERANCE[trained.unembed.W_U.dtype]
    if not differences[where] <= tolerance:
        raise UserError(
            f"the bridge of {facts.run} disagrees with the trained model: {where} differs by "
            f"{differences[where]:.2g} of its largest value, wanted at most {tolerance:g}"
        )
    return differences[where]
