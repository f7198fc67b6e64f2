"""SoLU-1L and related models as HookedTransformers, from the hub, its cache or a folder.

A repository of the family holds config.json, one file of weights under TransformerLens's names (the
`_old` models use older names) and, usually in a separate repository, a tokenizer. The files are read here
because TransformerLens's from_pretrained drops `revision`, contacts the hub for files that are cached, and
unpickles the weights (protocol.md section 3.3). Nothing is folded and nothing is unpickled.

Activation functions are TransformerLens's. `gelu` is the exact GELU, as in its from_pretrained, although
the published GELU models seem to have been trained with the tanh approximation.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neel_solu_old_weights
from transformer_lens.supported_models import MODEL_ALIASES
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from soluscope import plugins
from soluscope.data.tokenizer import n_rows
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.hooked.convert import SoluscopeTransformer, load_tokenizer
from soluscope.runs.weights import Facts, lineage, versions
from soluscope.variants import Variant

FAMILY = "NeelNanda/"
"""Owner of the repositories with this layout."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = ("model.safetensors", "*final.pth")
"""File patterns in order of preference."""
SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab")
NORMS = ("LN", "LNPre", "RMS", "RMSPre", None)
ATTN_ONLY = "attn_only"
"""Placeholder for the variant of a model without an MLP."""
MOST_SPARE_ROWS = 127
"""Largest number of embedding rows without a token: SoLU-1L-old has one, other models pad to 128."""


