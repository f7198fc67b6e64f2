"""Configuration in three layers: the defaults here < YAML files < the command line.

`variant=`, `size=` and `data=` each choose a file in configs/. `mid.*` are the parameters of the chosen
variant, and `corpus.*` those of the chosen source. Everything is read and checked here before any slow
package is imported, so that `--help` and errors appear at once.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf, read_write
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from soluscope import plugins
from soluscope.errors import UserError
from soluscope.files import digest, name_problem
from soluscope.reading import (
    AsWritten,
    FilePath,
    as_word,
    expanded,
    field_types,
    for_seed,
    is_path,
    only_references,
    only_seed_in_braces,
    read_word,
    read_yaml,
    without_folders,
)

T = TypeVar("T")

MOST = 2**31 - 1
"""Largest whole number of a setting, so that products of two fit into 64 bits."""
MOST_THREADS = 1024
MOST_DRAWS = 1_000_000
"""Largest number of bootstrap resamples; more do not change the first three digits of an interval's bounds."""
MOST_SHOWN = 100
"""Longest name that a message repeats."""
YAML = (".yaml", ".yml")
"""Endings of YAML files."""


def check(condition: bool, message: str) -> None:
    """Raise a UserError with `message` if `condition` is false."""
    if not condition:
        raise UserError(message)


def n_block_weights(d_model: int, d_mlp: int, n_layers: int) -> int:
    """Return the number of weights in the blocks' matrices, without embeddings, biases and the norms' weights."""
    return n_layers * (4 * d_model**2 + 2 * d_model * d_mlp)


MATCHED = "baseline"
"""Value of model.mlp_out_scale that stands for a number measured before the first step."""
CONSTANT: Literal["constant"] = "constant"
"""Value of model.norms for a model that loses all its per-token scales."""


@dataclass(frozen=True)
class ModelConfig:
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Attention heads; d_head is d_model / n_heads."""
    d_mlp: int = 512
    """Neurons in the MLP, N in protocol.md."""
    n_layers: int = 1
    """Transformer blocks. The exact probes need a model with one block."""
    ctx: int = 128
    """Tokens per row, BOS included."""
    ln_eps: float = 1e-5
    """Epsilon of the residual stream's norms (ln1, ln2, ln_final). The mid norm has a separate epsilon."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; for W_pos it is half of this value."""
    mlp_out_scale: float | int | str = 1.0
    """Constant alpha in mlp_out = alpha post W_out + b_out: the size of the MLP's output beside the residual
    stream, and of the change that one optimizer step makes to it. `baseline`: the alpha at which the median of
    |mlp_out| / |resid_mid| starts as in the baseline, plain GELU, with the same seed."""
    norms: Literal["live", "constant"] = "live"
    """live: norms with a per-token scale keep it. constant: further training (train.init_from) replaces it by a
    constant in one norm after the other, in its first half. `soluscope remove norms=all` trains such models."""

    def training_flops(self, d_vocab: int) -> float:
        """Return the floating-point operations per token of a training step's matrix products.

        The forward pass costs 2 operations per weight and token, plus attention's two products over the
        whole ctx; the backward pass costs twice as much. The last position of a row has no target and hence
        no logits.
        """
        attention = self.n_layers * 2 * self.ctx * self.d_model
        logits = d_vocab * self.d_model * (self.ctx - 1) / self.ctx
        return 3 * 2 * (self._n_block_weights() + attention + logits)

    def n_matrix_weights(self, d_vocab: int) -> int:
        """Return the number of weights in the matrices: all parameters but the biases and the norms' weights."""
        return self._n_block_weights() + self.d_model * (2 * d_vocab + self.ctx)

    def _n_block_weights(self) -> int:
        return n_block_weights(self.d_model, self.d_mlp, self.n_layers)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_mlp", "n_layers"):
            check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be 1 or more")
        check(self.ctx >= 3, f"model.ctx={self.ctx} must be 3 or more: BOS, a token and its target")
        check(
            self.d_model % self.n_heads == 0,
            f"model.n_heads={self.n_heads} does not divide model.d_model={self.d_model}",
        )
        check(self.ln_eps > 0, f"model.ln_eps={self.ln_eps} must be above 0")
        check(self.init_std > 0, f"model.init_std={self.init_std} must be above 0")
        alpha = self.mlp_out_scale
        check(
            alpha == MATCHED if isinstance(alpha, str) else 0 < alpha < math.inf,
            f"model.mlp_out_scale={alpha} must be a number above 0, or {MATCHED}",
        )
        if isinstance(alpha, int):  # 2 and 2.0 are one setting with one id
            object.__setattr__(self, "mlp_out_scale", float(alpha))


