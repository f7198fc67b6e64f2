"""Pretrained models: from a hub on loopback over the real download path, from the cache, from a folder.

huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported, so models are loaded in separate
processes, which return their results. The hub runs in the test process, which switches its faults.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from _hub import Hub
from scipy.special import lambertw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens import HookedTransformer

from soluscope import plugins, probe
from soluscope.errors import UserError
from soluscope.files import name_problem
from soluscope.hooked.activations import check_model, planted
from soluscope.hooked.pretrained import load_pretrained
from soluscope.runs.weights import versions

SOLU_1L = Path(__file__).parents[2] / "shared" / "data" / "solu1l" / "activations.npz"
TOKENIZER_REPO = "NeelNanda/gpt-neox-tokenizer-digits"
TEXT = "Hello world! 1234 of <|BOS|> hello"
TOKENS = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(5))


# --- models in the family's layout ----------------------------------------------------------------


def tokenizer_files(n_tokens: int = 300) -> dict[str, bytes]:
    """Return a tokenizer's files like the family's: byte-level, single digits, special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|EOS|>", "<|BOS|>", "<|PAD|>"]
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_s*.py"))]
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    assert tokenizer.get_vocab_size() == n_tokens
    named = dict(zip(("eos_token", "bos_token", "pad_token"), special, strict=True))
    settings = named | {"tokenizer_class": "GPTNeoXTokenizerFast", "model_max_length": 1024}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(named).encode(),
    }


def config_of(**changes: object) -> dict[str, object]:
    """Return a config.json with the keys that the family's training wrote, for a small model."""
    return {
        "n_layers": 1, "d_model": 16, "d_mlp": 48, "d_head": 8, "n_heads": 2, "lr_hidden": 2e-3,
        "lr_vector": 1e-3, "batch_size_per_device": 32, "batches_per_step": 1, "seed": 387976,
        "normalization": "LN", "max_tokens": 22 * 10**9, "version": 22, "use_bfloat16_matmul": True,
        "n_ctx": 32, "d_vocab": 300, "tokenizer_name": TOKENIZER_REPO, "betas": [0.9, 0.99],
        "weight_decay": 0.05, "dataset_name": "c4+code", "act_fn": "solu_ln", "shortformer_pos": False,
        "attn_only": False, "ln_eps": 1e-5, "lr_schedule": "cosine_warmup", "neuron_scale": 1.0,
        "neuron_temp": 1.0, "max_steps": 20980, "n_params": 3145728,
    } | changes  # fmt: skip


