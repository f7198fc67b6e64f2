"""Batches: the rows of the train split for each step, which depend only on (seed, step)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from torch import Tensor

from soluscope.config import Config
from soluscope.data.cache import Rows, TokenCache
from soluscope.training.device import on_cuda
from soluscope.training.init_from import rows_before

if TYPE_CHECKING:  # needed by annotations only
    from numpy.typing import NDArray

STEPS_AHEAD = 64
"""Number of steps whose rows are drawn at once, since one call costs about the same for many rows as for few."""
ROWS_AHEAD = 2**20
"""Number of rows above which fewer steps are drawn at once, to limit memory."""


def batch_rows(seed: int, step: int, batch_size: int, n_rows: int) -> NDArray[np.int64]:
    """Return the rows of a step's batch. Each row comes once per epoch, in an order set by (seed, epoch).

    The result depends only on the arguments. Memory is constant, since the order is a keyed permutation,
    evaluated at the requested positions and never stored.
    """
    return rows_in_order(seed, step * batch_size, batch_size, n_rows)


def rows_in_order(seed: int, start: int, count: int, n_rows: int) -> NDArray[np.int64]:
    """Return `count` rows of the endless order that `seed` sets, beginning at position `start`."""
    epoch, position = np.divmod(start + np.arange(count, dtype=np.int64), n_rows)
    return _permute(position.astype(np.uint64), n_rows, seed, epoch.astype(np.uint64))


def _permute(
    position: NDArray[np.uint64], n: int, seed: int, epoch: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Permute positions in range(n) with the key (seed, epoch).

    Four Feistel rounds permute a range of the next power of 4; a result outside range(n) is permuted again
    until it is inside.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    outside = np.ones(len(position), dtype=bool)
    while outside.any():
        left, right = position[outside] >> half, position[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, seed, epoch[outside], turn) & mask)
        position[outside] = left << half | right
        outside = position >= n
    return position.astype(np.int64)


def _mix(value: NDArray[np.uint64], *keys: Any) -> NDArray[np.uint64]:
    """Return a well-mixed 64-bit hash of integers, modulo 2^64 (splitmix64's finaliser, once per key)."""
    for key in keys:
        offset = np.asarray(key, dtype=np.uint64) + np.array([0x9E3779B97F4A7C15], np.uint64)
        value = (value ^ offset) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value


class Batches(lightning.LightningDataModule):
    """Rows of the train split, beginning at the step that the trainer has reached.

    With n processes, process r gets rows r, r + n, ... of each micro-batch.
    """

    def __init__(self, config: Config, cache: TokenCache, rank: int = 0) -> None:
        super().__init__()
        self.config, self.cache = config, cache
        self.share = slice(rank, None, config.train.n_processes)
        self.rows = cache.rows("train", config.model.ctx)
        self.rows_before = rows_before(config)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            _RowDataset(self.rows),
            sampler=_FromGlobalStep(self),
            batch_size=None,
            pin_memory=on_cuda(self.config),
        )


class _FromGlobalStep:
    """Endless sampler of the rows of one micro-batch after another.

    The first step is read from the trainer when iteration begins, since a checkpoint may be loaded before.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        config, n_rows = self.batches.config, len(self.batches.rows)
        assert self.batches.trainer is not None
        size = config.train.batch_size // config.train.micro_batches
        n_steps = max(1, min(STEPS_AHEAD, ROWS_AHEAD // config.train.batch_size))
        ahead = config.train.batch_size * n_steps
        first = self.batches.trainer.global_step * config.train.batch_size
        first += self.batches.rows_before
        for start in itertools.count(first, ahead):
            rows = rows_in_order(config.seed, start, ahead, n_rows)
            yield from rows.reshape(-1, size)[:, self.batches.share]


class _RowDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.rows[indices])