@dataclass(frozen=True)
class TokensConfig:
    tokenizer: FilePath = "bpe"
    """`bpe` trains a byte-level BPE on the train split. Otherwise the path of a tokenizer.json or of its
    folder, or the name of a tokenizer on the hub."""
    d_vocab: int = 4096
    """Entries of the trained BPE, special tokens included. Not used with a loaded tokenizer."""
    train_mb: float = 50.0
    """Maximum number of megabytes of the train split on which the BPE is trained."""
    select_share: float = 0.05
    """Share of documents in the select split, on which settings (gains, learning rates) are chosen."""
    report_share: float = 0.05
    """Share of documents in the report split, on which results are measured. No document is in two splits."""
    cache_dir: FilePath = "runs/.tokens"
    """Folder of prepared token caches. Each cache is a subfolder named by a hash of its settings."""
    prepared: FilePath | None = None
    """Folder of a token cache to use unchanged, for example copied from another machine. The corpus is then
    not read."""

    def __post_init__(self) -> None:
        check(
            self.d_vocab >= 260,
            f"tokens.d_vocab={self.d_vocab} must be 260 or more, for 256 bytes, BOS, EOS, PAD and a merge",
        )
        check(self.train_mb > 0, f"tokens.train_mb={self.train_mb} must be above 0")
        shares = (self.select_share, self.report_share)
        check(
            min(shares) > 0 and sum(shares) < 1,
            f"tokens.select_share={shares[0]} and tokens.report_share={shares[1]} must be above 0 "
            "and leave a share for training",
        )


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Rows per step, over all micro-batches."""
    micro_batches: int = 1
    """Number of parts into which a step's batch is divided to save memory. The gradient is that of the whole
    batch."""
    init_from: FilePath | None = None
    """Folder of a finished run, with whose weights training starts instead of random ones; {seed} in it stands for
    this run's seed. The schedule and the optimizer start at step 0, and the batches continue after that run's. The
    folder must stay until this run is finished. null: random weights."""
    lr: float | None = None
    """Peak learning rate of the blocks' matrices. null: the rate in train.rates for this arm."""
    lr_rest: float = 1e-3
    """Peak learning rate of embeddings, the unembedding, the norms' weights and biases."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of each arm at this size, used if train.lr is null. An arm is a variant, such as `solu_ln`, or
    a variant with settings, such as `solu_ln mid.kappa=4e-5`, whose rate goes before the variant's rate."""
    tuned: list[str] = field(default_factory=list)
    """Arms whose rate was tuned with the other settings of this preset, named as in train.rates."""
    warmup_steps: int = 50
    """Optimizer steps over which the rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the rate after warm-up: cosine or constant."""
    final_lr_share: float = 0.1
    """Final rate of the cosine schedule, as a share of the peak rate."""
    beta1: float = 0.9
    """AdamW's decay of the running mean of the gradient."""
    beta2: float = 0.99
    """AdamW's decay of the running mean of the squared gradient."""
    weight_decay: float = 0.05
    """Weight decay of matrices and the unembedding. Embeddings, the norms' weights and biases have none."""
    entropy_penalty: float = 0.0
    """Weight lambda of a penalty on a peaked SoLU: lambda times (log n - H) is added to the loss. H is the entropy
    of SoLU's softmax over n neurons, in nats, averaged over tokens without BOS. Above 0 the softmax becomes
    less peaked, below 0 more peaked. Reported losses do not contain the penalty. 0: no penalty."""
    clip: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl, and between checks for a diverged loss."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    snapshots: int = 0
    """Number of log-spaced steps whose weights are kept beside the final ones, for curves of the training dynamics.
    The first is step 1. 0: none."""
    val_tokens: int = 20_000
    """Maximum number of tokens of each validation split on which the final loss is measured."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: cuda if available, else cpu."""
    threads: int | None = None
    """CPU threads per process. The last bits of sums depend on this number. null: OMP_NUM_THREADS,
    or else the cores that affinity and cgroup allow, divided by train.devices."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Floating-point format. auto: as in the study's earlier runs, else bf16 on cuda and fp32 on cpu. The mid
    norm is always computed in fp32."""
    compile: bool | None = None
    """Use torch.compile: true or false. null: only on cuda."""
    devices: int = 1
    """Processes (on cuda: GPUs) per node that train one model together and share each batch. torchrun or
    srun starts them."""
    nodes: int = 1
    """Machines that train one model together. The same command is started on each machine."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "micro_batches",
            "log_every",
            "checkpoint_every",
            "threads",
            "devices",
            "nodes",
        )
        for name in counts:
            value = getattr(self, name)
            check(value is None or value >= 1, f"train.{name}={value} must be 1 or more")
        check(
            (self.threads or 1) <= MOST_THREADS,
            f"train.threads={self.threads} must be at most {MOST_THREADS}",
        )
        check(
            self.batch_size % self.micro_batches == 0,
            f"train.micro_batches={self.micro_batches} does not divide train.batch_size={self.batch_size}",
        )
        check(
            self.batch_size % (self.micro_batches * self.n_processes) == 0,
            f"train.devices={self.devices} times train.nodes={self.nodes} does not divide the "
            f"{self.batch_size // self.micro_batches} rows of a micro-batch: change train.batch_size",
        )
        check(
            0 <= self.warmup_steps <= self.steps,
            f"train.warmup_steps={self.warmup_steps} must be between 0 and train.steps={self.steps}",
        )
        for name in ("lr", "lr_rest", "clip", "val_tokens"):
            value = getattr(self, name)
            check(value is None or value > 0, f"train.{name}={value} must be above 0")
        for name in ("beta1", "beta2"):
            check(
                0 <= getattr(self, name) < 1,
                f"train.{name}={getattr(self, name)} must be in [0, 1)",
            )
        check(
            0 <= self.snapshots <= self.steps,
            f"train.snapshots={self.snapshots} must be between 0 and train.steps={self.steps}",
        )
        share = self.final_lr_share
        check(0 <= share <= 1, f"train.final_lr_share={share} must be in [0, 1]")
        check(self.weight_decay >= 0, f"train.weight_decay={self.weight_decay} must be 0 or more")

    @property
    def n_processes(self) -> int:
        """Return the number of processes that train one model together."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class Config:
    study: str = "default"
    """Folder below runs_dir. It contains runs that are compared with each other."""
    seed: int = 0
    """Seed of initial values and batches. Runs of several variants with equal seeds are paired."""
    select_seeds: list[int] = field(default_factory=list)
    """Seeds at which rates, gains and the best static arm are chosen. Their results are not reported. A sweep
    trains all arms at these seeds, and then the chosen arms at its own seeds."""
    variant: str = MISSING
    """Name of a file in variants/. Required, so that no run uses a variant by accident."""
    size: str = "demo"
    """Name of a file in configs/size/."""
    data: str = "stdlib"
    """Name of a source of text and of its file in configs/data/."""
    probes: bool = True
    """false: the evaluation of the run measures its losses only."""
    tag: str = ""
    """Suffix of the run folder's name, to distinguish arms of one variant."""
    runs_dir: FilePath = "runs"
    """Folder that contains the studies."""
    wandb: Literal["offline", "online", "off"] | None = None
    """Logging to wandb, in addition to metrics.jsonl. null: online with a wandb key, offline without a key,
    off if wandb is not installed. WANDB_PROJECT and WANDB_ENTITY set the destination. `wandb sync` uploads
    offline runs."""
    mid: Any = None
    """Parameters of the variant, listed below."""
    corpus: Any = None
    """Parameters of the source of text, listed below."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check(self.study != "", "study is empty: set it to the name of the study's folder")
        for key, name in (("study", self.study), ("tag", self.run_name), ("tag", self.tag)):
            problem = name_problem(name) if name else None
            shown = repr(getattr(self, key)) if len(name) <= MOST_SHOWN else ""
            check(problem is None, f"{key}={shown} {problem}")
        check(
            "::" not in self.runs_dir and "://" not in self.runs_dir,
            f"runs_dir={self.runs_dir} would be read as an address when a checkpoint is saved: give a path "
            "of this machine, without :: and ://",
        )
        if self.train.init_from is not None:
            only_seed_in_braces("train.init_from", self.train.init_from)
        check(0 <= self.seed < 2**31, f"seed={self.seed} must be 0 or more and below 2^31")
        check(
            self.model.norms != CONSTANT
            or (self.train.init_from is not None and not self.train.snapshots),
            f"model.norms={self.model.norms} needs the weights of a trained run (train.init_from=) and keeps no "
            "snapshots (train.snapshots=0): 'soluscope remove norms=all' sets both",
        )
        check(
            self.init_dir is None or self.init_dir.resolve() != self.run_dir.resolve(),
            f"train.init_from={self.train.init_from} is the folder of this run itself: set tag= or study= to train "
            "on in another folder",
        )

    @property
    def arm(self) -> str:
        """Return the run's name without its seed."""
        return f"{self.variant}-{self.tag}" if self.tag else self.variant

    @property
    def run_name(self) -> str:
        return f"{self.variant}-s{self.seed}" + (f"-{self.tag}" if self.tag else "")

    @property
    def study_dir(self) -> Path:
        return Path(self.runs_dir) / self.study

    @property
    def run_dir(self) -> Path:
        return self.study_dir / self.run_name

    @property
    def init_dir(self) -> Path | None:
        """Return the folder of the run with whose weights training starts, or None for random weights."""
        path = self.train.init_from
        return None if path is None else Path(for_seed(path, self.seed))

    @property
    def hash(self) -> str:
        """Return a hash of the settings that affect the results. Paths and hardware are excluded."""
        return digest(_determining(asdict(self)))


