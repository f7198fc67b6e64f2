"""Every probe gives the same numbers on TransformerLens 4.x's TransformerBridge as on 3.9's HookedTransformer.

`make test-tl4` runs these tests in an environment with 4.x. For the numbers of 3.9 they call the project's
own environment.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

if version("transformer-lens").startswith("3."):
    pytest.skip("needs TransformerLens 4.x: make test-tl4", allow_module_level=True)

import huggingface_hub
from measuring import CONTROLS, PROBES, VARIANTS, of_planted, of_run
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from soluscope import plugins
from soluscope.config import load_config
from soluscope.data import streams
from soluscope.errors import UserError
from soluscope.hooked import bridge
from soluscope.hooked.activations import observe
from soluscope.norms import LayerNorm
from soluscope.runs.folder import Run
from soluscope.runs.weights import build_model

ROOT = Path(__file__).parents[2]
WITH_3_9 = ROOT / ".venv" / "bin" / "python"
TOLERANCE = 1e-6


def run_with_3_9(*words):
    if not WITH_3_9.is_file():
        pytest.skip("the other side needs .venv with TransformerLens 3.9: make test-tl4 makes it")
    return subprocess.run(
        [WITH_3_9, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="session")
def reference():
    """Yield a folder with runs, controls and all their numbers, made with 3.9."""
    with TemporaryDirectory() as folder:
        done = run_with_3_9(Path(__file__).parent / "measuring.py", folder)
        assert done.returncode == 0, done.stderr
        yield Path(folder)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert {key.split(" | ")[0] for key in wanted} == {*PROBES, "observe"}
    for key, expected in wanted.items():
        size = np.abs(expected[np.isfinite(expected)]).max(initial=TOLERANCE)
        np.testing.assert_allclose(
            found[key], expected, rtol=TOLERANCE, atol=TOLERANCE * size, err_msg=key
        )


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_probe_gives_the_same_numbers_on_a_trained_model(reference, variant):
    run_dir = reference / "runs" / "tl4" / f"{variant}-s0"
    found = of_run(bridge.load(run_dir), run_dir)
    assert_same(found, dict(np.load(reference / f"{variant}.npz")))


@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
def test_every_probe_gives_the_same_numbers_on_a_planted_model(reference, control):
    planted = torch.load(reference / f"{control}.pt", weights_only=True)
    state = planted["state"]
    norm = LayerNorm(len(state["blocks.0.mlp.ln.w"]), planted["eps"]).double()
    norm.load_state_dict({name: state[f"blocks.0.mlp.ln.{name}"] for name in ("w", "b")})
    solu = plugins.pick("soluscope.variants", "solu").nonlinearity
    made = bridge.to_bridge(state, solu, "solu_ln", [norm], planted["ln_eps"])
    model = bridge.HookedBridge(made)
    rows = {kind: streams.Stream(**fields) for kind, fields in planted["streams"].items()}
    assert_same(of_planted(model, rows), dict(np.load(reference / f"{control}.npz")))


def test_with_3_9_the_bridge_says_what_to_use_instead():
    done = run_with_3_9("-c", "import soluscope.hooked.bridge")
    assert "is for TransformerLens 4.x" in done.stderr
    assert "with 3.9 use soluscope.load" in done.stderr


# --- the bridge alone -----------------------------------------------------------------------------

D_VOCAB, BOS, LN_EPS = 50, 0, 1e-5


def rough_model(variant, *words):
    """Return an untrained model in which no tensor has its initial value."""
    model = build_model(load_config([f"variant={variant}", "size=tiny", *words]), D_VOCAB)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    for buffer in model.mlp(0).ln.buffers() if model.mlp(0).ln else ():
        buffer.fill_(20.0)
    return model.eval()


def bridged(model, variant):
    act_fn, mlp = plugins.pick("soluscope.variants", variant).hooked_act_fn, model.mlp(0)
    made = bridge.to_bridge(model.state_dict(), mlp.nonlinearity, act_fn, [mlp.ln], LN_EPS)
    return bridge.HookedBridge(made)


def some_stream():
    tokens = torch.randint(1, D_VOCAB, (3, 32), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = BOS
    string = torch.arange(3)[:, None].expand(tokens.shape)
    return streams.Stream("natural", tokens, string, torch.ones_like(tokens, dtype=torch.bool), BOS)


def assert_sees_what_was_trained(run, trained):
    record = {}
    logits = trained(some_stream().tokens, record)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), some_stream().tokens[:, 1:].flatten()
    )
    for stage in ("pre", "mid", "post"):
        expected = record[f"blocks.0.mlp.hook_{stage}"].flatten(0, 1)
        torch.testing.assert_close(getattr(run, stage), expected, rtol=1e-5, atol=1e-5)
    assert run.loss.nanmean().item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_probe_sees_what_the_training_model_computes(variant):
    trained = rough_model(variant)
    run = observe(bridged(trained, variant), some_stream())
    assert_sees_what_was_trained(run, trained)
    stages = run.mlp(run.resid_mid, run.is_bos)
    torch.testing.assert_close(stages.post, run.post, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if plugins.pick("soluscope.variants", v).build_norm]
)
def test_patching_the_scale_of_a_mid_norm_of_ours_reaches_the_logits(variant):
    made = bridged(rough_model(variant), variant).bridge
    tokens = some_stream().tokens
    _, cache = made.run_with_cache(tokens)
    order = [f"blocks.0.mlp.ln.hook_{name}" for name in ("in", "scale", "normalized", "out")]
    assert [name for name in cache if name in order] == order
    hooks = [("blocks.0.mlp.ln.hook_scale", lambda scale, hook: scale * 2)]
    assert (made.run_with_hooks(tokens, fwd_hooks=hooks) - made(tokens)).abs().max() > 1e-3


def test_a_bridge_that_transformer_lens_made_is_read_the_same_way(tmp_path, monkeypatch):
    """The family is loaded with `boot_tl_legacy`; the hub's two answers come from a folder."""
    d_mlp = 128
    trained = rough_model(
        "solu_ln", f"mid.kappa={LN_EPS * d_mlp**2}"
    )  # 4.x uses one epsilon for all norms
    state = trained.state_dict()
    n_heads, d_model, d_head = state["blocks.0.attn.W_Q"].shape
    assert state["blocks.0.mlp.b_in"].shape == (d_mlp,)
    torch.save(state, tmp_path / "model_final.pth")
    sizes = {
        "n_layers": 1, "d_model": d_model, "d_head": d_head, "n_heads": n_heads, "d_mlp": d_mlp,
        "n_ctx": len(state["pos_embed.W_pos"]), "d_vocab": D_VOCAB, "act_fn": "solu_ln",
        "attn_only": False, "normalization": "LN",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: tmp_path / name)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, repo: ["model_final.pth"]
    )
    model = bridge.HookedBridge(TransformerBridge.boot_tl_legacy("NeelNanda/planted").eval())
    run = observe(model, some_stream())
    assert run.eps == LN_EPS
    assert_sees_what_was_trained(run, trained)


