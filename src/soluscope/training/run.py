"""Training of one model of one variant, with Lightning, such that runs with equal seeds are paired.

A batch depends only on (seed, step), and a tensor's initial values only on (seed, tensor name). So two
runs with equal seeds differ only in their variant, and a run that was killed resumes bit for bit as if it
had not been interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
from torch import nn

from soluscope import plugins
from soluscope.config import Config, differences
from soluscope.constant_norm import gain_of
from soluscope.data.cache import SPLITS, TokenCache, prepare, share_with_study
from soluscope.errors import Stopped, UserError
from soluscope.files import checksum, reason, write_text
from soluscope.memory import keep_freed_memory
from soluscope.model import LanguageModel
from soluscope.runs.folder import Run
from soluscope.runs.weights import (
    Facts,
    commit,
    first_misfit,
    lineage,
    load_checkpoint,
    save_model,
    versions,
)
from soluscope.training import snapshots
from soluscope.training.batches import Batches
from soluscope.training.callback import TrainingCallback, stops_held_back
from soluscope.training.device import check_memory, on_cuda, set_threads, with_precision
from soluscope.training.held_out import mean_loss
from soluscope.training.init_from import origin_of
from soluscope.training.module import TrainingModule
from soluscope.training.processes import (
    cluster_environment,
    first_process_first,
    is_lost,
    one_line_if_lost,
)
from soluscope.training.progress import NoProgress, progress_bars
from soluscope.training.wandb_run import Tracker, check_login, tracked
from soluscope.variants import check_variant

if TYPE_CHECKING:  # training does not require rich
    from rich.progress import Progress


def train(config: Config, progress: Progress | NoProgress | None = None) -> Path:
    """Train the model of `config` until it is finished. Resume an interrupted run; leave a finished run unchanged.

    If the run fails, failed.json in its folder contains the reason. If several processes train one model,
    each calls this function, but only the first process returns: the other processes exit.

    Returns:
        The run's folder.

    Raises:
        UserError: if the input is bad, the folder has a different configuration or is in use, or the loss
            diverges.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    check_memory(config)
    keep_freed_memory()
    config = with_precision(config)
    set_threads(config)
    run = Run(config.run_dir)
    with one_line_if_lost(config):
        trainer = new_trainer(config)
        with run.lock() if trainer.is_global_zero else nullcontext():
            state = _claim(run, config, trainer)
            if not trainer.is_global_zero:  # only the first process draws a bar and logs to wandb
                config, progress = replace(config, wandb="off"), NoProgress()
            if state != "done":
                check_login(config.wandb)
                try:
                    _train_claimed(run, config, state, trainer, progress)
                except Exception as error:
                    if not isinstance(error, Stopped) and not is_lost(error):
                        run.record_failure(error)
                    raise
    if not trainer.is_global_zero:
        sys.exit()
    return run.dir


def _train_claimed(
    run: Run,
    config: Config,
    state: str,
    trainer: lightning.Trainer,
    progress: Progress | NoProgress | None,
) -> None:
    """Train from `state` to the end of the run.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is saved.
    """
    check_variant(config.variant, config.mid, config.model.d_mlp)
    with first_process_first(trainer):
        cache = prepare(config)
    for split in SPLITS:
        cache.rows(split, config.model.ctx)  # refuse a ctx that is too long before training
    if trainer.is_global_zero:
        share_with_study(cache, config.study_dir)
    module = TrainingModule(config, cache)
    if state == "resume":
        _check_fits(run.checkpoint, module)
    bars = progress_bars() if progress is None else nullcontext(progress)
    with bars as shown, tracked(config) as tracker:
        callback = TrainingCallback(config, shown, tracker)
        trainer.callbacks.append(callback)
        with quiet_lightning(), stops_held_back():
            try:
                trainer.fit(
                    module,
                    datamodule=Batches(config, cache, trainer.global_rank),
                    ckpt_path=run.checkpoint if state == "resume" else None,
                    weights_only=True,
                )
            except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
                if state != "resume" or callback.has_begun:
                    raise
                raise UserError(
                    f"cannot resume from the checkpoint {run.checkpoint} ({reason(error)}): delete it to train "
                    "the run from step 0"
                ) from error
        if not trainer.is_global_zero:
            return
        if callback.stopped:
            raise KeyboardInterrupt
        _finish(run, config, cache, module.model, callback.seconds, tracker)