@dataclass(frozen=True)
class EvalConfig:
    probes: list[str] | None = None
    """Probes to run: names of files in probes/. null: all probes."""
    n_tokens: int = 10_000
    """Approximate number of tokens of each stream on which the probes run."""
    n_loss_tokens: int = 50_000
    """Maximum number of tokens of each validation split on which the loss is compared."""
    n_draws: int = 2000
    """Bootstrap resamples for each interval."""
    seed: int = 0
    """Seed of the random streams and of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which the models run. auto: a GPU if torch finds one; in a sweep, only if train.device allows it.
    Results on a GPU agree with those on the CPU to 1e-5, not in every digit."""
    jobs: int | None = None
    """Runs that are evaluated at once, each in a process with OMP_NUM_THREADS CPU threads, or with one without that
    variable. Results do not depend on it. 1: all in this process. null: as many as the cores allow; 1 on a GPU."""
    prepared: FilePath | None = None
    """Folder of a token cache to evaluate on. null: the study's copy of the held-out tokens."""
    out: FilePath | None = None
    """Folder for the results and the report, if you may not write to the study's folder. null: the study's
    folder."""
    wandb: Literal["offline", "online", "off"] | None = None
    """Logging of the results to wandb. null: as the run was trained, if this user trained it here; else off."""
    wait: bool = False
    """true: wait while another process evaluates the study. false: refuse."""
    step: int | None = None
    """Training step whose weights are evaluated: one of the steps that train.snapshots kept, or 0. The results are
    written to the folder <study>-step<step> beside the study, unless out= names one. null: the final weights."""

    def __post_init__(self) -> None:
        check(self.step is None or self.step >= 0, f"step={self.step} must be 0 or more")
        for name in ("n_tokens", "n_loss_tokens", "n_draws"):
            check(getattr(self, name) >= 100, f"{name}={getattr(self, name)} must be 100 or more")
        check(self.n_draws <= MOST_DRAWS, f"n_draws={self.n_draws} must be at most {MOST_DRAWS:,}")
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        check(self.jobs is None or self.jobs >= 1, f"jobs={self.jobs} must be 1 or more")
        for name in self.probes or ():
            plugins.check_name("probe", name, plugins.names("soluscope.probes"))