def load_pretrained(
    name: str,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SoluscopeTransformer:
    """Load a pretrained model of the SoLU family as a HookedTransformer, with its tokenizer and `facts`.

    Args:
        name: an alias in TransformerLens (`solu-1l`), a repository on the hub (`owner/name`) or a folder
            with the files of a repository.
        revision: branch, tag or commit of the repository; its main branch by default.
        device: device of the model.
        dtype: dtype of the model; weights are rounded to it.

    Returns:
        The model, unfolded. Its files stay in the hub's cache. A later load uses the network only to look
        up the commit of a branch; HF_HUB_OFFLINE=1 prevents that too.

    Raises:
        UserError: if there is no such model or revision, if files cannot be downloaded, are damaged or
            hold more than tensors, if the layout is unknown, or if the tokenizer does not fit the embedding.
    """
    repo = repository_of(name)
    if repo is None and revision is not None:
        raise UserError(
            f"revision={revision} is for repositories on the hub, and {name} is a folder: omit revision="
        )
    folder = Path(name) if repo is None else _fetch(repo, revision, ("config.json", *TOKENIZER))
    config = _read_config(folder, name)
    hooked_config = _hooked_config(config, name, device, dtype)
    tokenizer, special = _find_tokenizer(folder, config, name)
    if repo is not None:  # fetched by commit, because the branch may have moved since
        folder = _fetch(repo, folder.name, WEIGHTS)
    weights = _weights_file(folder, name)
    model = SoluscopeTransformer(hooked_config, move_to_device=False)
    _load_weights(model, weights, config, repo or folder.name)
    run = Path(name).resolve().name  # the last part of a name or path
    # A folder has no commit, so the hash of its weights identifies its content.
    commit = folder.name if repo is not None else _hash(weights, "sha256")
    variant = _variant(config, name)
    model.facts = Facts(
        run=run, arm=run, variant=variant, **_lineage(variant),
        study="pretrained", seed=0, d_model=config["d_model"], n_heads=config["n_heads"],
        d_mlp=config["d_mlp"], n_layers=config["n_layers"], ctx=config["n_ctx"], d_vocab=config["d_vocab"],
        hooked_act_fn=config["act_fn"], ln_eps=model.cfg.eps, gain=None,
        mid_norm="LayerNorm" if _has_mid_norm(model) else None,
        eps=model.cfg.eps if _has_mid_norm(model) else None,
        **special, tokenizer_hash=_hash(tokenizer, "sha256"), **_training(config),
        config=digest([repo or "", commit]), commit=commit, versions=versions(),
    )  # fmt: skip
    model.set_tokenizer(load_tokenizer(tokenizer, model.facts))
    nn.Module.to(model, device).eval()  # HookedTransformer.to prints
    return model


def repository_of(name: str) -> str | None:
    """Return the repository that `name` stands for; None for a folder."""
    family: dict[str, list[str]] = {
        repo: aliases for repo, aliases in MODEL_ALIASES.items() if repo.startswith(FAMILY)
    }
    by_alias = {alias: repo for repo, aliases in family.items() for alias in aliases}
    if name in by_alias:
        return by_alias[name]
    if Path(name).is_dir():
        return None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    near = difflib.get_close_matches(name, by_alias, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = ", ".join(aliases[0] for aliases in family.values())
    raise UserError(
        f"no pretrained model called {name!r}.{hint} There are: {known}; or give a repository on the hub "
        "(owner/name) or an existing folder"
    )


# --- files ----------------------------------------------------------------------------------------


def _fetch(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files of `repo` that match, and return their folder in the hub's cache.

    The folder is named after the commit.

    Raises:
        UserError: if the files are not in the cache and cannot be downloaded, or arrive damaged.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the client, its file systems and its HTTP library raise many kinds
        raise UserError(_why(error, repo, revision)) from error
    for pattern in patterns:
        for path in folder.rglob(pattern):
            _check_sum(path, repo)
    return folder


def _why(error: Exception, repo: str, revision: str | None) -> str:
    """Return an error of the hub's client as a message of one line."""
    uncached = isinstance(error, LocalEntryNotFoundError)
    cause = error.__cause__ if uncached and error.__cause__ is not None else error
    response = getattr(cause, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"the cache {constants.HF_HUB_CACHE} lacks files of {repo}, and HF_HUB_OFFLINE is set: unset "
            "HF_HUB_OFFLINE, or give a folder"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: set revision= to one of its branches, tags or commits"
    if isinstance(cause, RemoteEntryNotFoundError):
        file = str(cause.response.url).rsplit("/", 1)[-1]
        return f"the hub lists {file} of {repo}, but answers 404 to its download: try another revision="
    if status in (401, 403):
        return (
            f"the hub refuses access to {repo} ({status}): check its name, or set HF_TOKEN to a token with "
            "access"
        )
    if status == 404:
        return f"no repository {repo} at {constants.ENDPOINT} (404): check its name"
    if status is not None:
        return (
            f"{constants.ENDPOINT} answers {status} for {repo}: try again later, or give a folder"
        )
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if uncached:
        return (
            f"cannot reach {constants.ENDPOINT} ({reason}) and {repo} is not in the cache: check the network "
            "and HF_ENDPOINT, or give a folder"
        )
    return f"the download of {repo} broke off ({reason}): load it again; no partial file was kept"


def _check_sum(path: Path, repo: str) -> None:
    """Refuse and delete a cached file with another checksum than the hub announced.

    The cache names a file's content after the announced checksum (sha256, or git's sha1 for small files)
    and does not verify it. On a file system without links the announced checksum is lost, so nothing is
    checked.
    """
    if not path.is_symlink():
        return
    announced = os.readlink(path).rsplit("/", 1)[-1]
    kind = {64: "sha256", 40: "sha1"}.get(len(announced))
    if kind is None or _hash(path, kind) == announced:
        return
    blob = path.resolve()
    path.unlink()
    blob.unlink()
    raise UserError(
        f"{path.name} of {repo} does not have the checksum that the hub announced ({kind} "
        f"{announced[:12]}…): the file was deleted, load the model again"
    )


def _hash(path: Path, kind: str) -> str:
    """Return the sha256 of a file, or the sha1 that git gives its content."""
    state = hashlib.new(kind, usedforsecurity=False)
    if kind == "sha1":
        state.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise UserError(
            f"{name} has no {path.name}: wanted the name or folder of a model of the SoLU family"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path.name} of {name}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path.name} of {name} holds {type(content).__name__}, wanted keys and values"
        )
    return content


# --- config.json ----------------------------------------------------------------------------------


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of config.json, after checking that the model is of this family.

    Raises:
        UserError: if keys are missing, a size is not a count, or a setting is not supported.
    """
    config = _read_json(folder / "config.json", name)
    if "normalization" in config:  # the older key wins, as in TransformerLens
        config["normalization_type"] = config["normalization"]
    missing = [
        key
        for key in (*SIZES, "act_fn", "attn_only", "normalization_type")
        if key not in config and not (key == "d_mlp" and config.get("attn_only"))
    ]
    if missing:
        raise UserError(
            f"the layout of {name} is not known: its config.json has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(config)[:8]) or 'nothing'}"
        )
    config.setdefault("d_mlp", 0)
    for key in SIZES:
        if not isinstance(config[key], int) or config[key] < (key != "d_mlp"):
            raise UserError(f"config.json of {name} has {key}={config[key]!r}, wanted a count")
    settings = {
        "architecture": (config.get("architecture"), (None, "neel", "neel-solu-old")),
        "normalization": (config["normalization_type"], NORMS),
        "neuron_temp": (config.get("neuron_temp", 1), (1,)),
        "neuron_scale": (config.get("neuron_scale", 1), (1,)),
    }
    for key, (value, known) in settings.items():
        if value not in known:
            raise UserError(
                f"the layout of {name} is not known: its config.json has {key}={value!r}, wanted "
                f"{' or '.join(map(repr, known))}"
            )
    return config


def _hooked_config(
    config: dict[str, Any], name: str, device: str, dtype: torch.dtype
) -> HookedTransformerConfig:
    _variant(config, name)
    return HookedTransformerConfig(
        n_layers=config["n_layers"], d_model=config["d_model"], n_ctx=config["n_ctx"],
        d_head=config["d_head"], n_heads=config["n_heads"], d_mlp=config["d_mlp"] or None,
        d_vocab=config["d_vocab"], act_fn=config["act_fn"], attn_only=config["attn_only"],
        normalization_type=config["normalization_type"], final_rms=config.get("final_rms", False),
        positional_embedding_type="shortformer" if config.get("shortformer_pos") else "standard",
        eps=config.get("ln_eps", 1e-5), dtype=dtype, device=device, init_weights=False,
        default_prepend_bos=True, original_architecture="neel", model_name=name,
    )  # fmt: skip


def _variant(config: dict[str, Any], name: str) -> str:
    """Return the variant with the model's nonlinearity and mid norm; ATTN_ONLY for a model without an MLP."""
    if config["attn_only"]:
        return ATTN_ONLY
    known = _variants_by_act_fn()
    if str(config["act_fn"]).startswith("soluscope:"):
        raise UserError(
            f"{name} is an exported run of a variant that this layout cannot express ({config['act_fn']}): "
            "load its folder with soluscope.export.load"
        )
    if config["act_fn"] not in known:
        raise UserError(
            f"the layout of {name} is not known: its config.json has act_fn={config['act_fn']!r}, wanted "
            f"{' or '.join(map(repr, known))}"
        )
    return known[config["act_fn"]]


def _variants_by_act_fn() -> dict[str, str]:
    """Return the variants that TransformerLens's own classes compute, keyed by their act_fn.

    If several variants compute the same function, the variant named like the act_fn is returned.
    """
    pre = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variants: dict[str, str] = {}
    for name in plugins.names("soluscope.variants"):
        variant: Variant = plugins.pick("soluscope.variants", name)
        act_fn, build_norm = variant.hooked_act_fn, variant.build_norm
        same_mid = torch.allclose(
            SUPPORTED_ACTIVATIONS[act_fn](pre), variant.nonlinearity(pre), atol=1e-9
        )
        same_norm = build_norm is None or build_norm(8, variant.params()).is_layer_norm
        if same_mid and same_norm and (act_fn not in variants or act_fn == name):
            variants[act_fn] = name
    return variants


def _lineage(variant: str) -> dict[str, Any]:
    """Return the variant's role, twin and chain, all empty for a model without an MLP."""
    if variant == ATTN_ONLY:
        return {"role": "", "twin": "", "chain": ()}
    return lineage(variant)


def _has_mid_norm(model: SoluscopeTransformer) -> bool:
    return not model.cfg.attn_only and getattr(model.blocks[0].mlp, "ln", None) is not None


def _training(config: dict[str, Any]) -> dict[str, Any]:
    """Return the training settings in config.json; a missing setting is 0 or `unknown`."""
    # In the newer models, lr_hidden is the matrices' learning rate at d_model 256 (protocol.md section 3.2).
    rate = config["lr_hidden"] * 256 / config["d_model"] if "lr_hidden" in config else 0.0
    bf16 = config.get("use_bfloat16_matmul")
    return {
        "lr": config.get("lr", rate),
        "steps": config.get("max_steps", 0),
        "tokens": config.get("max_tokens", 0),
        "precision": "unknown" if bf16 is None else "bf16" if bf16 else "fp32",
        "device": "unknown",
    }


# --- tokenizer ------------------------------------------------------------------------------------


def _find_tokenizer(folder: Path, config: dict[str, Any], name: str) -> tuple[Path, dict[str, Any]]:
    """Return the path of the model's tokenizer.json, and the ids of `bos`, `eos` and `pad` in it.

    tokenizer.json is read itself, without the class that its config names: transformers rebuilds some of
    these classes from the vocabulary alone, which would lose the family's splitting of numbers into digits.

    Raises:
        UserError: if there is no tokenizer, or it does not fit the embedding.
    """
    if not (folder / TOKENIZER[0]).is_file():
        source = config.get("tokenizer_name")
        if not isinstance(source, str):
            raise UserError(
                f"{name} has no {TOKENIZER[0]}, and its config.json has no tokenizer_name: add one of the two"
            )
        folder, name = _fetch(source, None, TOKENIZER), source
    path = folder / TOKENIZER[0]
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"cannot read {path.name} of {name}: {error}") from error
    size = n_rows(tokenizer)
    if not 0 <= config["d_vocab"] - size <= MOST_SPARE_ROWS:
        raise UserError(
            f"the tokenizer of {name} has {size} tokens and the embedding d_vocab={config['d_vocab']} rows: "
            "use the tokenizer of this model"
        )
    return path, _special_tokens(folder, tokenizer, name)


def _special_tokens(folder: Path, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """Return the ids of `bos`, `eos` and `pad`; a token that is not named is chosen as in TransformerLens."""
    settings: dict[str, Any] = {}
    for file in reversed(TOKENIZER[1:]):
        if (folder / file).is_file():
            settings |= {
                key: value for key, value in _read_json(folder / file, name).items() if value
            }
    texts = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in settings.items()
        if key in ("bos_token", "eos_token", "pad_token")
    }
    eos = texts.get("eos_token", "<|endoftext|>")
    ids = {
        key: tokenizer.token_to_id(texts.get(f"{key}_token", eos)) for key in ("bos", "eos", "pad")
    }
    for key, token in ids.items():
        if token is None:
            raise UserError(
                f"the tokenizer of {name} has no token for {key}: use the tokenizer of this model"
            )
    return ids


# --- weights --------------------------------------------------------------------------------------


def _weights_file(folder: Path, name: str) -> Path:
    for pattern in WEIGHTS:
        for path in sorted(folder.rglob(pattern)):
            return path
    files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"{name} has no weights: wanted {' or '.join(WEIGHTS)}, there is {files}")


