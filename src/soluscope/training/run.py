"""Training: one model of one variant, with Lightning, so that runs of equal seed are paired.

A batch is a function of (seed, step) alone, and initial values of (seed, tensor name) alone: two
variants with one seed differ in their variant and in nothing else, and a run that was killed goes on
bit for bit as if it had not been.

Several processes (train.devices, train.nodes) share the rows of each batch: train.batch_size is of all of
them together, so that their number moves no loss beyond rounding.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from soluscope import plugins
from soluscope.config import Config, read_config
from soluscope.data.cache import SPLITS, Rows, Split, TokenCache, prepare, share_with_study
from soluscope.data.streams import evenly_spaced
from soluscope.errors import Stopped, UserError
from soluscope.files import replacing, write_text
from soluscope.model import LanguageModel, Record
from soluscope.norms import StaticNorm, gain_matching_rms
from soluscope.runs.folder import last_checkpoint, lock, record_failure
from soluscope.runs.weights import (
    Facts,
    build_model,
    claim,
    commit,
    lineage,
    load_checkpoint,
    load_model,
    save_model,
    versions,
)  # fmt: skip
from soluscope.training import processes
from soluscope.training.processes import Place
from soluscope.training.tracking import Tracker, check_login, tracked
from soluscope.variants import check_variant

if TYPE_CHECKING:  # a bare machine trains without them
    from jaxtyping import Int
    from numpy.typing import NDArray
    from rich.progress import Progress

INIT_TOKENS = 8192
"""Tokens, about, on which a static gain is measured: training's first ones, or a finished run's."""
STEPS_AHEAD = 64
"""Steps whose rows are drawn at once: a call costs as much for many as for few."""
DIVERGED_ABOVE = 2.0
"""A loss above this many times ln(d_vocab), twice a uniform guess's, counts as diverged."""


def train(config: Config, progress: Progress | NoProgress | None = None) -> Path:
    """Train the model of `config` to its end, resuming what is there; a finished run is left alone.

    What makes it fail is left in its folder, as failed.json. With several processes only the first one
    returns: the others end here, since what comes after training is not theirs to do again.

    Returns:
        The run's folder.

    Raises:
        UserError: bad input, a folder of another configuration or in use, a diverged loss.
    """
    config = _with_precision(config)
    _set_threads(config)
    here = processes.place(config)
    if here.rank > 0:
        help_to_train(config)
    with _others_dismissed(config, here), lock(config.run_dir):
        state = claim(config)
        if state != "done":
            check_login(config.wandb)
            try:
                _train_first(config, state, here, progress)
            except Stopped:
                raise
            except Exception as error:
                record_failure(config.run_dir, error)
                raise
    return config.run_dir


def _train_first(
    config: Config, state: str, here: Place, progress: Progress | NoProgress | None
) -> None:
    """The first process's part, and with one process all of it."""
    check_variant(config.variant, config.mid, config.model.d_mlp)
    cache = prepare(config)
    for split in SPLITS:
        cache.rows(split, config.model.ctx)  # refuse a ctx that is too long before training
    share_with_study(cache, config.study_dir)
    module = TrainingModule(config, cache)
    if state == "resume":
        _check_fits(last_checkpoint(config.run_dir), module)
    own = progress_bars() if progress is None else nullcontext(progress)
    with own as bars, tracked(config) as tracker:
        folder = RunFolder(config, bars, tracker)
        try:
            with processes.others(config, here), _trainer(config, here, folder) as trainer:
                here.met = True
                _meet(trainer, state)
                _fit(config, cache, module, state, trainer)
        except RuntimeError as error:
            if processes.is_lost(error):
                raise processes.lost(config) from error
            raise
        _finish(config, cache, module.model, folder.seconds, tracker)


def help_to_train(config: Config) -> NoReturn:
    """What every process but the first does: its share of the rows, and nothing else. Ends the process.

    Where the first one knows what happened it is silent, and has succeeded; it speaks of what is its own.
    """
    _set_threads(config)
    here = processes.place(config)
    folder = RunFolder(config, NoProgress(), writes=False)
    try:
        with processes.others(config, here), _trainer(config, here, folder) as trainer:
            state = _meet(trainer)
            if state != "done":
                cache = prepare(config)
                _fit(config, cache, TrainingModule(config, cache), state, trainer)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not processes.is_lost(error):
            raise
    sys.exit(0)


