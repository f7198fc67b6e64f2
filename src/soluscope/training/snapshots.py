"""Weights that are kept at log-spaced steps of training, for its dynamics.

A snapshot is written before the checkpoint of its step. So a run that resumes from any checkpoint has all earlier
snapshots, and writes the later ones again, with the same bytes.
"""

from __future__ import annotations

from soluscope.config import TrainConfig
from soluscope.files import checksum
from soluscope.runs.folder import Run


def steps(train: TrainConfig) -> list[int]:
    """Return the steps after which weights are kept, about equally far apart in logarithms, without the last step.

    Returns:
        Up to `train.snapshots` steps. There are fewer where neighbours would be the same whole number.
    """
    n = train.snapshots
    spaced = {round(train.steps ** (i / n)) for i in range(n)}
    return sorted(spaced - {train.steps})


def checksums(run: Run, train: TrainConfig) -> dict[str, str]:
    """Return the checksum of each snapshot in the run's folder, by its step."""
    paths = {step: run.snapshot(step) for step in steps(train)}
    return {str(step): checksum(path) for step, path in paths.items() if path.is_file()}
