"""A run's final weights, the facts about them, and the version of the code that computed them."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from soluscope import plugins
from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.files import (
    Whole,
    check_names,
    digest,
    from_json,
    has_checksum,
    reason,
    write_bytes,
    write_text,
)
from soluscope.model import LanguageModel
from soluscope.results import Step
from soluscope.variants import chain_of, twin_of

SOURCE = Path(__file__).parents[1]
"""The folder of the package's source."""


@dataclass(frozen=True)
class Origin:
    """The finished run with whose weights another run started (train.init_from)."""

    run: str
    """Name of the run, with its study: study/run."""
    config: str
    """Hash of its configuration."""
    steps: Whole
    """Optimizer steps behind its weights, including the steps of an earlier origin."""
    tokens: Whole
    """Tokens seen in these steps, BOS included."""


@dataclass(frozen=True)
class Facts:
    """Facts about a model that are needed to use its weights and are not stored in them."""

    run: str
    arm: str
    variant: str
    study: str
    seed: Whole
    d_model: Whole
    n_heads: Whole
    d_mlp: Whole
    n_layers: Whole
    ctx: Whole
    d_vocab: Whole
    hooked_act_fn: str
    ln_eps: float
    mid_norm: str | None
    """Class of the mid norm in norms.py, or None."""
    eps: float | None
    """Epsilon of a per-token mid norm, or None."""
    gain: float | None
    """Constant gain of a static mid norm, or None."""
    bos: Whole
    eos: Whole
    pad: Whole
    tokenizer_hash: str
    lr: float
    steps: Whole
    tokens: Whole
    """Tokens seen in training, BOS included."""
    precision: str
    """Precision of training: fp32 or bf16."""
    device: str
    config: str
    """Hash of the configuration."""
    commit: str
    versions: dict[str, str]
    role: str
    """The variant's role, as its file in variants/ declared it at training; likewise `twin` and `chain`."""
    twin: str
    chain: tuple[Step, ...]
    """Steps from the root of the chain to the variant itself, including variants that the study lacks."""
    init_from: Origin | None = None
    """Origin of the initial weights. None: they were random. `steps` and `tokens` do not include it."""
    mlp_out_scale: float = 1.0
    """Constant factor on post W_out; conversion folds it into W_out."""
    entropy_penalty: float = 0.0
    """Weight of the penalty on a peaked SoLU in the training loss; 0: none."""

    @property
    def kappa(self) -> float | None:
        """Return eps * d_mlp^2, the dose (protocol.md section 1.4), or None without an epsilon."""
        return None if self.eps is None else self.eps * self.d_mlp**2


def lineage(variant: str) -> dict[str, Any]:
    """Return the fields of `Facts` that relate a variant to other variants: role, twin and chain.

    Raises:
        UserError: if the variant, or a variant that it names, does not exist.
    """
    role = plugins.pick("soluscope.variants", variant).role
    return {"role": role, "twin": twin_of(variant), "chain": chain_of(variant)}


def save_model(run_dir: Path, model: LanguageModel, facts: Facts) -> None:
    """Write the final weights and the facts, each atomically."""
    save_weights(run_dir / "model.safetensors", model)
    write_text(run_dir / "model.json", json.dumps(asdict(facts), indent=1) + "\n")


