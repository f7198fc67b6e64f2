"""Memory that a configuration will need, estimated before any of it is asked for, and its reuse.

The estimates are lower bounds: a configuration that is refused cannot run, and one that just passes may still
run out of memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from soluscope.config import Config
from soluscope.errors import UserError

STATE = 4 * 4
"""Bytes per parameter: the weight, its gradient and AdamW's two means, in fp32."""
OF_PROCESS = 1e9
"""Bytes of a process that has imported torch and holds no model; twice what was measured on Linux."""
OF_EVALUATION = 32
"""Bytes of memory of an evaluation per entry of W_out U; measured at SoLU-1L's shape (benchmarks/README.md)."""
MOST_PROCESSES = 1024
MOST_LOGITS = 2**28
"""Number of logits of a step that are in memory at once; the loss of more logits is computed in chunks."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    Each training step frees the same large buffers and allocates them again. By default glibc returns them to the
    system, which then fills thousands of new pages with zeros in each step (benchmarks/allocator.py).
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the highest that glibc accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def n_parameters(config: Config) -> int:
    """Return the number of parameters of a configuration's model, without those of its mid norm."""
    m, d_vocab = config.model, config.tokens.d_vocab
    attention = 4 * m.d_model**2 + 4 * m.d_model
    mlp = 2 * m.d_model * m.d_mlp + m.d_mlp + m.d_model
    block = attention + mlp + 4 * m.d_model  # with the weights and biases of two norms
    return (2 * d_vocab + m.ctx) * m.d_model + d_vocab + m.n_layers * block + 2 * m.d_model


def of_step(config: Config) -> int:
    """Return the least number of bytes of a training step's activations and logits in one process.

    Per token and block, the backward pass needs the inputs of the matrix products and of the norms, and two
    stages of the MLP. The numbers of the batch's rows are drawn as four columns of 8 bytes.
    """
    m, train = config.model, config.train
    rows = train.batch_size // (train.micro_batches * train.n_processes)
    block = 8 * m.d_model + 2 * m.d_mlp
    activations = rows * m.ctx * m.n_layers * block
    logits = min(rows * (m.ctx - 1) * config.tokens.d_vocab, MOST_LOGITS)
    return 4 * (activations + logits) + 4 * 8 * train.batch_size


def check_training(config: Config, available: float | None = None) -> None:
    """Refuse a configuration whose model or whose training step does not fit into memory.

    Args:
        config: the configuration.
        available: bytes of the device. None: those of this machine; then a configuration that may train on a
            GPU is not checked, because only torch knows that GPU.

    Raises:
        UserError: naming the settings to lower.
    """
    if available is None:
        if config.train.device != "cpu" and may_have_gpu():
            return
        available = of_machine()
    model, step = STATE * n_parameters(config), of_step(config)
    if model + step <= available:
        return
    lower = "train.batch_size or model.ctx, or raise train.micro_batches"
    if model > available:
        lower = "model.d_model, model.d_mlp, model.n_layers, model.ctx or tokens.d_vocab"
    raise UserError(
        f"{config.run_name} needs at least {_words(model)} for its model and {_words(step)} for a step, but "
        f"{_words(available)} are there: lower {lower}"
    )


def processes_that_fit(config: Config) -> int:
    """Return how many processes that train and evaluate `config` fit into this machine's memory, at least 1."""
    training = STATE * n_parameters(config) + of_step(config)
    evaluation = of_evaluation(config.model.d_mlp, config.tokens.d_vocab)
    return max(1, int(min(of_machine() / (OF_PROCESS + max(training, evaluation)), MOST_PROCESSES)))


def of_evaluation(d_mlp: int, d_vocab: int) -> float:
    """Return the bytes that the evaluation of a run needs in its process."""
    return OF_PROCESS + OF_EVALUATION * d_mlp * d_vocab


def check_draws(n_draws: int, n_documents: int) -> None:
    """Refuse bootstrap resamples that do not fit into memory: a weight of 8 bytes per draw and document.

    Raises:
        UserError: naming n_draws.
    """
    needed = 8 * n_draws * n_documents
    if needed > of_machine():
        raise UserError(
            f"n_draws={n_draws} needs at least {_words(needed)} for {n_documents:,} documents, but "
            f"{_words(of_machine())} are there: lower n_draws"
        )


def of_machine(root: Path = Path("/")) -> float:
    """Return the bytes of memory that this process may use: the machine's, or its cgroup's limit if that is lower.

    Returns:
        Infinity if the system does not tell.

    Args:
        root: folder that contains sys/.
    """
    found = [math.inf]
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups of version 2 and 1
        with suppress(OSError, ValueError):
            found.append(int((root / "sys/fs/cgroup" / name).read_text(encoding="utf8")))
    return min(each for each in found if each > 0)


def may_have_gpu() -> bool:
    """Return whether this machine has the device files of a GPU. No torch is loaded."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


def _words(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"
