"""Further training of a trained model with less normalisation, and of the same model unchanged beside it.

Both models begin with the trained weights and see the same batches, at the same learning rates. So their difference
is the worth of the per-token gain, or of all per-token scales, after further training, without the effect of the
training itself.

Source: protocol.md section 7, P7.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from soluscope import plugins
from soluscope.config import CONSTANT, Config
from soluscope.runs.folder import Run

MOST_WARMUP = 0.1
"""Largest share of the further training in which the rate rises."""


def study_of(run: Run) -> str:
    """Return the name of the study in which a run's model is trained further."""
    return f"{run.dir.resolve().parent.name}-removed"


def steps_for(run: Run, n_tokens: int | None) -> int:
    """Return the number of optimizer steps for so many tokens; None: a tenth of the run's own steps."""
    train = run.config.train
    if n_tokens is None:
        return max(1, train.steps // 10)
    return max(1, round(n_tokens / (train.batch_size * run.config.model.ctx)))


def kept(run: Run, steps: int, lr_share: float) -> Config:
    """Return the configuration of the further training of a finished run as it is.

    Args:
        run: a finished run.
        steps: optimizer steps.
        lr_share: peak learning rate, as a share of the run's.
    """
    config, here = run.config, run.dir.resolve()
    assert config.train.lr is not None
    further = replace(
        config.train, init_from=str(here), steps=steps, lr=lr_share * config.train.lr,
        lr_rest=lr_share * config.train.lr_rest, snapshots=0,
        warmup_steps=min(config.train.warmup_steps, int(MOST_WARMUP * steps)),
    )  # fmt: skip
    tag = f"of-{run.facts.arm}-{steps}-steps-{lr_share:g}"
    return replace(
        config, study=study_of(run), runs_dir=str(here.parent.parent), train=further, wandb="off",
        tag=tag, select_seeds=[],
    )  # fmt: skip


def with_gain(run: Run, gain: float, steps: int, lr_share: float) -> Config:
    """Return the same with one gain for all tokens; the run's variant has a static twin."""
    config = kept(run, steps, lr_share)
    params = plugins.pick("soluscope.variants", run.facts.twin).params
    return replace(
        config,
        variant=run.facts.twin,
        mid=_static(params, config.mid, gain),
        tag=f"{config.tag}-gain{gain:g}",
    )


def without_norms(run: Run, steps: int, lr_share: float) -> Config:
    """Return the same, with all per-token scales replaced by constants on the way."""
    config = kept(run, steps, lr_share)
    return replace(
        config,
        model=replace(config.model, norms=CONSTANT),
        train=replace(config.train, compile=False),  # the norms change from step to step
        tag=f"{config.tag}-no-norms",
    )


def _static(params: type, of: Any, gain: float) -> Any:
    """Return the twin's parameters: the constant gain, and all parameters that both norms have."""
    common = {
        each.name: getattr(of, each.name) for each in fields(params) if hasattr(of, each.name)
    }
    return params(**common | {"gain": gain})


def with_one_gain(run: Run, finished: Iterable[Run]) -> list[Run]:
    """Return the runs with the seed and size of `run` that had one gain from the start: its static twins.

    Where the gain of some was matched to the run's norm before training, only these count.
    """
    twins = [
        other
        for other in finished
        if other.config_file.is_file()
        and (other.config.variant, other.config.seed) == (run.facts.twin, run.config.seed)
        and other.config.model == run.config.model
        and other.config.init_dir is None
    ]
    eps = run.facts.eps
    matched = [
        other
        for other in twins
        if other.config.mid.gain == "init" and other.config.mid.epsilon(run.facts.d_mlp) == eps
    ]
    return matched or twins