@contextmanager
def _others_dismissed(config: Config, here: Place) -> Iterator[None]:
    """Processes that wait for the first one's word are told where there is nothing to do, or no way to."""

    def dismiss() -> None:
        if here.met or not here.started:
            return
        soon = timedelta(minutes=1)
        with (
            suppress(RuntimeError),  # who does not come needs no word
            processes.others(config, here),
            _trainer(config, here, timeout=soon) as trainer,
        ):
            _meet(trainer, "done")

    try:
        yield
    except Exception:
        dismiss()
        raise
    dismiss()


@contextmanager
def _trainer(
    config: Config, here: Place, *callbacks: RunFolder, timeout: timedelta = timedelta(minutes=30)
) -> Iterator[Any]:
    """Lightning's trainer, which leaves the other processes at the end: it may meet others in a next run.

    Args:
        config: what it trains.
        here: this process.
        callbacks: what is called at each step.
        timeout: how long one process waits for the others.
    """
    with _quiet():
        trainer = lightning.Trainer(
            accelerator="cuda" if _on_cuda(config) else "cpu",
            devices=config.train.devices,
            num_nodes=config.train.nodes,
            strategy=DDPStrategy(timeout=timeout) if config.train.n_processes > 1 else "auto",
            plugins=[here.environment],
            use_distributed_sampler=False,  # Batches shares out the rows
            precision="bf16-mixed" if config.train.precision == "bf16" else "32-true",
            max_steps=config.train.steps,
            accumulate_grad_batches=config.train.micro_batches,
            gradient_clip_val=config.train.clip,
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,  # RunFolder saves beside and renames
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=config.run_dir,
        )
        try:
            yield trainer
        finally:
            if config.train.n_processes > 1 and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _meet(trainer: Any, state: str = "") -> str:
    """Wait until all processes are there; what is left to do, as the first one says."""
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()
    told: str = trainer.strategy.broadcast(state)
    return told


def _fit(
    config: Config, cache: TokenCache, module: TrainingModule, state: str, trainer: Any
) -> None:
    resume = last_checkpoint(config.run_dir) if state == "resume" else None
    batches = Batches(config, cache, trainer.global_rank)
    with processes.stopping_held_back():
        try:
            trainer.fit(module, datamodule=batches, ckpt_path=resume, weights_only=True)
        except SystemExit as stop:  # what SIGTERM and Ctrl-C become, once all is saved
            raise KeyboardInterrupt from stop


def _finish(
    config: Config, cache: TokenCache, model: LanguageModel, seconds: float, tracker: Tracker
) -> None:
    facts = facts_of(config, cache, model)
    save_model(config.run_dir, model, facts)
    losses = {
        f"{split}_loss": mean_loss(model, cache, split, config.model.ctx, config.train.val_tokens)
        for split in ("select", "report")
    }
    if not all(math.isfinite(loss) for loss in losses.values()):
        raise UserError(
            f"{config.run_name} ended with a loss of {losses['report_loss']}: lower train.lr, now "
            f"{config.train.lr:g}, and delete {config.run_dir}"
        )
    n_rows = len(cache.rows("train", config.model.ctx))
    weights = config.run_dir / "model.safetensors"
    done = losses | {
        "steps": facts.steps, "tokens": facts.tokens, "seconds": round(seconds, 1),
        "weights_bytes": weights.stat().st_size,
        "epochs": round(config.train.steps * config.train.batch_size / n_rows, 3),
    }  # fmt: skip
    tracker.finish(done, asdict(facts))
    write_text(config.run_dir / "done.json", json.dumps(done) + "\n")


def facts_of(config: Config, cache: TokenCache, model: LanguageModel) -> Facts:
    """What model.json says."""
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
        gain=float(norm.gain) if isinstance(norm, StaticNorm) else None,
        bos=cache.meta["bos"], eos=cache.meta["eos"], pad=cache.meta["pad"],
        tokenizer_hash=cache.meta["tokenizer_hash"], lr=config.train.lr, steps=config.train.steps,
        tokens=config.train.steps * config.train.batch_size * config.model.ctx,
        precision=config.train.precision, device="cuda" if _on_cuda(config) else "cpu",
        config=config.hash, commit=commit(), versions=versions(), **lineage(config.variant),
    )  # fmt: skip