@dataclass(frozen=True)
class PretrainedConfig(EvalConfig):
    """Settings of `soluscope probe` for a pretrained model: evaluation, revision, and text source."""

    revision: str | None = None
    """Branch, tag or commit of the model's repository. null: the main branch."""
    data: str | None = None
    """Source of the text, as in training. null: the text of the model's last evaluation; without one, hub,
    or stdlib if the hub cannot be reached."""
    corpus: AsWritten = None
    """Parameters of the source, as in training. With data=hub, 20 MB are read unless corpus.max_mb sets
    another limit."""
    study: FilePath | None = None
    """An evaluated study, or several as [first,second]. Its runs are shown beside the model."""
    runs_dir: FilePath = "runs"
    """Folder in which the model's study is created. The study is named after the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.out is None,
            f"out={self.out} is for trained runs: for a pretrained model set runs_dir= instead",
        )
        check(self.step is None, f"step={self.step} is for trained runs: omit it here")
        check(
            self.wandb in (None, "off"),
            f"wandb={self.wandb} is for trained runs: omit it for a pretrained model",
        )
        if self.sets_text:
            self.text(self.data or "hub", tokenizer="bpe")

    @property
    def sets_text(self) -> bool:
        """Return whether data= or corpus.* set the text to probe on."""
        return self.data is not None or self.corpus is not None

    @property
    def studies(self) -> list[str]:
        """Return the names in `study` as a list."""
        if self.study is not None and Path(self.study).is_dir():
            return [self.study]
        named = (self.study or "").strip("[]").split(",")
        return [expanded(name.strip()) for name in named if name.strip()]

    def text(self, data: str, tokenizer: str) -> Config:
        """Return a training configuration for the text of a source; only its tokens are used.

        Raises:
            UserError: if the source does not exist or has no such keys.
        """
        corpus = {"max_mb": 20} if data == "hub" else {}
        given = self.corpus if self.corpus is not None else {}
        check(isinstance(given, dict), f"corpus={given}: set keys below corpus, as in corpus.…=")
        words = [f"corpus.{key}={as_word(value)}" for key, value in (corpus | given).items()]
        places = (f"tokens.tokenizer={tokenizer}", f"tokens.cache_dir={self.runs_dir}/.tokens")
        # A variant is required, but has no effect on the tokens.
        variant = plugins.names("soluscope.variants")[0]
        return load_config([f"variant={variant}", "train.lr=1", f"data={data}", *words, *places])


@dataclass(frozen=True)
class RemoveConfig:
    norms: Literal["mid", "all"] = "mid"
    """Norms whose per-token scale is removed. mid: the mid norm, in runs where it has one. all: ln1, ln2, ln_final
    and the mid norm, in all runs. Further training then replaces the scales by constants, norm by norm."""
    n_tokens: int = 10_000
    """Approximate number of tokens of the report split on which losses are measured."""
    n_fit_tokens: int = 20_000
    """Approximate number of tokens of the select split on which the gain and the readout are fitted. A quarter of
    its documents chooses the penalty of the refit."""
    fine_tune_tokens: int | None = None
    """Tokens of the further training, and of the same training of the unchanged model beside it. null: a tenth of
    the run's own. 0: no further training."""
    lr_share: float = 0.3
    """Peak learning rate of the further training, as a share of the run's."""
    n_loss_tokens: int = 50_000
    """Maximum number of tokens of each validation split on which the further trained models are compared with the
    study's arms. It must be as in 'soluscope probe'."""
    n_draws: int = 2000
    """Bootstrap resamples for each interval."""
    seed: int = 0
    """Seed of the bootstrap."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which the models run. auto: a GPU if torch finds one."""
    prepared: FilePath | None = None
    """Folder of a token cache to use. null: the study's copy of the held-out tokens."""
    wait: bool = False
    """true: wait while another process evaluates the study. false: refuse."""

    def __post_init__(self) -> None:
        check(self.n_fit_tokens >= 100, f"n_fit_tokens={self.n_fit_tokens} must be 100 or more")
        check(
            self.fine_tune_tokens is None or self.fine_tune_tokens >= 0,
            f"fine_tune_tokens={self.fine_tune_tokens} must be 0 or more",
        )
        check(
            self.norms != "all" or self.fine_tune_tokens != 0,
            "fine_tune_tokens=0, but norms=all removes the scales during further training: omit it",
        )
        check(self.lr_share > 0, f"lr_share={self.lr_share} must be above 0")
        self.evaluation  # noqa: B018 (it checks the other values)

    @property
    def evaluation(self) -> EvalConfig:
        """Return the settings that a removal shares with an evaluation."""
        return EvalConfig(
            n_tokens=self.n_tokens, n_draws=self.n_draws, seed=self.seed, device=self.device,
            prepared=self.prepared, wait=self.wait,
        )  # fmt: skip


