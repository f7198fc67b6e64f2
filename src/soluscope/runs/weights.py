"""A run's final weights, the facts about them, and which code made them."""

from __future__ import annotations

import ast
import json
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from soluscope import plugins
from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.files import digest, write_bytes, write_text
from soluscope.model import LanguageModel
from soluscope.results import Step
from soluscope.variants import chain_of, twin_of

SOURCE = Path(__file__).parents[1]
"""The folder of the package's source."""


@dataclass(frozen=True)
class Facts:
    """What a reader of a checkpoint must know and its weights do not say."""

    run: str
    arm: str
    variant: str
    study: str
    seed: int
    d_model: int
    n_heads: int
    d_mlp: int
    n_layers: int
    ctx: int
    d_vocab: int
    hooked_act_fn: str
    ln_eps: float
    mid_norm: str | None
    """Class of the mid norm in norms.py, or None."""
    eps: float | None
    """Epsilon of the mid norm, where it has one."""
    gain: float | None
    """The constant gain of a static mid norm."""
    bos: int
    eos: int
    pad: int
    tokenizer_hash: str
    lr: float
    steps: int
    tokens: int
    """Tokens seen in training, BOS included."""
    precision: str
    """What it was trained in: fp32 or bf16."""
    device: str
    config: str
    """Hash of the configuration."""
    commit: str
    versions: dict[str, str]
    role: str
    """The variant's `role`, `twin` and chain, as the variants folder had them."""
    twin: str
    chain: tuple[Step, ...]
    """From the root of the chain to the variant itself, members that the study lacks included."""

    @property
    def kappa(self) -> float | None:
        """eps * d_mlp^2, the dose (science.md section 1.4)."""
        return None if self.eps is None else self.eps * self.d_mlp**2


def lineage(variant: str) -> dict[str, Any]:
    """Return what the variants folder says of a variant's place among the others, as `Facts` has it.

    Raises:
        UserError: if there is no such variant, or it names another that does not exist.
    """
    role = plugins.pick("soluscope.variants", variant).role
    return {"role": role, "twin": twin_of(variant), "chain": chain_of(variant)}


def save_model(run_dir: Path, model: LanguageModel, facts: Facts) -> None:
    """Final weights and facts, each whole or not there."""
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    write_bytes(run_dir / "model.safetensors", save(state))
    write_text(run_dir / "model.json", json.dumps(asdict(facts), indent=1) + "\n")


def load_facts(run_dir: Path) -> Facts:
    """Facts of a finished run. Where an older version wrote them, the variant's role, twin and chain
    are those of today's variants folder.

    Raises:
        UserError: if there is no such run, it is not finished, or the file is broken.
    """
    path = run_dir / "model.json"
    if not path.is_file():
        state = "has not finished: train it to its end" if run_dir.is_dir() else "does not exist"
        raise UserError(f"no model at {run_dir}: the run {state}")
    try:
        record = json.loads(path.read_text(encoding="utf8"))
        if "role" not in record:
            record |= lineage(record["variant"])
        else:
            record["chain"] = tuple(Step(**step) for step in record["chain"])
        return Facts(**{field.name: record[field.name] for field in fields(Facts)})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is broken ({error}): delete {run_dir} and train again") from error


def load_weights(run_dir: Path, config: Config, facts: Facts) -> LanguageModel:
    """Return the trained model of a finished run, strictly: every tensor by name and shape.

    Raises:
        UserError: truncated weights, or weights of another shape than the run's configuration.
    """
    path = run_dir / "model.safetensors"
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot read {path} ({_first_line(error)}): delete {run_dir / 'done.json'} to make it again"
        ) from error
    model = build_model(config, facts.d_vocab)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[1].strip()
        raise UserError(f"{path} does not fit {run_dir / 'config.yaml'}: {problem}") from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; train the run again")
    return model.eval()


def build_model(config: Config, d_vocab: int) -> LanguageModel:
    """The untrained model of a configuration."""
    variant = plugins.pick("soluscope.variants", config.variant)
    return LanguageModel(config.model, variant, config.mid, d_vocab, config.seed)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Lightning's checkpoint, without unpickling anything but tensors and plain values.

    Raises:
        UserError: if the file is truncated or not a checkpoint.
    """
    try:
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"cannot read the checkpoint {path} ({_first_line(error)}): delete it to start the run again"
        ) from error
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


@cache
def commit() -> str:
    """The commit that runs, with `+` where the tree was changed; the version if it is not a clone."""
    try:
        # A wheel inside somebody's own repository is not that repository's commit.
        _git("ls-files", "--error-unmatch", __file__)
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return f"v{versions()['soluscope']}"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def code_hash(*places: str, but: tuple[str, ...] = ()) -> str:
    """Return the hash of what the package's own code computes, comments and docstrings left out.

    Args:
        places: beginnings of paths inside the package, such as `hooked/` or `probes/engagement.py`.
        but: beginnings of paths to leave out.
    """
    sources = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
    return digest(
        [
            [name, _computed_by(path)]
            for name, path in sources.items()
            if name.startswith(places) and not name.startswith(but)
        ]
    )


@cache
def _computed_by(path: Path) -> str:
    """Return the syntax tree of a file without the strings that stand alone, which are docstrings."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    return ast.dump(_WithoutDocstrings().visit(tree))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


@cache
def versions() -> dict[str, str]:
    """Versions of what the numbers rest on."""
    result = {}
    for package in ("soluscope", "torch", "lightning", "transformer-lens", "numpy"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = "not installed"
    return result