@torch.no_grad()
def mean_loss(
    model: LanguageModel, cache: TokenCache, split: Split, ctx: int, max_tokens: int
) -> float:
    """Mean cross-entropy in nats a token over rows spread evenly over a split; no BOS targets."""
    rows, bos = cache.rows(split, ctx), cache.meta["bos"]
    total, count = 0.0, 0
    for chosen in np.array_split(
        evenly_spaced(len(rows), max_tokens // ctx), max(1, max_tokens // ctx // 16)
    ):
        tokens = torch.from_numpy(rows[chosen])
        losses = model.loss(tokens.to(model.unembed.b_U.device), bos, reduction="none")
        total += float(losses.double().sum())
        count += int((tokens[:, 1:] != bos).sum())
    return total / count


class TrainingModule(lightning.LightningModule):
    """Loss, parameter groups and schedule of the SoLU-1L recipe."""

    def __init__(self, config: Config, cache: TokenCache) -> None:
        super().__init__()
        self.config = config
        self.bos: int = cache.meta["bos"]
        self.model = build_model(config, cache.meta["d_vocab"])
        set_gain(self.model, config, cache)
        self.grad_norm = torch.tensor(math.nan)
        compiled = _on_cuda(config) if config.train.compile is None else config.train.compile
        self.loss = torch.compile(self.model.loss) if compiled else self.model.loss

    def training_step(self, tokens: Int[Tensor, "batch pos"], index: int) -> Tensor:
        return self.loss(tokens, self.bos)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters(), self.config.train.clip)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.config),
            betas=(self.config.train.beta1, self.config.train.beta2),
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate(step, self.config)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def parameter_groups(model: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """Matrices of the blocks; unembedding; the rest. Source: design.md, SoLU-1L's recipe.

    Gains are kept out of weight decay: decay would move the static arms' scale (science.md 12.7).
    """
    matrices, unembedding, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name == "unembed.W_U":
            unembedding.append(parameter)
        elif name.startswith("blocks.") and ".W_" in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    train = config.train
    return [
        {"params": matrices, "lr": train.lr, "weight_decay": train.weight_decay},
        {"params": unembedding, "lr": train.lr_rest, "weight_decay": train.weight_decay},
        {"params": rest, "lr": train.lr_rest, "weight_decay": 0.0},
    ]


def rate(step: int, config: Config) -> float:
    """Share of the peak learning rate at an optimizer step, counted from 0."""
    train = config.train
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.final_lr_share + (1 - train.final_lr_share) * cosine


# --- batches --------------------------------------------------------------------------------------


def batch_rows(seed: int, step: int, batch_size: int, n_rows: int) -> NDArray[np.int64]:
    """Which rows make up a step's batch: each row once an epoch, in an order drawn by (seed, epoch).

    A function of its arguments alone, in constant memory: the order is a keyed permutation that is
    evaluated where it is needed, never stored.
    """
    return rows_in_order(seed, step * batch_size, batch_size, n_rows)


def rows_in_order(seed: int, start: int, count: int, n_rows: int) -> NDArray[np.int64]:
    """`count` rows of the endless order of `seed`, from place `start` of it."""
    epoch, place = np.divmod(start + np.arange(count, dtype=np.int64), n_rows)
    return _permute(place.astype(np.uint64), n_rows, seed, epoch.astype(np.uint64))


def _permute(
    place: NDArray[np.uint64], n: int, seed: int, epoch: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """A permutation of range(n) by (seed, epoch): four Feistel rounds, walked until inside it."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    outside = np.ones(len(place), dtype=bool)
    while outside.any():
        left, right = place[outside] >> half, place[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, seed, epoch[outside], turn) & mask)
        place[outside] = left << half | right
        outside = place >= n
    return place.astype(np.int64)


def _mix(value: NDArray[np.uint64], *keys: Any) -> NDArray[np.uint64]:
    """A well-mixed 64-bit hash of integers, modulo 2^64 (splitmix64's finaliser, once a key)."""
    for key in keys:
        offset = np.asarray(key, dtype=np.uint64) + np.array([0x9E3779B97F4A7C15], np.uint64)
        value = (value ^ offset) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
        value = value ^ (value >> np.uint64(31))
    return value


class Batches(lightning.LightningDataModule):
    """Rows of the train split, from the step that the trainer has reached.

    Of n processes, process r takes rows r, r + n, ... of each micro-batch.
    """

    def __init__(self, config: Config, cache: TokenCache, rank: int = 0) -> None:
        super().__init__()
        self.config = config
        self.share = slice(rank, None, config.train.n_processes)
        self.rows = cache.rows("train", config.model.ctx)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(
            _RowDataset(self.rows),
            sampler=_FromGlobalStep(self),
            batch_size=None,
            pin_memory=_on_cuda(self.config),
        )


class _FromGlobalStep:
    """Rows of micro-batch after micro-batch, without end; where to begin is asked when it begins."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        config, n_rows = self.batches.config, len(self.batches.rows)
        assert self.batches.trainer is not None
        size = config.train.batch_size // config.train.micro_batches
        ahead = config.train.batch_size * STEPS_AHEAD
        first = self.batches.trainer.global_step * config.train.batch_size
        for start in itertools.count(first, ahead):
            rows = rows_in_order(config.seed, start, ahead, n_rows)
            yield from rows.reshape(-1, size)[:, self.batches.share]


class _RowDataset(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(self.rows[indices])


# --- static gains ---------------------------------------------------------------------------------


def set_gain(model: LanguageModel, config: Config, cache: TokenCache) -> None:
    """Give each static mid norm its constant: a number, a per-token norm's rms at init, or a run's mean gain.

    Source: science.md section 3, its rows with a constant gain.
    """
    for index in range(config.model.n_layers):
        norm = model.mlp(index).ln
        if not isinstance(norm, StaticNorm):
            continue
        gain = config.mid.gain
        if isinstance(gain, str) and gain == "init":
            mid = _first_rows(model, config, cache)[f"blocks.{index}.mlp.hook_mid"]
            content = mid[:, 1:].flatten(0, 1)  # [token d_mlp], BOS left out
            gain = gain_matching_rms(norm, content, config.mid.epsilon(config.model.d_mlp))
        elif isinstance(gain, str):
            gain = mean_gain(Path(gain.format(seed=config.seed)), index, cache)
        norm.gain.fill_(gain)


@torch.no_grad()
def _first_rows(model: LanguageModel, config: Config, cache: TokenCache) -> Record:
    rows = cache.rows("train", config.model.ctx)
    n_rows = max(1, INIT_TOKENS // config.model.ctx)
    first = batch_rows(config.seed, 0, n_rows, len(rows))
    record: Record = {}
    model.residual(torch.from_numpy(rows[first]), record)
    return record


@torch.no_grad()
def mean_gain(run_dir: Path, layer: int, cache: TokenCache) -> float:
    """exp(mean log gain) of a finished run's per-token mid norm on the select split, BOS left out.

    The report split is left alone: a gain chosen on it would be chosen on what it is judged by.

    Raises:
        UserError: if the run has no per-token scale, or another tokenizer.
    """
    model, facts = load_model(run_dir)
    norm = model.mlp(layer).ln
    if norm is None or norm.eps is None:
        raise UserError(
            f"mid.gain={run_dir} is of {facts.variant}, which has no per-token gain to take the mean of: "
            "name a run of a variant that has"
        )
    if facts.tokenizer_hash != cache.meta["tokenizer_hash"]:
        raise UserError(f"mid.gain={run_dir} was trained with another tokenizer than this run's")
    rows = cache.rows("select", facts.ctx)
    record: Record = {}
    model.residual(
        torch.from_numpy(rows[evenly_spaced(len(rows), INIT_TOKENS // facts.ctx)]), record
    )
    scale = record[f"blocks.{layer}.mlp.ln.hook_scale"][:, 1:]  # [row pos 1], BOS left out
    return float(scale.double().log().mean().neg().exp())


# --- what a run leaves behind ---------------------------------------------------------------------


class RunFolder(lightning.Callback):
    """Progress, metrics.jsonl, checkpoints, and the check that the loss is a loss.

    Each process has one, since all take part in checks and checkpoints; only the first one's writes.
    """

    def __init__(
        self,
        config: Config,
        progress: Progress | NoProgress,
        tracker: Tracker | None = None,
        writes: bool = True,
    ) -> None:
        self.config = config
        self.tracker = tracker or Tracker()
        self.writes = writes
        self.stop = processes.Stop()
        self.progress = progress
        self.bar = progress.add_task(config.run_name, total=config.train.steps, loss="", speed="")
        self.part: Tensor | float = 0.0
        self.losses: list[tuple[int, Tensor]] = []
        """Step, and [loss, gradient norm], of the steps since the last check."""
        self.saved_step = -1
        self.seconds = 0.0

    @property
    def checkpoint(self) -> Path:
        return last_checkpoint(self.config.run_dir)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.began = self.logged = time.perf_counter()
        self.logged_step = trainer.global_step
        self.saved_step = trainer.global_step if trainer.global_step else -1
        self.stop.listen()
        if trainer.world_size > 1:
            _set_threads(self.config)  # Lightning has set its own
        self.metrics = self.config.run_dir / "metrics.jsonl"
        if self.writes:
            rows = _lines(self.metrics)
            kept = [line for line in rows if json.loads(line)["step"] <= trainer.global_step]
            write_text(self.metrics, "".join(line + "\n" for line in kept))
            self.tracker.catch_up([json.loads(line) for line in kept])
        self.progress.update(self.bar, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.part = self.part + outputs["loss"].detach()  # Lightning has divided it by their number
        if (index + 1) % self.config.train.micro_batches:
            return
        assert isinstance(self.part, Tensor)
        both = torch.stack([self.part.float(), module.grad_norm.float()])
        self.losses.append((trainer.global_step, both))
        self.part = 0.0
        step, train = trainer.global_step, self.config.train
        last = step == train.steps
        log, save = step % train.log_every == 0 or last, step % train.checkpoint_every == 0 or last
        if log or save:
            loss = self._check_losses(trainer)
            if log and self.writes:
                self._log(step, loss, module, batch)
            if save:
                self._save(trainer)
        if last:
            self.seconds = time.perf_counter() - self.began
        if self.stop.agreed(trainer):
            if self.losses:
                self._check_losses(trainer)
            self._save(trainer)
            raise SystemExit

    def _check_losses(self, trainer: Any) -> float:
        """The last loss, if all since the last check are sound: one transfer from the device for all.

        A loss is the batch's: the mean over the processes, which all come to the same answer.

        Raises:
            UserError: with the first bad step, its batch, and the last good checkpoint.
        """
        both = trainer.strategy.reduce(torch.stack([both for _, both in self.losses]))
        loss, norm = both.cpu().unbind(-1)
        limit = DIVERGED_ABOVE * math.log(self.vocabulary)
        bad = (~((loss <= limit) & norm.isfinite())).nonzero()
        if len(bad):
            if not self.writes:  # the first process says it
                raise SystemExit
            first = int(bad[0])
            step, what = self.losses[first][0], f"loss is {float(loss[first]):.4g}"
            if loss[first] <= limit:
                what = f"gradient's norm is {float(norm[first]):.4g}"
            rows = batch_rows(self.config.seed, step - 1, self.config.train.batch_size, self.n_rows)
            kept = (
                f"{self.checkpoint}, step {self.saved_step}" if self.saved_step >= 0 else "none yet"
            )
            raise UserError(
                f"the {what} at step {step} of {self.config.run_name} (batch of train rows "
                f"{', '.join(map(str, rows[:4]))}, …; last good checkpoint: {kept}): "
                f"lower train.lr, now {self.config.train.lr:g}"
            )
        self.losses.clear()
        return float(loss[-1])

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.vocabulary = len(module.model.unembed.b_U)
        self.n_rows = len(trainer.datamodule.rows)

    def _log(self, step: int, loss: float, module: Any, batch: Tensor) -> None:
        now, train = time.perf_counter(), self.config.train
        tokens_a_step = train.batch_size * self.config.model.ctx
        speed = (step - self.logged_step) * tokens_a_step / (now - self.logged)
        self.logged, self.logged_step = now, step
        row = {
            "step": step, "tokens": step * tokens_a_step, "loss": loss,
            "lr": module.optimizers().param_groups[0]["lr"], "grad_norm": float(module.grad_norm),
            "tokens_per_s": round(speed), **engagement(module.model, batch[:1]),
        }  # fmt: skip
        try:
            with self.metrics.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise Stopped(
                f"cannot write {self.metrics}: {error.strerror}; the last good checkpoint is {self.checkpoint}"
            ) from error
        self.tracker.log(row)
        self.progress.update(
            self.bar, completed=step, loss=f"loss {loss:.3f}", speed=f"{speed / 1000:.1f}k tok/s"
        )

    def _save(self, trainer: Any) -> None:
        """A checkpoint beside the last one, then in its place: there is always a whole one."""
        if self.saved_step == trainer.global_step:
            return
        try:
            if self.writes:
                self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.checkpoint) as beside:
                    trainer.save_checkpoint(beside)
            else:
                trainer.save_checkpoint(
                    self.checkpoint
                )  # writes nothing, but the first one waits for it
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            if processes.is_lost(error):
                raise
            kept = (
                f"step {self.saved_step} stays in {self.checkpoint}"
                if self.saved_step >= 0
                else "there is none yet"
            )
            raise Stopped(
                f"cannot save the checkpoint of step {trainer.global_step} "
                f"({str(error).splitlines()[0]}): free disk space; {kept}"
            ) from error
        self.saved_step = trainer.global_step


@torch.no_grad()
def engagement(model: LanguageModel, tokens: Int[Tensor, "row pos"]) -> dict[str, float]:
    """r and gain of the per-token mid norm now (medians over one row, BOS left out): P23 needs their course."""
    norm = model.mlp(0).ln
    if norm is None or norm.eps is None:
        return {}
    record: Record = {}
    model.residual(tokens, record)
    square = record["blocks.0.mlp.ln.hook_scale"][:, 1:].double().square()  # s2 + eps
    return {
        "r": float((1 - norm.eps / square).median()),
        "gain": float(square.rsqrt().median()),
    }


class NoProgress:
    """Stands in for rich's Progress where rich is not installed."""

    def add_task(self, *words: Any, **fields: Any) -> Any: ...

    def update(self, *words: Any, **fields: Any) -> None: ...


@contextmanager
def progress_bars() -> Iterator[Progress | NoProgress]:
    """One line a run: name, bar, steps, loss, tokens a second, time left. On stderr."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        yield NoProgress()
        return
    with Progress(
        TextColumn("{task.description:<20}"), BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=Console(stderr=True),
    ) as progress:  # fmt: skip
        yield progress


def _check_fits(path: Path, module: nn.Module) -> None:
    """Refuse a checkpoint of other shapes before anything is overwritten."""
    state = load_checkpoint(path).get("state_dict", {})
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        here = tuple(own[name].shape) if name in own else "nothing"
        there = tuple(state[name].shape) if name in state else "nothing"
        if here != there:
            raise UserError(
                f"the checkpoint {path} is of another shape: {name} is {there} there and {here} in this "
                "configuration; delete it to start again, or set tag= or study="
            )


def _with_precision(config: Config) -> Config:
    """`auto` resolved, so that the saved configuration and its hash say what was computed.

    As the run was begun, or else another run of its study: runs that are compared differ in nothing else.
    """
    if config.train.precision != "auto":
        return config
    own = [config.run_dir] if last_checkpoint(config.run_dir).is_file() else []
    begun = (path.parents[1] for path in sorted(config.study_dir.glob("*/checkpoints/last.ckpt")))
    for run_dir in (*own, *begun):
        with suppress(UserError):  # a folder that was copied half-way
            precision = read_config(run_dir / "config.yaml").train.precision
            return replace(config, train=replace(config.train, precision=precision))
    precision = "bf16" if _on_cuda(config) else "fp32"
    return replace(config, train=replace(config.train, precision=precision))


def _set_threads(config: Config) -> None:
    torch.set_num_threads(config.train.threads or max(1, _n_cores() // config.train.devices))


def _n_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def _on_cuda(config: Config) -> bool:
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no GPU here: set train.device=cpu")
    n_gpus = 0 if config.train.device == "cpu" else torch.cuda.device_count()
    if 0 < n_gpus < config.train.devices:
        raise UserError(
            f"train.devices={config.train.devices}, but torch sees {n_gpus} GPUs here: "
            f"set train.devices={n_gpus}, or let each process see all GPUs of its node"
        )
    return n_gpus > 0


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a killed process may have left in the middle of one."""
    return path.read_text(encoding="utf8").split("\n")[:-1] if path.is_file() else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning announces devices and suggests loggers; here, neither is news."""
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