@dataclass(frozen=True)
class NeuronsConfig:
    """Settings of `soluscope neurons`."""

    n_tokens: int = 1_000_000
    """Approximate number of held-out tokens to read, evenly spread over the report split; at most all of it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which the models run. auto: a GPU if torch finds one."""
    prepared: FilePath | None = None
    """Folder of a token cache to read. null: the study's copy of the held-out tokens."""

    def __post_init__(self) -> None:
        check(self.n_tokens >= 100, f"n_tokens={self.n_tokens} must be 100 or more")


@dataclass(frozen=True)
class PretrainedNeuronsConfig(NeuronsConfig):
    """Settings of `soluscope neurons` for a pretrained model."""

    revision: str | None = None
    """Branch, tag or commit of the model's repository. null: the main branch."""
    data: str | None = None
    """Source of the text, as in 'soluscope probe'."""
    corpus: AsWritten = None
    """Parameters of the source, as in training."""
    runs_dir: FilePath = "runs"
    """Folder in which the model's study is created. The study is named after the model."""

    def probing(self) -> PretrainedConfig:
        """Return the settings that create the model's run folder, as 'soluscope probe' does."""
        return PretrainedConfig(
            prepared=self.prepared, revision=self.revision, data=self.data, corpus=self.corpus,
            runs_dir=self.runs_dir,
        )  # fmt: skip


@dataclass(frozen=True)
class EditorConfig:
    """Settings of `soluscope neurons --serve`."""

    port: int = 0
    """Port of the page on this machine. 0: a free port."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which the models run. auto: a GPU if torch finds one."""

    def __post_init__(self) -> None:
        check(0 <= self.port <= 65535, f"port={self.port} must be from 0 to 65535")


@dataclass(frozen=True)
class ReportConfig:
    out: FilePath | None = None
    """Folder of the report, if you may not write to the study's folder. null: the study's folder."""
    figures: FilePath | None = None
    """New folder for the main figures as SVG and PNG. Needs kaleido (the extra soluscope[figures]) and Chrome or
    Chromium. null: none are written."""
    tables: FilePath | None = None
    """New folder for the tables as CSV and LaTeX, a methods paragraph and its references. null: none are
    written."""


# Keys that change results by rounding at most, so a run may be resumed with other values of them. Two of
# them set the path of the tokens; the study's data.json makes sure that its runs share their tokens.
_PLACES = ("study", "tag", "probes", "runs_dir", "wandb", "select_seeds", "tokens.cache_dir", "tokens.prepared",
           "train.rates", "train.tuned", "train.log_every", "train.checkpoint_every", "train.snapshots",
           "train.device",
           "train.threads", "train.compile", "train.devices", "train.nodes")  # fmt: skip


_LATER = {
    "train.init_from": None, "model.mlp_out_scale": 1.0, "train.entropy_penalty": 0.0, "model.norms": "live",
}  # fmt: skip
"""Settings that were added later, with their defaults, so that runs from before keep their ids."""


def _determining(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in flatten(values) if key not in _PLACES}
    for key, default in _LATER.items():
        if kept[key] == default:
            del kept[key]
    return kept


def determining(config: Config) -> dict[str, Any]:
    """Return the settings that affect a run's results, by dotted key."""
    return _determining(asdict(config))


