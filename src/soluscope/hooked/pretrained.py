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
import re
import reprlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import msgspec
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_neel_solu_old_weights
from transformer_lens.supported_models import MODEL_ALIASES
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from soluscope import plugins
from soluscope.data.tokenizer import SPECIAL_FILES, from_bytes, n_rows, named_special
from soluscope.errors import UserError
from soluscope.files import digest, reason
from soluscope.hooked.convert import SoluscopeTransformer, load_tokenizer
from soluscope.runs.weights import Facts, lineage, versions
from soluscope.variants import Variant

FAMILY = "NeelNanda/"
"""Owner of the repositories with this layout."""
TOKENIZER = ("tokenizer.json", *SPECIAL_FILES)
WEIGHTS = ("model.safetensors", "*final.pth")
"""File patterns in order of preference."""
SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab")
NORMS = ("LN", "LNPre", "RMS", "RMSPre", None)
ATTN_ONLY = "attn_only"
"""Placeholder for the variant of a model without an MLP."""
MOST_SPARE_ROWS = 127
"""Largest number of embedding rows without a token: SoLU-1L-old has one, other models pad to 128."""
Size = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Rate = Annotated[float, msgspec.Meta(ge=0, lt=1e30)]
"""Also excludes NaN and infinity, which JSON does not have and Python reads."""