def weights_of(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict as the family's training saved it: with masks, without an unembedding bias."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.4, about: float = 0.0) -> torch.Tensor:
        return about + scale * torch.randn(*shape, generator=generator)

    d, n, heads = config["d_model"], config["d_mlp"], (config["n_heads"], config["d_head"])
    weights = {
        "embed.W_E": random(config["d_vocab"], d), "pos_embed.W_pos": random(config["n_ctx"], d),
        "ln_final.w": random(d, about=1), "ln_final.b": random(d), "unembed.W_U": random(d, config["d_vocab"]),
    }  # fmt: skip
    if config.get("final_rms"):
        del weights["ln_final.b"]
    for block in (f"blocks.{layer}." for layer in range(config["n_layers"])):
        for name in "QKV":
            weights[f"{block}attn.W_{name}"] = random(heads[0], d, heads[1])
            weights[f"{block}attn.b_{name}"] = random(*heads)
        weights[f"{block}attn.W_O"] = random(heads[0], heads[1], d)
        weights[f"{block}attn.b_O"] = random(d)
        weights[f"{block}attn.mask"] = torch.ones(config["n_ctx"], config["n_ctx"]).tril().bool()
        weights[f"{block}attn.IGNORE"] = torch.tensor(-1e5)
        norms = {"ln1": d}
        if not config["attn_only"]:
            weights[f"{block}mlp.W_in"], weights[f"{block}mlp.b_in"] = random(d, n), random(n)
            weights[f"{block}mlp.W_out"], weights[f"{block}mlp.b_out"] = random(n, d), random(d)
            norms |= {"ln2": d} | ({"mlp.ln": n} if config["act_fn"] == "solu_ln" else {})
        for name, width in norms.items():
            weights[f"{block}{name}.w"] = random(width, about=1)
            weights[f"{block}{name}.b"] = random(width)
    return weights


def as_old(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights as `_old` models up to 6 layers were saved: other names, transposed matrices."""
    old = {}
    for name, tensor in weights.items():
        name = name.replace("ln_final", "norm").replace("ln1", "norm1").replace("ln2", "norm2")
        old[name] = tensor.transpose(-2, -1).contiguous() if "W_" in name else tensor
    return old


def as_pth(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def repository(config: dict, weights: dict, file: str = "model_final.pth") -> dict[str, bytes]:
    return {"config.json": json.dumps(config, indent=2).encode(), file: as_pth(weights)}


NEW = config_of()
OLD = {
    key: value for key, value in config_of(n_layers=2, d_vocab=301, final_rms=True).items()
    if key not in ("normalization", "use_bfloat16_matmul", "lr_hidden", "max_tokens", "max_steps")
} | {"normalization_type": "LN"}  # fmt: skip
GELU = config_of(n_layers=2, act_fn="gelu")
ATTENTION = config_of(n_layers=2, attn_only=True)
FAMILY = {  # alias: repository, config, weights, their layout
    "solu-1l": ("NeelNanda/SoLU_1L512W_C4_Code", NEW, weights_of(NEW), "new"),
    "solu-2l-old": ("NeelNanda/SoLU_2L_v10_old", OLD, weights_of(OLD, 1), "old"),
    "gelu-2l": ("NeelNanda/GELU_2L512W_C4_Code", GELU, weights_of(GELU, 2), "new"),
    "attn-only-2l": ("NeelNanda/Attn_Only_2L512W_C4_Code", ATTENTION, weights_of(ATTENTION, 3), "new"),
}  # fmt: skip


def reference(weights: dict, config: dict, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the family's forward pass in fp64, written out: tokens [row pos] to logits [row pos d_vocab]."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.b" in w:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.w"]
        return x + w.get(f"{name}.b", 0)

    later = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
    x = w["embed.W_E"][tokens] + w["pos_embed.W_pos"][: tokens.shape[1]]
    for block in (f"blocks.{layer}." for layer in range(config["n_layers"])):
        read = norm(x, block + "ln1")
        for head in range(config["n_heads"]):
            q, k, v = (
                read @ w[f"{block}attn.W_{n}"][head] + w[f"{block}attn.b_{n}"][head] for n in "QKV"
            )
            scores = (q @ k.transpose(1, 2) / config["d_head"] ** 0.5).masked_fill(later, -1e30)
            x = x + scores.softmax(-1) @ v @ w[f"{block}attn.W_O"][head]
        x = x + w[f"{block}attn.b_O"]
        if config["attn_only"]:
            continue
        pre = norm(x, block + "ln2") @ w[f"{block}mlp.W_in"] + w[f"{block}mlp.b_in"]
        if config["act_fn"] == "gelu":
            post = pre * (1 + torch.erf(pre / 2**0.5)) / 2
        else:
            post = norm(pre * pre.softmax(-1), block + "mlp.ln")
        x = x + post @ w[f"{block}mlp.W_out"] + w[f"{block}mlp.b_out"]
    return norm(x, "ln_final") @ w["unembed.W_U"]


# --- functions for the loading processes ----------------------------------------------------------


def load_there(name, revision=None, dtype="float32", patient=True):
    """Return the results of load_pretrained for `name`, or its error message."""
    waiting = contextlib.nullcontext() if patient else mock.patch("time.sleep")
    try:
        with waiting:
            model = load_pretrained(name, revision, dtype=getattr(torch, dtype))
    except UserError as error:
        return {"error": str(error)}
    with torch.no_grad():
        logits = model(TOKENS)
    return {
        "weights": {key: value.detach().numpy() for key, value in model.named_parameters()},
        "logits": logits.numpy(),
        "tokens": model.to_tokens(TEXT)[0].tolist(),
        "words": model.to_str_tokens(TEXT),
        "facts": asdict(model.facts),
        "hooks": sorted(model.hook_dict),
    }


def lens_there(name, **folding):
    """Return logits and tokens of the model that TransformerLens's own from_pretrained loads."""
    model = HookedTransformer.from_pretrained(name, device="cpu", **folding)
    with torch.no_grad():
        return {"logits": model(TOKENS).numpy(), "tokens": model.to_tokens(TEXT)[0].tolist()}


def probe_there(name):
    """Return P1's results for the model on a text, or the reason why it cannot be probed."""
    model = load_pretrained(name)
    try:
        check_model(model)
        table, _ = probe(model, ["def f(x):\n    return x", "one two three four"], ["engagement"])
    except UserError as error:
        return str(error)
    return table.pivot_table(index=["string", "pos"], columns="quantity", values="value")


def warm_up():
    return os.environ["HF_ENDPOINT"]


@contextlib.contextmanager
def loader(home: Path, endpoint: str, offline: bool = False):
    """Call functions of this file in a process with its hub at `endpoint` and its cache in `home`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        patch.setenv("HF_ENDPOINT", endpoint)
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(warm_up).result() == endpoint  # the environment is read here
            yield lambda function, *args, **options: pool.submit(
                function, *args, **options
            ).result()


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.put(TOKENIZER_REPO, tokenizer_files())
        for repo, config, weights, layout in FAMILY.values():
            file = "SoLU_2L_v10_final.pth" if layout == "old" else "model_final.pth"
            stored = as_old(weights) if layout == "old" else weights
            hub.put(
                repo, repository(config, stored, file) | {"model_init.pth": b"nobody asks for it"}
            )
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def there(hub, home):
    with loader(home, hub.url) as call:
        yield call


@pytest.fixture(scope="module")
def loaded(there):
    """Return each model of FAMILY, downloaded."""
    return {alias: there(load_there, alias) for alias in FAMILY}


@contextlib.contextmanager
def fault(hub, what, kind):
    hub.faults[what] = kind
    try:
        yield
    finally:
        hub.faults.pop(what, None)


def incomplete(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if "incomplete" in path.name]


# --- the download path ----------------------------------------------------------------------------


@pytest.mark.parametrize("alias", FAMILY)
def test_a_downloaded_model_has_the_weights_of_its_repository_bit_for_bit(alias, loaded):
    _, _, weights, _ = FAMILY[alias]
    found = dict(loaded[alias]["weights"])
    assert not found.pop("unembed.b_U").any()
    stored = {k: v.numpy() for k, v in weights.items() if not k.endswith(("mask", "IGNORE"))}
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("alias", FAMILY)
def test_a_downloaded_model_computes_the_familys_formulas(alias, there, loaded):
    _, config, weights, _ = FAMILY[alias]
    wanted = reference(weights, config, TOKENS).numpy()
    found = there(load_there, alias, dtype="float64")["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("alias", FAMILY)
def test_transformer_lens_loads_the_same_model_from_the_same_hub(alias, there, loaded):
    unfolded = {
        "fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False,
    }  # fmt: skip
    lens = there(lens_there, alias, **unfolded)
    np.testing.assert_array_equal(lens["logits"], loaded[alias]["logits"])
    assert lens["tokens"] == loaded[alias]["tokens"]


def test_transformer_lens_folded_gives_the_same_log_probabilities(there, loaded):
    lens = torch.from_numpy(there(lens_there, "solu-1l")["logits"])
    ours = torch.from_numpy(loaded["solu-1l"]["logits"])
    assert (lens - ours).abs().max() > 0.1  # it was folded
    torch.testing.assert_close(lens.log_softmax(-1), ours.log_softmax(-1), atol=1e-4, rtol=0)


def test_weights_that_nobody_needs_are_not_downloaded(hub, loaded):
    assert any(request.endswith("model_final.pth") for request in hub.requests)
    assert not any(request.endswith("model_init.pth") for request in hub.requests)


def test_text_becomes_tokens_with_one_bos_first_and_digits_one_by_one(loaded):
    words = loaded["solu-1l"]["words"]
    assert words[0] == "<|BOS|>"
    assert [word for word in words if word.isdigit()] == ["1", "2", "3", "4"]
    assert "".join(words) == "<|BOS|>" + TEXT


def test_facts_say_what_is_known_and_nothing_else(hub, loaded):
    new, old = loaded["solu-1l"]["facts"], loaded["solu-2l-old"]["facts"]
    wanted = {
        "run": "solu-1l", "arm": "solu-1l", "variant": "solu_ln", "study": "pretrained", "d_model": 16,
        "d_mlp": 48, "ctx": 32, "d_vocab": 300, "mid_norm": "LayerNorm", "eps": 1e-5, "gain": None,
        "eos": 297, "bos": 298, "pad": 299, "lr": 2e-3 * 256 / 16, "steps": 20980, "tokens": 22 * 10**9,
        "precision": "bf16", "device": "unknown", "versions": versions(),
        "commit": hub.branches["NeelNanda/SoLU_1L512W_C4_Code"]["main"],
    }  # fmt: skip
    assert {key: new[key] for key in wanted} == wanted
    known = {"lr": 0, "steps": 0, "tokens": 0, "precision": "unknown", "n_layers": 2}
    assert {key: old[key] for key in known} == known
    assert len({model["facts"]["config"] for model in loaded.values()}) == len(loaded)
    gelu = loaded["gelu-2l"]["facts"]
    assert (gelu["variant"], gelu["mid_norm"], gelu["eps"]) == ("gelu", None, None)


def test_the_model_is_unfolded_with_the_hooks_that_probes_read(loaded):
    hooks = loaded["solu-1l"]["hooks"]
    assert {"blocks.0.mlp.hook_mid", "blocks.0.mlp.ln.hook_scale"} <= set(hooks)
    assert "blocks.0.mlp.hook_mid" not in loaded["gelu-2l"]["hooks"]


def test_probes_run_on_it_and_an_attention_only_model_is_refused(there, loaded):
    table = there(probe_there, "solu-1l")
    assert len(table) > 10
    assert table["r"].between(0.001, 1).all()
    np.testing.assert_allclose(table["gain"] ** 2 * 1e-5, 1 - table["r"], rtol=1e-4)
    assert "no MLP" in there(probe_there, "attn-only-2l")


def test_each_revision_is_the_model_that_it_names(hub, there):
    repo = "someone/SoLU_with_history"
    first, second = (weights_of(NEW, seed) for seed in (11, 12))
    commits = [hub.put(repo, repository(NEW, first), branch="before")]
    commits.append(hub.put(repo, repository(NEW, second)))
    assert commits[0] != commits[1]
    for revision, weights in [
        (None, second), ("before", first), ("main", second), (commits[0], first), (commits[1], second),
    ]:  # fmt: skip
        found = there(load_there, repo, revision)
        np.testing.assert_array_equal(found["weights"]["embed.W_E"], weights["embed.W_E"].numpy())
        assert found["facts"]["commit"] == commits[weights is second]


def test_safetensors_and_a_tokenizer_of_the_repositorys_own_are_preferred(hub, there, loaded):
    weights = weights_of(NEW, 13)
    files = repository(NEW, weights_of(NEW, 14)) | tokenizer_files()
    files["model.safetensors"] = safetensors.torch.save(weights)
    hub.put("someone/SoLU_safe", files)
    found = there(load_there, "someone/SoLU_safe")
    np.testing.assert_array_equal(found["weights"]["embed.W_E"], weights["embed.W_E"].numpy())
    assert found["facts"]["tokenizer_hash"] == loaded["solu-1l"]["facts"]["tokenizer_hash"]


# --- without the network --------------------------------------------------------------------------


def test_offline_from_the_cache_it_is_the_same_model_and_nothing_is_asked(hub, home, loaded):
    with loader(home, hub.url, offline=True) as offline:
        asked = len(hub.requests)
        for alias, online in loaded.items():
            found = offline(load_there, alias)
            assert found["facts"] == online["facts"]
            for name, value in online["weights"].items():
                np.testing.assert_array_equal(found["weights"][name], value)
            np.testing.assert_array_equal(found["logits"], online["logits"])
        error = offline(load_there, "gelu-1l")["error"]
        assert len(hub.requests) == asked
    assert_one_line(error, "NeelNanda/GELU_1L512W_C4_Code", "HF_HUB_OFFLINE", "cache")


def test_a_hub_that_is_down_or_out_of_reach_is_answered_from_the_cache(hub, there, loaded):
    with fault(hub, "NeelNanda/SoLU_1L512W_C4_Code", 500):
        found = there(load_there, "solu-1l")
    assert found["facts"] == loaded["solu-1l"]["facts"]
    with hub.away():
        found = there(load_there, "solu-1l")
        error = there(load_there, "gelu-1l", patient=False)["error"]
    assert found["facts"] == loaded["solu-1l"]["facts"]
    assert_one_line(error, "cannot reach", hub.url, "NeelNanda/GELU_1L512W_C4_Code", "HF_ENDPOINT")


@pytest.mark.parametrize("alias", FAMILY)
def test_a_folder_with_the_files_is_the_same_model(alias, loaded, tmp_path):
    _, config, weights, layout = FAMILY[alias]
    files = repository(config, as_old(weights) if layout == "old" else weights) | tokenizer_files()
    model = load_pretrained(str(write(tmp_path / "copy", files)))
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach(), loaded[alias]["weights"][name])
    with torch.no_grad():
        np.testing.assert_array_equal(model(TOKENS), loaded[alias]["logits"])
    assert (model.facts.run, model.facts.study) == ("copy", "pretrained")
    assert model.to_tokens(TEXT)[0].tolist() == loaded[alias]["tokens"]


def test_every_norm_has_the_epsilon_of_the_repositorys_config(tmp_path):
    files = repository(config_of(ln_eps=1e-3), weights_of(NEW)) | tokenizer_files()
    model = load_pretrained(f"{write(tmp_path / 'copy', files)}/")
    norms = [model.blocks[0].ln1, model.blocks[0].ln2, model.blocks[0].mlp.ln, model.ln_final]
    assert [norm.eps for norm in norms] == [1e-3] * 4
    assert (model.facts.run, model.facts.eps, model.facts.ln_eps) == ("copy", 1e-3, 1e-3)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- faults and errors ----------------------------------------------------------------------------


def assert_one_line(error: str, *parts: str) -> None:
    assert "\n" not in error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("someone/{}", 404, ["someone/{}", "404", "check its name"]),
        ("someone/{}", 401, ["someone/{}", "401", "HF_TOKEN"]),
        ("someone/{}", 403, ["someone/{}", "403", "HF_TOKEN"]),
        ("someone/{}", 500, ["someone/{}", "500", "try again later"]),
        ("{}_final.pth", 404, ["someone/{}", "404", "{}_final.pth", "revision="]),
        ("{}_final.pth", 500, ["someone/{}", "500", "try again later"]),
        ("{}_final.pth", "cut", ["someone/{}", "broke off", "load it again"]),
        ("{}_final.pth", "short", ["someone/{}", "broke off", "load it again"]),
        ("{}_final.pth", "flipped", ["someone/{}", "checksum", "sha256", "deleted"]),
        ("config.json", "flipped", ["someone/{}", "checksum", "sha1", "deleted"]),
        ("config.json", "short", ["someone/{}", "checksum", "sha1", "deleted"]),
    ],
)
def test_a_fault_of_the_hub_is_one_line_and_leaves_nothing_behind(
    hub, home, there, what, kind, message
):
    name = f"SoLU_{what.strip('{}').split('/')[0].replace('.', '_')}_{kind}"
    hub.put(f"someone/{name}", repository(NEW, weights_of(NEW, 20), f"{name}_final.pth"))
    with fault(hub, what.format(name), kind):
        error = there(load_there, f"someone/{name}", patient=False)["error"]
    assert_one_line(error, *(part.format(name) for part in message))
    assert not incomplete(home)
    assert "error" not in there(load_there, f"someone/{name}")


def test_a_download_that_breaks_once_is_taken_up_again(hub, there):
    hub.put("someone/SoLU_once", repository(NEW, weights_of(NEW, 21), "once_final.pth"))
    with fault(hub, "once_final.pth", "cut once"):
        found = there(load_there, "someone/SoLU_once", patient=False)
    assert found["facts"]["run"] == "SoLU_once"


def test_a_repository_without_the_files_is_no_model(hub, there):
    hub.put("someone/else", {"README.md": b"a model of another family"})
    assert_one_line(there(load_there, "someone/else")["error"], "someone/else has no config.json")


def test_a_revision_that_is_not_there_is_named(there, loaded):
    error = there(load_there, "solu-1l", "no-such-branch")["error"]
    assert_one_line(error, "NeelNanda/SoLU_1L512W_C4_Code", "'no-such-branch'", "revision=")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'solu-1'.*Did you mean 'solu-1l'\?.*gelu-1l") as caught:
        load_pretrained("solu-1")
    assert_one_line(str(caught.value), "owner/name", "folder")
    for name in ("no/such/folder", "/no/folder", "./no-folder", "pythia-70m"):
        with pytest.raises(UserError, match="no pretrained model called"):
            load_pretrained(name)


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.raises(UserError, match="revision=main is for repositories on the hub"):
        load_pretrained(str(tmp_path), "main")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_unpickled(tmp_path, zipped):
    trace = tmp_path / "was here"
    state = weights_of(NEW) | {"blocks.0.extra": Malicious(f"'{trace}'")}
    content = as_pth(state) if zipped else pickle.dumps(state, protocol=2)
    pickle.loads(pickle.dumps(Malicious(f"'{trace}'")))
    assert trace.exists()  # unpickling would run the command
    trace.unlink()
    files = repository(NEW, {}) | {"model_final.pth": content} | tokenizer_files()
    with pytest.raises(UserError, match="nothing is unpickled here") as caught:
        load_pretrained(str(write(tmp_path / "m", files)))
    assert_one_line(str(caught.value), "model_final.pth", "plain dictionary of tensors")
    time.sleep(0.1)
    assert not trace.exists()


def without(config: dict, key: str) -> dict:
    return {k: v for k, v in config.items() if k != key}


GPT2 = {"architectures": ["GPT2LMHeadModel"], "n_layer": 12, "n_embd": 768}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{"}, "cannot read config.json of .*model: Expecting"),
        ({"config.json": b"[]"}, "holds list, wanted keys and values"),
        ({"config.json": json.dumps(GPT2).encode()},
         "layout of .* is not known: .* no n_layers, d_model.*; it has architectures, n_embd, n_layer"),
        ({"config.json": json.dumps(without(NEW, "d_mlp")).encode()}, "has no d_mlp"),
        ({"config.json": json.dumps(config_of(d_model="16")).encode()}, "d_model='16', wanted a count"),
        ({"config.json": json.dumps(config_of(act_fn="relu")).encode()},
         "act_fn='relu', wanted 'gelu' or 'solu' or 'solu_ln'"),
        ({"config.json": json.dumps(config_of(normalization="BN")).encode()}, "normalization='BN', wanted"),
        ({"config.json": json.dumps(config_of(architecture="mingpt")).encode()},
         "architecture='mingpt', wanted"),
        ({"config.json": json.dumps(config_of(neuron_temp=2.0)).encode()}, "neuron_temp=2.0, wanted 1"),
        ({"config.json": json.dumps(config_of(final_rms=True)).encode()},
         "does not fit its config.json: unexpected ln_final.b"),
        ({"config.json": json.dumps(config_of(d_mlp=64)).encode()},
         r"does not fit its config.json: .*W_in \(16, 48\) where the model has \(16, 64\)"),
        ({"model_final.pth": as_pth({"wte.weight": torch.ones(2)})},
         "layout of .* is not known: model_final.pth has wte.weight…, wanted embed.W_E"),
        ({"model_final.pth": as_pth(without(weights_of(NEW), "ln_final.w"))}, "no ln_final.w"),
        ({"model_final.pth": as_pth([torch.ones(2)])}, "is not a plain dictionary of tensors"),
        ({"model_final.pth": as_pth(weights_of(NEW))[:2000]}, "is broken or holds more than tensors"),
        ({"model.safetensors": b"\xff" * 100}, "model.safetensors of .* is broken or holds more"),
        ({"config.json": json.dumps(config_of(d_vocab=299)).encode()},
         "tokenizer of .* has 300 tokens and the embedding d_vocab=299 rows"),
        ({"config.json": json.dumps(config_of(d_vocab=428)).encode()},
         "tokenizer of .* has 300 tokens and the embedding d_vocab=428 rows"),
        ({"tokenizer.json": b"{"}, "cannot read tokenizer.json of"),
        ({"tokenizer_config.json": b'{"bos_token": "<s>"}'}, "has no token for bos"),
    ],
)  # fmt: skip
def test_files_that_are_not_the_familys_are_refused_with_what_was_found(tmp_path, files, message):
    whole = repository(NEW, weights_of(NEW)) | tokenizer_files()
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(str(write(tmp_path / "model", whole | files)))
    assert_one_line(str(caught.value))


# --- hostile repositories -------------------------------------------------------------------------

SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab")
WRONG = (
    True,
    "2",
    1.5,
    -1,
    None,
    [2],
    {"x": 2},
    10**9,
    10**12,
    10**400,
    float("nan"),
    float("inf"),
)
HOSTILE_CONFIGS = (
    [(key, value) for key in SIZES for value in WRONG]
    + [(key, 0) for key in SIZES]
    + [(key, value) for key in ("ln_eps", "lr", "lr_hidden", "max_steps", "max_tokens")
       for value in ("x", float("nan"), float("inf"), -1.0, 10**400, [1e-5], {"x": 1}, True)]
    + [("ln_eps", 0), ("ln_eps", None)]
    + [(key, value) for key in ("neuron_temp", "neuron_scale") for value in ("1", [1], 0, float("nan"))]
    + [(key, value) for key in ("attn_only", "final_rms", "shortformer_pos", "use_bfloat16_matmul")
       for value in ("false", 2, [], {"x": 1})]
    + [(key, value) for key in ("act_fn", "normalization", "architecture", "tokenizer_name")
       for value in (True, 5, [], {"x": 1})]
    + [("act_fn", None), ("act_fn", "soluscope:x"), ("act_fn", "a\nb"), ("normalization", "a\nb")]
)  # fmt: skip


def assert_refused(folder: Path, *parts: str) -> None:
    """Check that a model is refused in one line, at once, and without much memory."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_pretrained(str(folder))
    assert_one_line(str(caught.value), *parts)
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("key", "value"), HOSTILE_CONFIGS)
def test_a_hostile_value_in_config_json_is_refused_in_one_line(key, value, tmp_path):
    config = json.dumps(config_of(**{key: value})).encode()
    files = repository(NEW, weights_of(NEW)) | tokenizer_files() | {"config.json": config}
    assert_refused(write(tmp_path / "m", files), "m")


@pytest.mark.parametrize(
    "source", ["../../etc", "a\nb", "a/b/c", "", "\x1b]0;x", "/etc", "x" * 10_000, "a/" + "b" * 200]
)
def test_a_tokenizer_name_that_is_no_repository_is_refused_in_one_line(source, tmp_path):
    files = repository(config_of(tokenizer_name=source), weights_of(NEW))
    assert_refused(write(tmp_path / "m", files), "tokenizer_name=")


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"x":' * 100_000, b'{"n_layers": 1' + b"0" * 5000],
)  # fmt: skip
def test_a_config_json_that_is_no_object_is_refused_in_one_line(content, tmp_path):
    files = repository(NEW, weights_of(NEW)) | tokenizer_files() | {"config.json": content}
    assert_refused(write(tmp_path / "m", files), "config.json")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    whole = repository(NEW, weights_of(NEW)) | tokenizer_files()
    for name in whole:
        if name in ("tokenizer_config.json", "special_tokens_map.json"):
            continue
        folder = write(tmp_path / name, without(without(whole, name), "tokenizer_name"))
        os.mkfifo(folder / name)
        (folder / "config.json").exists()
        if name == "tokenizer.json":
            (folder / "config.json").write_text(json.dumps(without(NEW, "tokenizer_name")))
        assert_refused(folder, name if name != "model_final.pth" else "no weights")


def changed_tokenizer(**changes: object) -> bytes:
    return json.dumps(json.loads(tokenizer_files()["tokenizer.json"]) | changes).encode()


def split_at(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def words(vocabulary: dict[str, int], unknown: str = "a") -> dict[str, object]:
    return {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown}


TEMPLATE = {"type": "TemplateProcessing", "pair": []}
HOSTILE_TOKENIZERS = {
    "no object": b"[]",
    "deep": b"[" * 100_000,
    "empty": b"",
    "bytes": b"\xff\xfe",
    "a regular expression that is none": changed_tokenizer(pre_tokenizer=split_at("(")),
    "exponential": changed_tokenizer(pre_tokenizer=split_at("(A+)+$")),
    "exponential in digits": changed_tokenizer(pre_tokenizer=split_at("(x+x+)+y|(1|1)*2")),
    "recursive": changed_tokenizer(pre_tokenizer=split_at(r"(a|b|\g<1>)\1")),
    "a normalizer that panics": changed_tokenizer(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a length of 0": changed_tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a decoder that panics": changed_tokenizer(
        decoder={"type": "Strip", "content": "a", "start": 5, "stop": 7}
    ),
    "a template of nothing": changed_tokenizer(
        post_processor=TEMPLATE
        | {"single": [{"SpecialToken": {"id": "q", "type_id": 0}}], "special_tokens": {}}
    ),
    "an id beyond the embedding": changed_tokenizer(
        post_processor=TEMPLATE
        | {
            "single": [{"SpecialToken": {"id": "q", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"q": {"id": "q", "ids": [4_000_000_000], "tokens": ["q"]}},
        }
    ),
    "the largest id": changed_tokenizer(model=words({"a": 4_294_967_295})),
    "no tokens": changed_tokenizer(model=words({}), added_tokens=[]),
    "a prefix within a letter": changed_tokenizer(
        model={"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
               "continuing_subword_prefix": "\u00e9\u00e9"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_a_hostile_tokenizer_is_refused_in_one_line_and_says_nothing_else(name, tmp_path, capfd):
    files = repository(NEW, weights_of(NEW)) | tokenizer_files()
    folder = write(tmp_path / "m", files | {"tokenizer.json": HOSTILE_TOKENIZERS[name]})
    assert_refused(folder, "tokenizer")
    assert capfd.readouterr().err == ""


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_the_model(tmp_path):
    padding = {"strategy": {"Fixed": 4_000_000_000}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    files = repository(NEW, weights_of(NEW)) | tokenizer_files()
    plain = load_pretrained(str(write(tmp_path / "plain", files)))
    files |= {"tokenizer.json": changed_tokenizer(padding=padding, truncation=cut)}
    changed = load_pretrained(str(write(tmp_path / "changed", files)))
    assert torch.equal(changed.to_tokens(TEXT), plain.to_tokens(TEXT))


@pytest.mark.parametrize(
    "token", [{"x": 1}, {"content": 5}, ["<s>"], 5, True, "\ud800", "not there"]
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token"])
def test_a_special_token_without_a_text_is_refused_in_one_line(key, file, token, tmp_path):
    files = repository(NEW, weights_of(NEW)) | tokenizer_files()
    del files[
        {"tokenizer_config.json": "special_tokens_map.json"}.get(file, "tokenizer_config.json")
    ]
    content = json.loads(tokenizer_files()[file]) | {key: token}
    assert_refused(write(tmp_path / "m", files | {file: json.dumps(content).encode()}), "m")


@pytest.mark.parametrize("content", [b"[]", b"", b"5", b"\xff", b'{"x":' * 100_000])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_file_of_special_tokens_is_refused_in_one_line(file, content, tmp_path):
    files = repository(NEW, weights_of(NEW)) | tokenizer_files() | {file: content}
    assert_refused(write(tmp_path / "m", files), file)


def spoiled(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return weights_of(NEW) | {name: tensor}


def compressed(content: bytes) -> bytes:
    """Return an archive of torch with compressed parts."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    return out.getvalue()


HUGE = torch.zeros(1).expand(10**6, 10**6)
W_IN = "blocks.0.mlp.W_in"
HOSTILE_WEIGHTS = {
    "empty": b"",
    "nan": as_pth(spoiled(W_IN, torch.full((16, 48), torch.nan))),
    "inf": as_pth(spoiled("embed.W_E", torch.full((300, 16), torch.inf))),
    "whole numbers": as_pth(spoiled(W_IN, torch.ones(16, 48, dtype=torch.int64))),
    "complex": as_pth(spoiled(W_IN, torch.ones(16, 48, dtype=torch.complex64))),
    "sparse": as_pth(spoiled(W_IN, torch.ones(16, 48).to_sparse())),
    "truth values": as_pth(spoiled(W_IN, torch.ones(16, 48).bool())),
    "without values": as_pth(spoiled(W_IN, torch.ones(16, 48, device="meta"))),
    "huge": as_pth(spoiled(W_IN, HUGE)),
    "a number as name": as_pth({**weights_of(NEW), 5: torch.ones(2)}),
    "a text": as_pth({**weights_of(NEW), "x": "y"}),
    "more blocks": as_pth(spoiled("blocks.1.mlp.W_in", torch.ones(16, 48))),
    "a vector where the older layout has a matrix": as_pth(
        spoiled("norm.w", torch.ones(16)) | {W_IN: torch.ones(3)}
    ),
    "compressed": compressed(as_pth(weights_of(NEW))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused_in_one_line(name, tmp_path, capfd):
    files = repository(NEW, {}) | tokenizer_files() | {"model_final.pth": HOSTILE_WEIGHTS[name]}
    assert_refused(write(tmp_path / "m", files), "model_final.pth")
    assert capfd.readouterr().err == ""


def test_sizes_that_fit_each_other_but_not_the_file_are_refused_before_memory_is_asked_for(
    tmp_path,
):
    """Every shape is right, because the rows of each tensor share their memory: 4 TB in 12 kB."""
    config = config_of(d_model=10**6, d_head=10**6, n_heads=1)
    shapes = {
        name: t.shape for name, t in weights_of(config_of(d_model=1, d_head=1, n_heads=1)).items()
    }
    state = {
        name: torch.zeros(()).expand([10**6 if n == 1 else n for n in shape])
        for name, shape in shapes.items()
    }
    files = repository(config, state) | tokenizer_files()
    assert_refused(write(tmp_path / "m", files), "does not fit its config.json", "weights")


@pytest.mark.parametrize("name", ["my model (1)", 'x");import os#', "a\nb", "ü.1+2-3_4"])
def test_the_run_of_a_folder_has_a_name_that_a_folder_of_runs_may_have(name, tmp_path):
    files = repository(NEW, weights_of(NEW)) | tokenizer_files()
    run = load_pretrained(str(write(tmp_path / name, files))).facts.run
    assert name_problem(run) is None
    assert (run == name) is (name_problem(name) is None)


def test_what_is_not_there_is_named(tmp_path):
    whole = repository(NEW, weights_of(NEW)) | tokenizer_files()
    for key, message in {
        "config.json": "has no config.json",
        "model_final.pth": r"wanted model.safetensors or \*final.pth, there is config.json, special",
    }.items():
        with pytest.raises(UserError, match=message):
            load_pretrained(str(write(tmp_path / key, without(whole, key))))
    nameless = repository(without(NEW, "tokenizer_name"), weights_of(NEW))
    with pytest.raises(
        UserError, match=r"no tokenizer.json, and its config.json has no tokenizer_name"
    ):
        load_pretrained(str(write(tmp_path / "nameless", nameless)))


# --- the real model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solu_1l():
    if not SOLU_1L.is_file():
        pytest.skip("the pretrained SoLU-1L's activations are not beside this clone")
    return np.load(SOLU_1L)


def test_solu_1ls_norm_is_layer_norm_with_an_epsilon_of_1e_5(solu_1l):
    """As protocol.md section 1.2 states, post is linear in mid, and 1/g^2 - var is epsilon to all digits."""
    mid, post = (solu_1l[name].astype(np.float64) for name in ("hook_mid", "hook_normalized"))
    centred = mid - mid.mean(-1, keepdims=True)
    gain = (post * centred).sum(-1) / (centred**2).sum(-1)
    assert np.abs(post - gain[:, None] * centred).max() <= 2.4e-7
    eps = 1 / gain**2 - (centred**2).mean(-1)
    assert [f"{value:.4e}" for value in eps] == ["1.0000e-05"] * 15
    for a, n in zip(mid, post, strict=True):
        slope, intercept = np.polyfit(a, n, 1)
        assert -intercept / slope == pytest.approx(a.mean(), rel=1e-5)


TABLE = """
BOS .1320 .117 297.22 15.45 3253 .0103 3.51
After .0114 .0112 314.45 4.80 1840 .0021 1.35
Martin .0232 .0227 312.62 6.82 1901 .0029 1.70
and .0201 .0197 313.09 6.36 1690 .0039 1.89
Amy .0379 .0365 310.40 8.65 2097 .0048 2.30
went .0295 .0286 311.67 7.66 2048 .0040 2.11
to .0408 .0392 309.96 8.96 1839 .0060 2.41
the .0299 .0291 311.60 7.71 1655 .0048 2.08
park .0295 .0286 311.67 7.66 1849 .0049 2.19
, .0293 .0284 311.70 7.63 1641 .0039 1.87
Martin .0388 .0373 310.27 8.75 1828 .0040 1.99
gave .0218 .0213 312.84 6.61 1921 .0037 1.95
a .0468 .0447 309.07 9.57 2044 .0065 2.59
drink .0296 .0287 311.65 7.67 2017 .0030 1.80
to .0310 .0300 311.45 7.84 1767 .0040 1.97
"""


def test_section_1_2s_table_is_what_the_probes_find_in_solu_1l(solu_1l):
    """P1 needs only hook_mid. Z and the largest p and x come from Lambert's W, as in protocol.md section 1.5."""
    rows = [line.split() for line in TABLE.split("\n") if line]
    words = [word.strip() for word in solu_1l["tokens"]]
    assert [row[0] for row in rows] == [word.replace("<|BOS|>", "BOS") for word in words]
    var, r, gain, norm, z, p, x = np.array([row[1:] for row in rows], dtype=float).T
    mid = solu_1l["hook_mid"].astype(np.float64)
    run = planted(torch.from_numpy(mid)[None], eps=1e-5)
    found = plugins.pick("soluscope.probes", "engagement").measure(run).tokens
    assert found["r"][0] == pytest.approx(r[0], abs=5.1e-4)  # printed to three digits
    np.testing.assert_allclose(found["r"][1:], r[1:], atol=5.1e-5)
    np.testing.assert_allclose(found["gain"], gain, atol=0.0051)
    np.testing.assert_allclose(
        mid.var(-1) / 1e-5, var, atol=6e-5
    )  # the last, .03095, is printed .0310
    np.testing.assert_allclose(
        np.linalg.norm(solu_1l["hook_normalized"], axis=-1), norm, atol=0.0051
    )
    denominator = -1 / (np.e * mid.min(-1))
    largest = lambertw(mid.max(-1) * denominator).real
    np.testing.assert_allclose(denominator, z, atol=0.51)
    np.testing.assert_allclose(largest, x, atol=0.0051)
    np.testing.assert_allclose(np.exp(largest) / denominator, p, atol=5.1e-5)
    assert found["r"][1:].min() == pytest.approx(0.011, abs=5e-4)
    assert found["r"][1:].max() == pytest.approx(0.045, abs=5e-4)


@pytest.mark.online
def test_the_real_solu_1l_has_its_published_loss_and_the_gains_of_the_real_activations(request):
    if "online" not in request.config.option.markexpr:
        pytest.skip("downloads from the hub: run it with -m online")
    try:
        model = load_pretrained("solu-1l")
    except UserError as error:
        if "cannot reach" not in str(error) and "HF_HUB_OFFLINE" not in str(error):
            raise
        pytest.skip(f"offline: {error}")
    with torch.no_grad():
        loss = model("Hello world!", return_type="loss")
    assert loss.item() == pytest.approx(5.256411552429199, abs=1e-4)
    if not SOLU_1L.is_file():
        pytest.skip("the loss is right; the real activations are not beside this clone")
    stored = np.load(SOLU_1L)
    _, cache = model.run_with_cache("After Martin and Amy went to the park, Martin gave a drink to")
    assert [word.strip() for word in stored["tokens"]] == [
        word.strip()
        for word in model.to_str_tokens(
            "After Martin and Amy went to the park, Martin gave a drink to"
        )
    ]
    gain = cache["blocks.0.mlp.ln.hook_scale"][0, :, 0].reciprocal()
    wanted = 1 / np.sqrt(stored["hook_mid"].astype(np.float64).var(-1) + 1e-5)
    np.testing.assert_allclose(gain, wanted, rtol=1e-4)