def differences(a: Config, b: Config) -> list[str]:
    """Return `key=a's value there, b's value here` for each differing setting that affects the results."""
    left, right = _determining(asdict(a)), _determining(asdict(b))
    return [
        f"{key}={left.get(key)} there, {right.get(key)} here"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def rate_origin(config: Config) -> str:
    """Return why a run's learning rate cannot be taken for tuned; empty if it was tuned for these settings.

    The seed does not count. The text completes "The rate of this arm ...".
    """
    train = config.train
    of_variant = [arm for arm in train.rates if arm.split()[:1] == [config.variant]]
    with_this_rate = [arm for arm in of_variant if train.rates[arm] == train.lr]
    if not with_this_rate:
        return "was set by hand"
    if not {*of_variant} & {*train.tuned}:
        return f"is that of size={config.size}, where {config.variant} was not tuned"
    tuned = [arm.split()[1:] for arm in with_this_rate if arm in train.tuned]
    if not tuned:
        return "was set by hand"
    differing = min((_differing(config, words) for words in tuned), key=len)
    return f"was tuned with {'; '.join(differing)}" if differing else ""


def _differing(config: Config, words: Sequence[str]) -> list[str]:
    """Return the settings that determine a run's numbers and differ from its size's preset with these words."""
    preset = _preset(f"variant={config.variant}", f"size={config.size}", *words)
    here, there = (_determining(asdict(each)) for each in (config, preset))
    for values, each in ((here, config), (there, preset)):
        if hasattr(each.mid, "epsilon"):  # a default, an epsilon and a kappa may mean the same
            del values["mid.eps"]
            values["mid.kappa"] = float(f"{each.mid.dose(each.model.d_mlp):.4g}")
    return [
        f"{key}={there.get(key)}, here {here.get(key)}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and key not in ("seed", "size", "train.precision")
    ]


@cache
def _preset(*words: str) -> Config:
    """Return the configuration of these words alone, which many runs of a study are compared with."""
    return load_config(words)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`a.b.c`, value) pairs of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" != "train.rates":
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def configs_dir() -> Path:
    """Return configs/ as shipped in the package, or of the clone."""
    return shipped_dir("configs")


def shipped_dir(name: str) -> Path:
    """Return a folder that the wheel holds in the package and the clone holds at its top level."""
    shipped = Path(__file__).parent / name
    return shipped if shipped.is_dir() else Path(__file__).parents[2] / name