@dataclass(frozen=True)
class FamilyConfig:
    """The keys of config.json that are used."""

    n_layers: Size
    d_model: Size
    n_heads: Size
    d_head: Size
    n_ctx: Size
    d_vocab: Size
    act_fn: str
    attn_only: bool
    normalization_type: str | None
    d_mlp: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    """0 for a model without an MLP."""
    architecture: str | None = None
    neuron_temp: float = 1
    neuron_scale: float = 1
    final_rms: bool = False
    shortformer_pos: bool = False
    ln_eps: Annotated[float, msgspec.Meta(gt=0, lt=1e30)] = 1e-5
    tokenizer_name: str | None = None
    lr: Rate | None = None
    lr_hidden: Rate | None = None
    max_steps: Rate | None = None
    max_tokens: Rate | None = None
    use_bfloat16_matmul: bool | None = None

    @property
    def n_parameters(self) -> int:
        """Return the number of weights in matrices, without biases and norms."""
        attention = 4 * self.d_model * self.n_heads * self.d_head
        ends = (2 * self.d_vocab + self.n_ctx) * self.d_model
        mlp = 0 if self.attn_only else 2 * self.d_model * self.d_mlp
        return ends + self.n_layers * (attention + mlp)


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
    state = _read_weights(weights, config, name)
    model = SoluscopeTransformer(hooked_config, move_to_device=False)
    _load_weights(model, state, weights, config, repo or folder.name)
    # The last part of a name or path, with the letters that a folder's name may have.
    run = re.sub(r"[^\w.+-]+", "-", Path(name).resolve().name)
    # A folder has no commit, so the hash of its weights identifies its content.
    commit = folder.name if repo is not None else _hash(weights, "sha256")
    variant = _variant(config, name)
    model.facts = Facts(
        run=run, arm=run, variant=variant, **_lineage(variant),
        study="pretrained", seed=0, d_model=config.d_model, n_heads=config.n_heads,
        d_mlp=config.d_mlp, n_layers=config.n_layers, ctx=config.n_ctx, d_vocab=config.d_vocab,
        hooked_act_fn=config.act_fn, ln_eps=model.cfg.eps, gain=None,
        mid_norm="LayerNorm" if _has_mid_norm(model) else None,
        eps=model.cfg.eps if _has_mid_norm(model) else None,
        bos=special["bos"], eos=special["eos"], pad=special["pad"],
        tokenizer_hash=_hash(tokenizer, "sha256"), **_training(config),
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
    why = reason(cause)
    if uncached:
        return (
            f"cannot reach {constants.ENDPOINT} ({why}) and {repo} is not in the cache: check the network "
            "and HF_ENDPOINT, or give a folder"
        )
    return f"the download of {repo} broke off ({why}): load it again; no partial file was kept"


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


# --- config.json ----------------------------------------------------------------------------------


def _read_config(folder: Path, name: str) -> FamilyConfig:
    """Return the content of config.json, after checking that the model is of this family.

    Raises:
        UserError: if the file is missing or broken, keys are missing, a value has another type or is out of
            range, or a setting is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{name} has no config.json: wanted the name or folder of a model of the SoLU family"
        )
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read config.json of {name}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"config.json of {name} holds {type(content).__name__}, wanted keys and values"
        )
    if "normalization" in content:  # the older key wins, as in TransformerLens
        content["normalization_type"] = content["normalization"]
    missing = [
        key
        for key in (*SIZES, "act_fn", "attn_only", "normalization_type")
        if key not in content and not (key == "d_mlp" and content.get("attn_only"))
    ]
    if missing:
        raise UserError(
            f"the layout of {name} is not known: its config.json has no {', '.join(missing)}; it has "
            f"{', '.join(sorted(content)[:8]) or 'nothing'}"
        )
    try:
        config = msgspec.convert(content, FamilyConfig)
    except msgspec.ValidationError as error:
        problem, _, key = str(error).rstrip("`").partition(" - at `$.")
        wanted = "wanted a count" if key in SIZES else f"wrong: {problem}"
        raise UserError(
            f"config.json of {name} has {key}={reprlib.repr(content.get(key))}, {wanted}"
        ) from error
    if not (config.d_mlp or config.attn_only):
        raise UserError(f"config.json of {name} has d_mlp=0 and attn_only=false, wanted a count")
    settings = {
        "architecture": (config.architecture, (None, "neel", "neel-solu-old")),
        "normalization": (config.normalization_type, NORMS),
        "neuron_temp": (content.get("neuron_temp", 1), (1,)),
        "neuron_scale": (content.get("neuron_scale", 1), (1,)),
    }
    for key, (value, known) in settings.items():
        if value not in known:
            raise UserError(
                f"the layout of {name} is not known: its config.json has {key}={value!r}, wanted "
                f"{' or '.join(map(repr, known))}"
            )
    return config


def _hooked_config(
    config: FamilyConfig, name: str, device: str, dtype: torch.dtype
) -> HookedTransformerConfig:
    _variant(config, name)
    return HookedTransformerConfig(
        n_layers=config.n_layers, d_model=config.d_model, n_ctx=config.n_ctx, d_head=config.d_head,
        n_heads=config.n_heads, d_mlp=config.d_mlp or None, d_vocab=config.d_vocab, act_fn=config.act_fn,
        attn_only=config.attn_only, normalization_type=config.normalization_type,
        final_rms=config.final_rms,
        positional_embedding_type="shortformer" if config.shortformer_pos else "standard",
        eps=config.ln_eps, dtype=dtype, device=device, init_weights=False,
        default_prepend_bos=True, original_architecture="neel", model_name=name,
    )  # fmt: skip


def _variant(config: FamilyConfig, name: str) -> str:
    """Return the variant with the model's nonlinearity and mid norm; ATTN_ONLY for a model without an MLP."""
    if config.attn_only:
        return ATTN_ONLY
    known = _variants_by_act_fn()
    if config.act_fn.startswith("soluscope:"):
        raise UserError(
            f"{name} is an exported run of a variant that this layout cannot express ({config.act_fn}): "
            "load its folder with soluscope.export.load"
        )
    if config.act_fn not in known:
        raise UserError(
            f"the layout of {name} is not known: its config.json has act_fn={config.act_fn!r}, wanted "
            f"{' or '.join(map(repr, known))}"
        )
    return known[config.act_fn]


def _variants_by_act_fn() -> dict[str, str]:
    """Return the variants that TransformerLens's own classes compute, keyed by their act_fn.

    If several variants compute the same function, the variant named like the act_fn is returned.
    """
    pre = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variants: dict[str, str] = {}
    for name in plugins.names("soluscope.variants"):
        variant: Variant = plugins.pick("soluscope.variants", name)
        act_fn, build_norm = variant.hooked_act_fn, variant.build_norm
        activation = variant.activation(8, variant.params())
        same_mid = torch.allclose(SUPPORTED_ACTIVATIONS[act_fn](pre), activation(pre), atol=1e-9)
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


def _training(config: FamilyConfig) -> dict[str, Any]:
    """Return the training settings in config.json; a missing setting is 0 or `unknown`."""
    # In the newer models, lr_hidden is the matrices' learning rate at d_model 256 (protocol.md section 3.2).
    rate = (config.lr_hidden or 0.0) * 256 / config.d_model
    bf16 = config.use_bfloat16_matmul
    return {
        "lr": rate if config.lr is None else config.lr,
        "steps": int(config.max_steps or 0),
        "tokens": int(config.max_tokens or 0),
        "precision": "unknown" if bf16 is None else "bf16" if bf16 else "fp32",
        "device": "unknown",
    }


# --- tokenizer ------------------------------------------------------------------------------------


def _find_tokenizer(folder: Path, config: FamilyConfig, name: str) -> tuple[Path, dict[str, int]]:
    """Return the path of the model's tokenizer.json, and the ids of `bos`, `eos` and `pad` in it.

    tokenizer.json is read itself, without the class that its config names: transformers rebuilds some of
    these classes from the vocabulary alone, which would lose the family's splitting of numbers into digits.

    Raises:
        UserError: if there is no tokenizer, or it does not fit the embedding.
    """
    if not (folder / TOKENIZER[0]).is_file():
        source = config.tokenizer_name
        if source is None:
            raise UserError(
                f"{name} has no {TOKENIZER[0]}, and its config.json has no tokenizer_name: add one of the two"
            )
        try:
            validate_repo_id(source)
        except HFValidationError as error:
            raise UserError(
                f"config.json of {name} has tokenizer_name={reprlib.repr(source)}, wanted a repository on the hub"
            ) from error
        folder, name = _fetch(source, None, TOKENIZER), source
        if not (folder / TOKENIZER[0]).is_file():
            raise UserError(f"{name} has no {TOKENIZER[0]}: set tokenizer_name in config.json")
    path = folder / TOKENIZER[0]
    tokenizer = from_bytes(path.read_bytes(), f"cannot read {path.name} of {name}")
    size = n_rows(tokenizer)
    if not 0 <= config.d_vocab - size <= MOST_SPARE_ROWS:
        raise UserError(
            f"the tokenizer of {name} has {size} tokens and the embedding d_vocab={config.d_vocab} rows: "
            "use the tokenizer of this model"
        )
    # The first file names the tokens; a token that neither names is chosen as in TransformerLens.
    first, second = named_special(folder)
    texts = second | first
    eos = texts.get("eos_token", "<|endoftext|>")
    ids = {}
    for key in ("bos", "eos", "pad"):
        token = tokenizer.token_to_id(texts.get(f"{key}_token", eos))
        if token is None:
            raise UserError(
                f"the tokenizer of {name} has no token for {key}: use the tokenizer of this model"
            )
        ids[key] = token
    return path, ids


# --- weights --------------------------------------------------------------------------------------


def _weights_file(folder: Path, name: str) -> Path:
    for pattern in WEIGHTS:
        for path in sorted(folder.rglob(pattern)):
            if path.is_file():
                return path
    files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"{name} has no weights: wanted {' or '.join(WEIGHTS)}, there is {files}")


