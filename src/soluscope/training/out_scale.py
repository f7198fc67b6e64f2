"""The constant alpha on the MLP's output, where it is matched to the baseline before the first step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from soluscope import plugins
from soluscope.config import Config
from soluscope.data.cache import TokenCache
from soluscope.model import LanguageModel
from soluscope.runs.weights import build_model
from soluscope.training.static_gain import first_rows


@torch.no_grad()
def set_out_scale(model: LanguageModel, config: Config, cache: TokenCache) -> None:
    """Set alpha of each block, with `model.mlp_out_scale=baseline`: the MLP's share starts as in the baseline.

    The share is the median over tokens of |mlp_out| / |resid_mid| on the first training tokens, BOS left out. The
    baseline has the same seed, and so the same tokens and the same values of all weights that both have. Biases are
    0 at the start, so the share is proportional to alpha. An alpha loaded from train.init_from is kept.

    Source: protocol.md section 4.
    """
    scales = [model.mlp(layer).out_scale for layer in range(config.model.n_layers)]
    matched = [scale for scale in scales if isinstance(scale, Tensor)]
    if not matched or all(scale.isfinite() for scale in matched):
        return
    for scale in matched:
        scale.fill_(1.0)
    name = _baseline()
    same_size = replace(config.model, mlp_out_scale=1.0)
    params = plugins.pick("soluscope.variants", name).params()
    baseline = build_model(
        replace(config, variant=name, mid=params, model=same_size), cache.meta["d_vocab"]
    )
    for layer, scale in enumerate(matched):
        # Blocks in order: the residual stream of a block depends on the alpha of the blocks before it.
        ratio = _share(baseline, config, cache, layer) / _share(model, config, cache, layer)
        scale.fill_(float(f"{ratio:.6g}"))  # the same number whatever the number of threads


def _baseline() -> str:
    """Return the variant at the root of the baselines' chain."""
    names = plugins.names("soluscope.variants")
    variants = {name: plugins.pick("soluscope.variants", name) for name in names}
    return next(
        name for name, each in variants.items() if each.role == "baseline" and not each.after
    )


def _share(model: LanguageModel, config: Config, cache: TokenCache, layer: int) -> float:
    """Return the median over tokens of |mlp_out| / |resid_mid| in a block, BOS left out."""
    record = first_rows(model, config, cache)
    out, resid = (record[f"blocks.{layer}.hook_{name}"][:, 1:] for name in ("mlp_out", "resid_mid"))
    return float((out.norm(dim=-1) / resid.norm(dim=-1)).median())
