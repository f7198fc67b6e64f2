"""The scale of the MLP's output that is matched to the baseline before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, train_silently
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from soluscope import plugins
from soluscope.config import Config
from soluscope.data.cache import prepare
from soluscope.hooked.convert import load_run, load_untrained, to_hooked
from soluscope.runs.folder import Run
from soluscope.runs.weights import build_model
from soluscope.training.batches import batch_rows
from soluscope.training.module import TrainingModule
from soluscope.training.run import facts_of
from soluscope.training.static_gain import INIT_TOKENS

ALPHA = "model.mlp_out_scale=baseline"


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out_scale")


def hooked_at_start(config: Config) -> HookedTransformer:
    """Return a run's converted model before its first step."""
    cache = prepare(config)
    model = TrainingModule(config, cache).model
    return to_hooked(model, facts_of(config, cache, model))


def share(config: Config, layer: int = 0) -> float:
    """Return the median of |mlp_out| / |resid_mid| by TransformerLens's hooks, BOS left out."""
    rows = prepare(config).rows("train", config.model.ctx)
    first = batch_rows(config.seed, 0, max(1, INIT_TOKENS // config.model.ctx), len(rows))
    _, cache = hooked_at_start(config).run_with_cache(torch.from_numpy(rows[first]))
    out, resid = (cache[f"blocks.{layer}.hook_{name}"][:, 1:] for name in ("mlp_out", "resid_mid"))
    return float((out.norm(dim=-1) / resid.norm(dim=-1)).median())


@pytest.mark.parametrize("variant", plugins.names("soluscope.variants"))
def test_the_mlps_share_starts_as_in_plain_gelu(variant: str, runs_dir: Path) -> None:
    wanted = share(tiny_config(runs_dir, "variant=gelu"))
    assert share(tiny_config(runs_dir, f"variant={variant}", ALPHA)) == pytest.approx(
        wanted, rel=1e-4
    )


def test_every_block_is_matched(runs_dir: Path) -> None:
    two = ("model.n_layers=2",)
    for layer in (0, 1):
        wanted = share(tiny_config(runs_dir, "variant=gelu", *two), layer)
        found = share(tiny_config(runs_dir, "variant=solu", ALPHA, *two), layer)
        assert found == pytest.approx(wanted, rel=1e-3)


def test_alpha_is_kept_with_the_weights_and_in_the_facts(runs_dir: Path) -> None:
    config = tiny_config(runs_dir, "variant=solu_ln", ALPHA, "tag=matched")
    run = Run(train_silently(config))
    alpha = load_file(run.weights)["blocks.0.mlp.out_scale"].item()
    assert run.facts.mlp_out_scale == pytest.approx(alpha)
    assert alpha == pytest.approx(
        TrainingModule(config, prepare(config)).model.mlp(0).out_scale.item()
    )
    for hooked in (load_run(run, "cpu"), load_untrained(run, "cpu")):
        assert "out_scale" not in " ".join(hooked.state_dict())
    tokens = torch.randint(0, 200, (2, config.model.ctx))
    with torch.no_grad():
        torch.testing.assert_close(
            load_run(run, "cpu")(tokens), run.load_model()(tokens), rtol=1e-4, atol=1e-4
        )


def test_the_baseline_itself_has_alpha_1(runs_dir: Path) -> None:
    config = tiny_config(runs_dir, "variant=gelu", ALPHA)
    assert TrainingModule(config, prepare(config)).model.mlp(0).out_scale.item() == 1.0


def test_a_number_needs_no_place_in_the_weights(runs_dir: Path) -> None:
    config = tiny_config(runs_dir, "variant=solu", "model.mlp_out_scale=0.5")
    assert "blocks.0.mlp.out_scale" not in build_model(config, 300).state_dict()


def test_alpha_may_be_written_without_a_point(runs_dir: Path) -> None:
    """OmegaConf takes 2 for an integer, which a setting of type float | str refuses."""
    one, other = (
        tiny_config(runs_dir, "variant=solu", f"model.mlp_out_scale={text}")
        for text in ("2", "2.0")
    )
    assert one.model.mlp_out_scale == 2.0
    assert one.hash == other.hash