def new_trainer(config: Config) -> lightning.Trainer:
    """Return Lightning's trainer, connected to the other processes of the run, if any."""
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="cuda" if on_cuda(config) else "cpu",
            devices=config.train.devices,
            num_nodes=config.train.nodes,
            strategy="ddp" if config.train.n_processes > 1 else "auto",
            plugins=[cluster_environment(config.train)],
            use_distributed_sampler=False,  # Batches distributes the rows
            precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
            max_steps=config.train.steps,
            accumulate_grad_batches=config.train.micro_batches,
            gradient_clip_val=config.train.clip,
            logger=False,
            enable_checkpointing=False,  # TrainingCallback saves each checkpoint, then renames it
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=config.run_dir,
        )
        # Connect the processes here, because _claim needs the connection before fit would make it.
        trainer.strategy.setup_environment()
    return trainer


def _claim(run: Run, config: Config, trainer: lightning.Trainer) -> str:
    """Let the first process claim the run's folder, and return the folder's state in every process.

    Raises:
        UserError: from `Run.claim`, or if the processes were started with different configurations.
    """
    claimed = run.claim(config) if trainer.is_global_zero else ""
    state: str
    state, first_config = trainer.strategy.broadcast((claimed, config))
    differing = differences(first_config, config)
    if differing:
        raise UserError(
            f"the first process was started with a different configuration ({differing[0]}): start all "
            "processes with the same command"
        )
    return state


def _finish(
    run: Run,
    config: Config,
    cache: TokenCache,
    model: LanguageModel,
    seconds: float,
    tracker: Tracker,
) -> None:
    """Save the final weights, the facts, and the losses on both validation splits.

    Raises:
        UserError: if a loss is not finite.
    """
    facts = facts_of(config, cache, model)
    save_model(run.dir, model, facts)
    losses = {
        f"{split}_loss": mean_loss(model, cache, split, config.model.ctx, config.train.val_tokens)
        for split in ("select", "report")
    }
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise UserError(
            f"{config.run_name} ended with a report loss of {losses['report_loss']} and a select loss of "
            f"{losses['select_loss']}: lower train.lr, now {config.train.lr:g}, and delete {run.dir}"
        )
    n_rows = len(cache.rows("train", config.model.ctx))
    done = losses | {
        "steps": facts.steps, "tokens": facts.tokens, "seconds": round(seconds, 1),
        "weights_bytes": run.weights.stat().st_size, "weights_sha256": checksum(run.weights),
        "epochs": round(config.train.steps * config.train.batch_size / n_rows, 3),
    }  # fmt: skip
    if kept := snapshots.checksums(run, config.train):
        done["snapshots"] = kept
    tracker.finish(done, asdict(facts))
    write_text(run.dir / "done.json", json.dumps(done) + "\n")


def facts_of(config: Config, cache: TokenCache, model: LanguageModel) -> Facts:
    """Return the facts about the model, which model.json contains."""
    norm = model.mlp(0).ln
    assert config.train.lr is not None
    return Facts(
        run=config.run_name, arm=config.arm, variant=config.variant, study=config.study,
        seed=config.seed, d_model=config.model.d_model, n_heads=config.model.n_heads,
        d_mlp=config.model.d_mlp, n_layers=config.model.n_layers, ctx=config.model.ctx,
        d_vocab=cache.meta["d_vocab"],
        hooked_act_fn=plugins.pick("soluscope.variants", config.variant).hooked_act_fn,
        ln_eps=config.model.ln_eps, mid_norm=type(norm).__name__ if norm is not None else None,
        eps=norm.eps if norm is not None else None,
        gain=gain_of(norm),
        bos=cache.meta["bos"], eos=cache.meta["eos"], pad=cache.meta["pad"],
        tokenizer_hash=cache.meta["tokenizer_hash"], lr=config.train.lr, steps=config.train.steps,
        tokens=config.train.steps * config.train.batch_size * config.model.ctx,
        precision=config.train.precision, device="cuda" if on_cuda(config) else "cpu",
        config=config.hash, commit=commit(), versions=versions(), **lineage(config.variant),
        init_from=origin_of(config), mlp_out_scale=float(model.mlp(0).out_scale),
        entropy_penalty=config.train.entropy_penalty,
    )  # fmt: skip


def _check_fits(path: Path, module: nn.Module) -> None:
    """Refuse a checkpoint with tensors of different shapes, before any file is overwritten."""
    misfit = first_misfit(module.state_dict(), load_checkpoint(path).get("state_dict", {}))
    if misfit:
        name, here, there = misfit
        raise UserError(
            f"the checkpoint {path} does not fit this configuration: {name} is {there} in the checkpoint "
            f"and {here} here; delete the checkpoint to train from step 0, or set tag= or study="
        )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about devices and loggers, which do not concern the user."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