def load_config(arguments: Sequence[str]) -> Config:
    """Return a checked configuration from the words of the command line.

    Args:
        arguments: `key=value` overrides, and paths of YAML files (`configs/debug.yaml`), in any order.

    Raises:
        UserError: if a key, variant, size or source is unknown, a value has the wrong type, or values
            contradict each other.
    """
    return to_config(merge_config(arguments))


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn an error of OmegaConf, such as that of a ${…} that names no key, into a UserError."""
    try:
        yield
    except OmegaConfBaseException as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, UserError) else UserError(_one_line(error))) from error


def to_config(merged: DictConfig) -> Config:
    """Return the typed configuration, after checking its values against each other."""
    with _in_one_line():
        missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{missing[0]} has no value: set it, as in {missing[0]}=…")
    config: Config = _to_object(merged)
    for name in ("mid", "corpus"):
        check(
            getattr(config, name) is not None,
            f"{name}=null: set keys below {name} instead, as listed by --help",
        )
    if config.train.entropy_penalty:
        variant = plugins.pick("soluscope.variants", config.variant)
        check(
            variant.has_softmax(config.model.d_mlp, config.mid),
            f"train.entropy_penalty={config.train.entropy_penalty:g}, but variant {config.variant} has no softmax "
            "over neurons: set train.entropy_penalty=0, or choose a variant with SoLU",
        )
    return config


@_in_one_line()
def merge_config(arguments: Sequence[str]) -> DictConfig:
    """Merge and type the layers, without checking values against each other."""
    files, overrides = _split_arguments(arguments)
    overrides = _spell_out_arm(overrides)
    base_file = configs_dir() / "base.yaml"
    # The types of these keys are known only once the variant and the source are chosen.
    typed = [word for word in overrides if not re.match(r"(mid|corpus)\b", word)]
    chosen = _merge(
        OmegaConf.create({"variant": None}), *_layers(Config, [base_file, *files], typed)
    )
    groups = {group: chosen.get(group) for group in ("data", "size", "variant")}
    group_files = []
    for group, name in groups.items():
        if name in (None, "", "null", "???"):
            check(group == "variant", f"{group} has no value: set it, as in {group}=…")
            known = plugins.names("soluscope.variants")
            raise UserError(
                f"variant has no value: set it, as in variant={known[0]}. There are: "
                + ", ".join(known)
            )
        folder = configs_dir() / group
        plugins.check_name(group, str(name), sorted(path.stem for path in folder.glob("*.yaml")))
        group_files.append(folder / f"{name}.yaml")
    base, schema = _typed(groups["variant"], groups["data"])
    merged = _merge(base, *_layers(schema, [base_file, *group_files, *files], overrides))
    if merged.train.lr is None:
        rate = _rate_of(merged)
        check(rate is not None, f"size {merged.size!r} has no tuned rate for variant {merged.variant!r}: "
              "set train.lr, or add it to train.rates in configs/size/")  # fmt: skip
        with read_write(merged.train):
            merged.train.lr = rate
    return merged


def _rate_of(merged: DictConfig) -> float | None:
    """Return the rate in train.rates of the arm with most settings that `merged` has; None without an arm."""
    rates: dict[int, float] = {}
    for arm, rate in merged.train.rates.items():
        variant, settings = _settings_of(str(arm))
        if variant == merged.variant and all(
            OmegaConf.select(merged, key) == value for key, value in settings
        ):
            rates[len(settings)] = rate
    return rates[max(rates)] if rates else None


@cache
def _settings_of(arm: str) -> tuple[str, list[tuple[str, Any]]]:
    """Return the variant of an arm in train.rates, and its settings."""
    variant, *words = arm.split() or [""]
    settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    return variant, [*flatten(settings)]


def _typed(variant: str, data: str) -> tuple[DictConfig, dict[str, Any]]:
    """Return the defaults and the types of all keys, with the parameters of the chosen variant and source."""
    params = plugins.pick("soluscope.variants", variant).params
    corpus = plugins.pick("soluscope.data.sources", data).params
    types = field_types(Config) | {"mid": params, "corpus": corpus}
    return _structured(variant, data, params, corpus), types


@cache
def _structured(variant: str, data: str, params: type, corpus: type) -> DictConfig:
    """Return the typed defaults. A sweep asks for them once per job; merging copies them."""
    base: DictConfig = OmegaConf.structured(
        Config(variant=variant, data=data, mid=params(), corpus=corpus())
    )
    return base


def read_config(path: Path) -> Config:
    """Return the resolved configuration saved with a run.

    Raises:
        UserError: if the file is missing or truncated, or is not a run's configuration.
    """
    check(
        path.is_file(),
        f"no configuration at {path}: {path.parent} is not a run folder, or its run never started",
    )
    check(
        path.read_bytes().endswith(b"\n"),
        f"{path} is truncated: delete {path.parent} to train the run again",
    )
    saved = read_yaml(path, Config)
    for key in ("variant", "data"):
        check(
            isinstance(saved.get(key), str), f"{path} has no {key}: it is not a run's configuration"
        )
    try:
        base, schema = _typed(saved["variant"], saved["data"])
        return to_config(_merge(base, *_layers(schema, [path])))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def to_json(config: Config) -> str:
    """Return a configuration as one line of JSON, which `from_json` reads."""
    return json.dumps(asdict(config))


def from_json(text: str) -> Config:
    """Return the configuration that `to_json` has described."""
    values = json.loads(text)
    base, _ = _typed(values["variant"], values["data"])
    return to_config(_merge(base, OmegaConf.create(values)))


def load_typed(schema: type[T], arguments: Sequence[str], default_file: str | None = None) -> T:
    """Return a configuration without groups: the defaults of `schema` < configs/`default_file` < arguments."""
    files, overrides = _split_arguments(arguments)
    if default_file is not None:
        files.insert(0, configs_dir() / default_file)
    merged = _merge(OmegaConf.structured(schema), *_layers(schema, files, overrides))
    loaded: T = _to_object(merged)
    return loaded


def for_others(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run without the folders of this machine.

    Settings without effect elsewhere are left out: folders of runs and tokens, and the mode of wandb. Other
    absolute paths are the origin of a text, a gain or weights, and keep their last part.
    """
    _, schema = _typed(settings["variant"], settings["data"])
    result: dict[str, Any] = without_folders(settings, schema)
    tokens = {**result["tokens"]}
    for section, key in (
        (result, "runs_dir"),
        (result, "wandb"),
        (tokens, "cache_dir"),
        (tokens, "prepared"),
    ):
        section.pop(key, None)
    return result | {"tokens": tokens}


def load_evaluation(schema: type[T], arguments: Sequence[str]) -> T:
    """Return the configuration of an evaluation: the defaults of `schema` < configs/eval.yaml < arguments.

    Raises:
        UserError: as `load_config`, and for words that ask for no probe.
    """
    loaded = load_typed(schema, arguments, "eval.yaml")
    check(
        getattr(loaded, "probes", None) != [],
        "probes=[] names no probe: name some, as in probes=[engagement], or omit probes= for all",
    )
    return loaded


