"""The constant gain of a static mid norm: a number, matched to a per-token norm at init, or from a run."""

from __future__ import annotations

from pathlib import Path

import torch

from soluscope.config import Config
from soluscope.data.cache import TokenCache, evenly_spaced
from soluscope.errors import UserError
from soluscope.model import Activations, LanguageModel
from soluscope.norms import FrozenBosLayerNorm, StaticNorm, gain_matching_rms
from soluscope.reading import for_seed
from soluscope.runs.folder import Run
from soluscope.training.batches import batch_rows

INIT_TOKENS = 8192
"""Approximate number of tokens on which a static gain is measured: the first training tokens for `mid.gain=init`,
tokens of the select split for the gain of a finished run."""

AT_BOS, CONTENT = slice(0, 1), slice(1, None)
"""Positions of BOS, and of all other tokens."""


def set_gain(model: LanguageModel, config: Config, cache: TokenCache) -> None:
    """Set the constant gain of each static mid norm, as `mid.gain` requests.

    The gain is a number, or matches a per-token norm's output rms at initialisation, or is the mean gain of a
    finished run. With `mid.gain=init`, a gain loaded from train.init_from is kept. If the norm has a constant for
    BOS, that constant is found in the same way from the activations at BOS.

    Source: protocol.md section 3, the rows with a constant gain.
    """
    for index in range(config.model.n_layers):
        norm = model.mlp(index).ln
        if not isinstance(norm, StaticNorm):
            continue
        if config.mid.gain == "init" and norm.gain.isfinite():
            continue
        norm.gain.fill_(_gain(model, index, CONTENT, config, cache))
        if isinstance(norm, FrozenBosLayerNorm):
            norm.bos_gain.fill_(_gain(model, index, AT_BOS, config, cache))


def _gain(
    model: LanguageModel, layer: int, places: slice, config: Config, cache: TokenCache
) -> float:
    """Return the gain that `mid.gain` requests for the tokens at some positions."""
    gain = config.mid.gain
    if not isinstance(gain, str):
        return float(gain)
    if gain != "init":
        return mean_gain(Path(for_seed(gain, config.seed)), layer, cache, places)
    norm = model.mlp(layer).ln
    assert isinstance(norm, StaticNorm)
    mid = first_rows(model, config, cache)[f"blocks.{layer}.mlp.hook_mid"]
    tokens = mid[:, places].flatten(0, 1)  # [token d_mlp]
    return gain_matching_rms(norm, tokens, config.mid.epsilon(config.model.d_mlp))


@torch.no_grad()
def first_rows(model: LanguageModel, config: Config, cache: TokenCache) -> Activations:
    """Return a model's activations on the first training tokens of its seed, by hook name."""
    rows = cache.rows("train", config.model.ctx)
    n_rows = max(1, INIT_TOKENS // config.model.ctx)
    first = batch_rows(config.seed, 0, n_rows, len(rows))
    record: Activations = {}
    model.residual(torch.from_numpy(rows[first]), record)
    return record


@torch.no_grad()
def mean_gain(run_dir: Path, layer: int, cache: TokenCache, places: slice = CONTENT) -> float:
    """Return exp(mean log gain) of a finished run's per-token mid norm on the select split.

    The mean is over the tokens at some positions, by default all but BOS. The report split is not used, because the
    gain must not be chosen on the data that it is evaluated on.

    Raises:
        UserError: if the run is not finished, has no per-token gain, or has a different tokenizer.
    """
    run = Run(run_dir)
    try:
        model, facts = run.load_model(), run.facts
    except UserError as error:
        raise UserError(f"mid.gain: {error}") from error
    norm = model.mlp(layer).ln
    if norm is None or norm.eps is None:
        raise UserError(
            f"mid.gain={run_dir} is a run of {facts.variant}, which has no per-token gain to average: "
            "name a run of a variant with a per-token norm"
        )
    if facts.tokenizer_hash != cache.meta["tokenizer_hash"]:
        raise UserError(
            f"mid.gain={run_dir} was trained with a different tokenizer: name a run with this run's tokenizer"
        )
    rows = cache.rows("select", facts.ctx)
    record: Activations = {}
    chosen = evenly_spaced(len(rows), INIT_TOKENS // facts.ctx)
    model.residual(torch.from_numpy(rows[chosen]), record)
    scale = record[f"blocks.{layer}.mlp.ln.hook_scale"][:, places]  # [row pos 1]
    return float(scale.double().log().mean().neg().exp())