def test_a_bridge_with_another_epsilon_in_its_mid_norm_is_refused(reference):
    run_dir = reference / "runs" / "tl4" / "solu_ln-s0"
    model = bridge.load(run_dir)
    trained = Run(run_dir).load_model()
    assert bridge.check_agreement(trained, model) < 1e-5
    model.blocks[0].mlp.ln.original_component.eps *= 2
    with pytest.raises(UserError, match=r"disagrees with the trained model: \S+ differs by \d"):
        bridge.check_agreement(trained, model)


@pytest.mark.parametrize("change", [lambda s: s.pop("unembed.b_U"),
                                    lambda s: s.update(surplus=torch.zeros(1))])  # fmt: skip
def test_a_tensor_without_a_place_and_a_place_without_a_tensor_are_refused(change):
    state = rough_model("solu").state_dict()
    change(state)
    with pytest.raises(UserError, match=r"do not fit TransformerBridge: .*(head\S+bias|surplus)"):
        bridge.to_bridge(state, torch.relu, "relu", [None], LN_EPS)


@pytest.mark.parametrize(
    ("words", "why"), [({"attn_only": True}, "the model has no MLP"),
                       ({"normalization_type": None}, "final norm is")]
)  # fmt: skip
def test_a_bridge_that_the_probes_cannot_read_is_refused(words, why):
    config = TransformerBridgeConfig(
        n_layers=1, d_model=16, d_head=8, n_heads=2, n_ctx=32, d_vocab=D_VOCAB, d_mlp=32,
        act_fn="gelu", positional_embedding_type="standard", **words,
    )  # fmt: skip
    with pytest.raises(UserError, match=why):
        observe(bridge.HookedBridge(TransformerBridge.boot_native(config)), some_stream())


def test_nothing_of_3_9_is_needed():
    assert "transformer_lens.components" not in sys.modules
    assert version("transformer-lens").startswith("4.")