def save_weights(path: Path, model: LanguageModel) -> None:
    """Write a model's tensors, constant gains included."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    write_bytes(path, save(state))


def load_facts(run_dir: Path) -> Facts:
    """Return the facts of a finished run.

    Files of older versions lack the variant's role, twin and chain; these are then taken from the present
    variants folder.

    Raises:
        UserError: if the run does not exist, is not finished, or has a broken model.json.
    """
    path = run_dir / "model.json"
    if not path.is_file():
        state = "has not finished: finish training it" if run_dir.is_dir() else "does not exist"
        raise UserError(f"no model at {run_dir}: the run {state}")
    try:
        record = from_json(path.read_bytes(), dict[str, Any])
        if not isinstance(record.get("variant"), str):
            raise ValueError("it names no variant")
        if "role" not in record:
            record |= lineage(record["variant"])
        facts = msgspec.convert(record, Facts)
        origin = facts.init_from.run.split("/", 1) if facts.init_from else []
        check_names(facts.run, facts.arm, facts.variant, facts.study, *origin)
        return facts
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is broken ({error}): delete {run_dir} and train the run again"
        ) from error


def check_facts(run_dir: Path, config: Config, facts: Facts) -> None:
    """Refuse facts that contradict each other or the configuration, because one of the two files was changed.

    Raises:
        UserError: naming the value that is wrong.
    """
    model, train = config.model, config.train
    wanted = {
        "variant": config.variant, "seed": config.seed, "study": config.study, "d_model": model.d_model,
        "n_heads": model.n_heads, "d_mlp": model.d_mlp, "n_layers": model.n_layers, "ctx": model.ctx,
        "ln_eps": model.ln_eps, "lr": train.lr, "steps": train.steps,
        "entropy_penalty": train.entropy_penalty, "tokens": train.steps * train.batch_size * model.ctx,
    }  # fmt: skip
    if not isinstance(model.mlp_out_scale, str):
        wanted["mlp_out_scale"] = model.mlp_out_scale
    for name in ("bos", "eos", "pad"):
        if not 0 <= getattr(facts, name) < facts.d_vocab:
            raise UserError(
                f"{run_dir / 'model.json'} has {name}={getattr(facts, name)}, but a token below "
                f"d_vocab={facts.d_vocab} was wanted: copy the file again, or train the run again"
            )
    for name, there in wanted.items():
        if getattr(facts, name) != there:
            raise UserError(
                f"{run_dir / 'model.json'} has {name}={getattr(facts, name)}, but config.yaml beside it has "
                f"{name}={there}: copy both files again, or train the run again"
            )


def load_weights(
    path: Path, run_dir: Path, config: Config, facts: Facts, sha256: str | None = None
) -> LanguageModel:
    """Return a model of a finished run, after checking every tensor's name and shape.

    Args:
        path: the final weights, or a snapshot.
        run_dir: the run's folder.
        config: the run's configuration.
        facts: the facts of model.json.
        sha256: checksum of the weights in done.json; None for a run of an older version, which has none.

    Raises:
        UserError: if the weights are truncated, changed or not finite, or their shapes do not fit the run's
            configuration.
    """
    again = f"delete {run_dir / 'done.json'} and run the training command again"
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path} ({reason(error)}): {again}") from error
    n_needed = config.model.n_matrix_weights(facts.d_vocab)
    n_there = sum(tensor.numel() for tensor in state.values())
    # This check comes before memory is taken. Below, a smaller difference is named by its tensor.
    if n_needed > 2 * n_there:
        raise UserError(
            f"{path} does not fit {run_dir / 'config.yaml'}: it has {n_there:,} numbers, but the configuration "
            f"needs more than {n_needed:,}"
        )
    model = build_model(config, facts.d_vocab)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[1].strip()
        raise UserError(f"{path} does not fit {run_dir / 'config.yaml'}: {problem}") from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: {name} contains values that are not finite; train the run again"
            )
    if sha256 is not None and not has_checksum(path, sha256):
        raise UserError(
            f"{path} is not the file that was written by the training (its sha256 differs from the one "
            f"in done.json): copy it again, or {again}"
        )
    return model.eval()


def build_model(config: Config, d_vocab: int) -> LanguageModel:
    """Return the untrained model of a configuration."""
    variant = plugins.pick("soluscope.variants", config.variant)
    return LanguageModel(config.model, variant, config.mid, d_vocab, config.seed)


def initial_model(config: Config, trained: LanguageModel, d_vocab: int) -> LanguageModel:
    """Return a run's model before its first step, which is a function of the configuration and its seed.

    A constant gain is the trained model's: training does not change it.
    """
    model = build_model(config, d_vocab)
    model.load_state_dict(dict(trained.named_buffers()), strict=False)
    return model


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of Lightning's checkpoint, unpickling only tensors and plain values.

    Raises:
        UserError: if the file is truncated or not a checkpoint.
    """
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"cannot read the checkpoint {path} ({reason(error)}): delete it to train the run from step 0"
        ) from error
    return loaded


def first_misfit(
    here: Mapping[str, Tensor], there: Mapping[str, Tensor]
) -> tuple[str, object, object] | None:
    """Return the first name whose tensors differ in shape, and both shapes; None without a difference.

    The shape of a tensor that does not exist is `missing`.
    """
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in each.items()} for each in (here, there)
    ]
    for name in sorted(here.keys() | there.keys()):
        left, right = (each.get(name, "missing") for each in shapes)
        if left != right:
            return name, left, right
    return None


@cache
def commit() -> str:
    """Return the commit of the running code, with `+` if files were changed; outside a clone, the version."""
    try:
        # Fails for a package installed inside another repository, whose commit would be wrong here.
        _git("ls-files", "--error-unmatch", __file__)
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{versions()['soluscope']}"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def code_hash(*places: str, but: tuple[str, ...] = ()) -> str:
    """Return a hash of the package's source, comments and docstrings left out.

    Args:
        places: path prefixes inside the package, such as `hooked/` or `probes/engagement.py`.
        but: path prefixes to leave out.
    """
    return _hash_of(SOURCE, places, but)


@cache
def _hash_of(source: Path, places: tuple[str, ...], but: tuple[str, ...]) -> str:
    """Return the hash of the source in a folder; computed once, since a process runs the code that it has read."""
    sources = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*.py"))}
    return digest(
        [
            [name, _computed_by(path)]
            for name, path in sources.items()
            if name.startswith(places) and not name.startswith(but)
        ]
    )


@cache
def _computed_by(path: Path) -> str:
    """Return the syntax tree of a file without docstrings, which are its strings that stand alone."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    return ast.dump(_WithoutDocstrings().visit(tree))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the results."""
    result = {}
    for package in ("soluscope", "torch", "lightning", "transformer-lens", "numpy"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    return result
