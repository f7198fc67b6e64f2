"""The hardware settings of training: GPU or CPU, precision, and number of threads."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from soluscope.config import Config
from soluscope.cores import n_cores, omp_threads
from soluscope.errors import UserError
from soluscope.memory import check_training, of_machine
from soluscope.runs.folder import Run
from soluscope.training.processes import launcher


def with_precision(config: Config) -> Config:
    """Return `config` with train.precision=auto resolved, so that the saved configuration states the precision.

    If this run, or else another run of its study, has a checkpoint, its precision is used: runs that are
    compared must not differ in precision.
    """
    if config.train.precision != "auto":
        return config
    this_run = Run(config.run_dir)
    begun = [Run(path.parent) for path in sorted(config.study_dir.glob("*/config.yaml"))]
    for run in (this_run, *begun):
        if not run.checkpoint.is_file():
            continue
        with suppress(UserError):  # the folder may have been copied incompletely
            precision = run.config.train.precision
            return replace(config, train=replace(config.train, precision=precision))
    precision = "bf16" if on_cuda(config) else "fp32"
    return replace(config, train=replace(config.train, precision=precision))


def check_memory(config: Config) -> None:
    """Refuse a configuration that does not fit into the memory of the device on which it will be trained.

    Raises:
        UserError: naming the settings to lower.
    """
    gpu = torch.cuda.get_device_properties(0).total_memory if on_cuda(config) else None
    check_training(config, gpu or of_machine())


def set_threads(config: Config) -> None:
    """Set the number of CPU threads of this process: train.threads, OMP_NUM_THREADS, or its share of the cores."""
    share = max(1, n_cores() // config.train.devices)
    torch.set_num_threads(config.train.threads or _asked_threads() or share)


def _asked_threads() -> int | None:
    """Return the number in OMP_NUM_THREADS; None without a number.

    torchrun sets the variable to 1 unless it is set, so under torchrun 1 is not a request.
    """
    n_threads = omp_threads()
    return None if n_threads == 1 and launcher() == "torchrun" else n_threads


def on_cuda(config: Config) -> bool:
    """Return whether `config` is trained on GPUs here.

    Raises:
        UserError: if `config` requests more GPUs than torch finds here.
    """
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch finds no GPU here: set train.device=cpu")
    n_gpus = 0 if config.train.device == "cpu" else torch.cuda.device_count()
    if 0 < n_gpus < config.train.devices:
        raise UserError(
            f"train.devices={config.train.devices}, but torch finds {n_gpus} GPUs here: "
            f"set train.devices={n_gpus}, or make all GPUs of the node visible to each process"
        )
    return n_gpus > 0