def _check_numbers(values: Any, key: str = "") -> None:
    """Refuse numbers that are not finite, and whole numbers that do not fit into 32 bits."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _check_numbers(value, key)
    elif isinstance(values, int):
        check(abs(values) <= MOST, f"{key}={values} must be between -{MOST} and {MOST}")
    elif isinstance(values, float) and key != "train.clip":  # train.clip=inf means no clipping
        check(math.isfinite(values), f"{key}={values} must be a finite number")


def to_yaml(config: Any) -> str:
    """Return a configuration, or settings as a mapping, as YAML with all values resolved."""
    values = dict(config) if isinstance(config, Mapping) else asdict(config)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def _split_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    files: list[Path] = []
    overrides: list[str] = []
    for word in arguments:
        if is_path(word) and word.endswith(YAML):
            files.append(Path(word))
        else:
            check("=" in word, f"{word!r} is neither key=value nor a .yaml file: see --help")
            overrides.append(word)
    return files, overrides


def _spell_out_arm(overrides: list[str]) -> list[str]:
    """Replace `arm="solu_ln mid.kappa=42"` by its parts: the variant, and words that also set the run's tag.

    With `arm`, one parameter of a sweep can list arms that differ in several keys; the keys may vary by arm.
    A tag= among the words replaces the tag that the words would give.
    """
    spelled: list[str] = []
    tags: list[str] = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key != "arm":
            spelled.append(word)
            continue
        variant, *parts = value.split() or [""]
        for part in parts:
            check(
                "=" in part,
                f"arm={value!r}: {part!r} is not key=value; give a variant and key=value words",
            )
        arm_words = [f"variant={variant}", *parts]
        for other in overrides:
            name = other.partition("=")[0]
            check(
                name == "tag" or name not in {part.partition("=")[0] for part in arm_words},
                f"{other!r} and arm={value!r} both set {name}: remove one of the two",
            )
        named = [part.removeprefix("tag=") for part in parts if part.startswith("tag=")]
        spelled += [part for part in arm_words if not part.startswith("tag=")]
        tags = named or [short_name(*part.split("=", 1)) for part in parts]
    if not tags:
        return spelled
    given = [word.partition("=")[2] for word in spelled if word.startswith("tag=")]
    rest = [word for word in spelled if not word.startswith("tag=")]
    return [*rest, "tag=" + "-".join([*tags, *(tag for tag in given[-1:] if tag)])]


def short_name(key: str, value: object) -> str:
    """Return the form of a setting in a run's name, such as `kappa0.42` for mid.kappa=0.42."""
    return f"{key.rpartition('.')[2]}{value}"


def _layers(schema: Any, files: Sequence[Path], overrides: Sequence[str] = ()) -> list[DictConfig]:
    """Return the content of YAML files, and of `key=value` words as the last layer."""
    words = OmegaConf.create()
    for word in overrides:
        key, _, text = word.partition("=")
        try:
            value = read_word(key, text, schema)
            only_references(value)
            OmegaConf.update(words, key, value)
        except (ValueError, OmegaConfBaseException) as error:
            raise UserError(f"cannot read {word!r}: {_one_line(error)}") from error
    return [*(_of_file(path, schema) for path in files), words]


def _of_file(path: Path, schema: Any) -> DictConfig:
    content = read_yaml(path, schema)
    try:
        only_references(content)
        return OmegaConf.create(content)
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(f"cannot read {path}: {_one_line(error)}") from error


def _check_containers(base: Any, layer: Any, prefix: str = "") -> None:
    """Refuse a value in the place of a section, and keys in the place of a list."""
    for name, value in layer.items_ex(resolve=False):
        key, node = f"{prefix}{name!s}", base._get_node(name, validate_access=False)
        if OmegaConf.is_dict(node) and OmegaConf.is_dict(value):
            _check_containers(node, value, f"{key}.")
        elif OmegaConf.is_dict(node) and value is not None:
            raise UserError(f"{key}={value}: set keys below {key}, as in {key}.…=; see --help")
        elif OmegaConf.is_list(node) and OmegaConf.is_dict(value):
            raise UserError(f"{key}={value}: give a list, as in {key}=[…]")


def _merge(base: DictConfig, *layers: DictConfig) -> DictConfig:
    for layer in layers:
        _check_containers(base, layer)
    try:
        merged = OmegaConf.merge(base, *layers)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        names = [name for name, _ in flatten(OmegaConf.to_container(base))]  # type: ignore[arg-type]
        known = sorted({*names, *(name.partition(".")[0] for name in names)})
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        section = key.partition(".")[0]
        hint = f" Did you mean {near[0]!r}?" if near and near[0] != section else ""
        owner = {"mid": "variant", "corpus": "data"}.get(section)
        if owner and section in base and OmegaConf.is_dict(base[section]):
            own = ", ".join(name for name in known if name.startswith(f"{section}."))
            hint += f" With {owner}={base[owner]} the keys below {section} are: {own or 'none'}."
        raise UserError(f"no key called {key!r}.{hint} --help lists all keys") from error
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(merged, DictConfig)
    return merged


def _to_object(merged: DictConfig) -> Any:
    with _in_one_line():
        config = OmegaConf.to_object(merged)
        _check_numbers(OmegaConf.to_container(merged, resolve=True))
        return config


def _one_line(error: Exception) -> str:
    """Return the key and the first line of OmegaConf's message, without the types that follow."""
    first = str(error).strip().splitlines()[0]
    key = getattr(error, "full_key", None)
    if "is not a ListConfig" in first:
        first = f"give a list, as in {key}=[…]"
    return f"{key}: {first}" if key else first