def _load_weights(
    model: SoluscopeTransformer, path: Path, config: dict[str, Any], name: str
) -> None:
    """Fill `model`: each tensor must match a parameter in name and shape, and none may be left over.

    Raises:
        UserError: if the file is broken, holds more than tensors, or does not fit the model.
    """
    state = _read_weights(path, name)
    if not {"embed.W_E", "pos_embed.W_pos"} <= state.keys():
        raise UserError(
            f"the layout of {name} is not known: {path.name} has {', '.join(sorted(state)[:3])}…, wanted "
            "embed.W_E, pos_embed.W_pos, blocks.0.…"
        )
    architecture = config.get("architecture", "neel-solu-old" if "_old" in name else "")
    if architecture == "neel-solu-old" or any("norm" in key for key in state):
        state = convert_neel_solu_old_weights(state, model.cfg)
    for buffer, _ in model.named_buffers():  # attention masks, which TransformerLens builds itself
        state.pop(buffer, None)
    # The family was trained without a bias at the unembedding.
    state.setdefault("unembed.b_U", torch.zeros(model.cfg.d_vocab))
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    problems = [f"no {key}" for key in sorted(wanted.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - wanted.keys())]
    problems += [
        f"{key} {tuple(state[key].shape)} where the model has {tuple(shape)}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path.name} of {name} does not fit its config.json: {', '.join(problems[:3])}{more}"
        )
    model.load_state_dict(state, strict=False)


def _read_weights(path: Path, name: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from pickle, zip or safetensors
        # Pickle's own message is left out, because it suggests unpickling the file.
        raise UserError(
            f"{path.name} of {name} is broken or holds more than tensors ({type(error).__name__}): nothing is "
            "unpickled here, wanted a plain dictionary of tensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path.name} of {name} is not a plain dictionary of tensors")
    return dict(state)