def _read_weights(path: Path, config: FamilyConfig, name: str) -> dict[str, Tensor]:
    """Return the tensors of a file, after checking that the model of config.json is not larger than the file.

    So no memory is needed beyond the file's size, whatever numbers config.json contains.

    Raises:
        UserError: if the file is broken, holds more than tensors, or is too small for the model.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            if path.suffix == ".safetensors":
                state: Any = load_file(path)
            else:
                _check_stored(path)
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # from pickle, zip or safetensors; pickle's own text suggests unpickling
        raise UserError(
            f"{path.name} of {name} is broken or holds more than tensors ({type(error).__name__}): nothing is "
            "unpickled here, wanted a plain dictionary of tensors"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise UserError(f"{path.name} of {name} is not a plain dictionary of tensors")
    if not {"embed.W_E", "pos_embed.W_pos"} <= state.keys():
        raise UserError(
            f"the layout of {name} is not known: {path.name} has {', '.join(sorted(state)[:3])}…, wanted "
            "embed.W_E, pos_embed.W_pos, blocks.0.…"
        )
    n_blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    n_bytes = path.stat().st_size
    # A tensor's shape proves nothing, because its rows may share their memory. No format has less than a byte
    # per weight.
    if n_blocks != config.n_layers or n_bytes < config.n_parameters:
        raise UserError(
            f"{path.name} of {name} does not fit its config.json: it has {n_blocks} blocks and {n_bytes:,} "
            f"bytes, wanted n_layers={config.n_layers} and {config.n_parameters:,} weights"
        )
    return dict(state)


def _check_stored(path: Path) -> None:
    """Refuse an archive that may be far larger in memory than on the disk.

    Raises:
        ValueError: if a part is compressed, or parts share their bytes; torch stores each part by itself.
    """
    try:
        with ZipFile(path) as archive:
            parts = archive.infolist()
    except BadZipFile:  # a file of torch before 1.6
        return
    is_small = sum(part.file_size for part in parts) <= path.stat().st_size
    if not is_small or any(part.compress_type != ZIP_STORED for part in parts):
        raise ValueError("the archive is compressed")


def _load_weights(
    model: SoluscopeTransformer,
    state: dict[str, Tensor],
    path: Path,
    config: FamilyConfig,
    name: str,
) -> None:
    """Fill `model`: each tensor must match a parameter in name and shape, and none may be left over.

    Raises:
        UserError: if a tensor does not fit the model.
    """
    architecture = config.architecture or ("neel-solu-old" if "_old" in name else "")
    if architecture == "neel-solu-old" or any("norm" in key for key in state):
        try:
            state = convert_neel_solu_old_weights(state, model.cfg)
        except (IndexError, RuntimeError) as error:  # a vector in place of a matrix
            raise UserError(
                f"{path.name} of {name} does not fit its config.json: {str(error).splitlines()[0]}"
            ) from error
    for buffer, _ in model.named_buffers():  # attention masks, which TransformerLens builds itself
        state.pop(buffer, None)
    # The family was trained without a bias at the unembedding.
    state.setdefault("unembed.b_U", torch.zeros(model.cfg.d_vocab))
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    problems = [f"no {key}" for key in sorted(wanted.keys() - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - wanted.keys())]
    for key, shape in wanted.items():
        if key in state and state[key].shape != shape:
            problems.append(f"{key} {tuple(state[key].shape)} where the model has {tuple(shape)}")
        elif key in state and (what := _lacks(state[key])):
            problems.append(f"{key} is not {what}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{path.name} of {name} does not fit its config.json: {', '.join(problems[:3])}{more}"
        )
    model.load_state_dict(state, strict=False)


def _lacks(tensor: Tensor) -> str:
    """Return the property that a tensor needs to be a parameter and does not have; empty if it has all."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "a plain tensor"
    if not tensor.is_floating_point():
        return "of real numbers"
    return "" if tensor.float().isfinite().all() else "finite"
