"""The work between two steps of a run: metrics, checkpoints, the check of the loss, and stopping."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor

from soluscope.config import Config
from soluscope.errors import Diverged, Stopped
from soluscope.files import replacing, write_text
from soluscope.model import Activations, LanguageModel
from soluscope.runs.folder import Run
from soluscope.runs.weights import save_weights
from soluscope.training import held_out, snapshots
from soluscope.training.batches import rows_in_order
from soluscope.training.device import set_threads
from soluscope.training.processes import is_lost
from soluscope.training.progress import NoProgress
from soluscope.training.wandb_run import Tracker

if TYPE_CHECKING:  # training requires neither
    from jaxtyping import Int
    from rich.progress import Progress

DIVERGED_ABOVE = 2.0
"""Factor of ln(d_vocab), the loss of a uniform guess. A loss above the product counts as diverged."""


STOPPING = {signal.SIGTERM, signal.SIGINT}
"""Signals that stop a run after the current step: SIGTERM and Ctrl-C."""


@contextmanager
def stops_held_back() -> Iterator[None]:
    """Hold SIGTERM and Ctrl-C back until `TrainingCallback` handles them or the block ends."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows, both signals end the process instead
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TrainingCallback(lightning.Callback):
    """Progress bar, metrics.jsonl, checkpoints, the check of the loss, and stopping between two steps.

    A checkpoint from the middle of a step could not be resumed bit for bit, so SIGTERM and Ctrl-C take
    effect at the step's end. Lightning's own handlers would stop at any point.
    """

    def __init__(self, config: Config, progress: Progress | NoProgress, tracker: Tracker) -> None:
        self.config = config
        self.run = Run(config.run_dir)
        self.tracker = tracker
        self.progress = progress
        self.bar = progress.add_task(config.run_name, total=config.train.steps, loss="", speed="")
        self.part: Tensor | float = 0.0
        """Loss of the current step so far: the sum over its micro-batches, each divided by their number."""
        self.losses: list[tuple[int, Tensor]] = []
        """(step, [loss, gradient norm]) for each step since the last check."""
        self.saved_step = -1
        self.kept_steps = frozenset(snapshots.steps(config.train))
        """Steps after which the weights are kept."""
        self.seconds = 0.0
        self.has_begun = False
        """True once the checkpoint, if any, is loaded."""
        self.asked_to_stop = False
        """True once this process has received SIGTERM or Ctrl-C."""
        self.stopped = False
        """True once a signal has stopped training and a checkpoint is saved."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.vocabulary = len(module.model.unembed.b_U)
        self.cache = trainer.datamodule.cache
        self.n_rows = len(trainer.datamodule.rows)
        self.rows_before = trainer.datamodule.rows_before

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.has_begun = True
        self.began = self.logged = time.perf_counter()
        self.logged_step = trainer.global_step
        self.saved_step = trainer.global_step if trainer.global_step else -1
        self._listen()
        set_threads(self.config)  # Lightning may have changed the number of threads
        if trainer.is_global_zero:
            kept = [row for row in self.run.rows() if row["step"] <= trainer.global_step]
            write_text(self.run.metrics, "".join(json.dumps(row) + "\n" for row in kept))
            self.tracker.catch_up(kept)
        self.progress.update(self.bar, completed=trainer.global_step)

    def _listen(self) -> None:
        """Replace Lightning's signal handlers; Lightning restores the caller's handlers after training."""

        def ask(number: int, frame: Any) -> None:
            self.asked_to_stop = True

        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, ask)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        # Lightning has already divided the loss by the number of micro-batches. With an entropy penalty, the
        # metrics still show the cross-entropy alone.
        self.part = self.part + outputs.get("cross_entropy", outputs["loss"]).detach()
        if (index + 1) % self.config.train.micro_batches:
            return
        assert isinstance(self.part, Tensor)
        both = torch.stack([self.part.float(), module.grad_norm.float()])
        self.losses.append((trainer.global_step, both))
        self.part = 0.0
        step, train = trainer.global_step, self.config.train
        last = step == train.steps
        if (
            step in self.kept_steps and trainer.is_global_zero
        ):  # before the checkpoint, see snapshots.py
            save_weights(self.run.snapshot(step), module.model)
        log, save = step % train.log_every == 0 or last, step % train.checkpoint_every == 0 or last
        if log or save:
            loss = self._check_losses(trainer)
            if log and trainer.is_global_zero:
                self._log(step, loss, module, batch)
            if save:
                self._save(trainer)
        if last:
            self.seconds = time.perf_counter() - self.began
        if trainer.strategy.reduce_boolean_decision(self.asked_to_stop, all=False):
            if self.losses:
                self._check_losses(trainer)
            self._save(trainer)
            self.stopped = trainer.should_stop = True

    def _check_losses(self, trainer: Any) -> float:
        """Return the last loss, after checking all losses since the last check.

        All values reach the CPU in one transfer. Each loss is the mean over the processes, so all of them
        reach the same decision.

        Raises:
            Diverged: if a loss has diverged or a gradient is not finite; the message names the first such
                step, its batch, and the last good checkpoint.
        """
        both = trainer.strategy.reduce(torch.stack([both for _, both in self.losses]))
        loss, norm = both.cpu().unbind(-1)
        limit = DIVERGED_ABOVE * math.log(self.vocabulary)
        bad = (~((loss <= limit) & norm.isfinite())).nonzero()
        if len(bad):
            if not trainer.is_global_zero:
                sys.exit()  # the first process reports it
            first = int(bad[0])
            step, what = self.losses[first][0], f"loss is {float(loss[first]):.4g}"
            if loss[first] <= limit:
                what = f"gradient's norm is {float(norm[first]):.4g}"
            size = self.config.train.batch_size
            first_row = self.rows_before + (step - 1) * size
            rows = rows_in_order(self.config.seed, first_row, size, self.n_rows)
            saved = self.saved_step >= 0
            checkpoint = f"{self.run.checkpoint}, step {self.saved_step}" if saved else "none yet"
            raise Diverged(
                f"the {what} at step {step} of {self.config.run_name} (batch of train rows "
                f"{', '.join(map(str, rows[:4]))}, …; last good checkpoint: {checkpoint}): "
                f"lower train.lr, now {self.config.train.lr:g}"
            )
        self.losses.clear()
        return float(loss[-1])

    def _log(self, step: int, loss: float, module: Any, batch: Tensor) -> None:
        now, train = time.perf_counter(), self.config.train
        tokens_a_step = train.batch_size * self.config.model.ctx
        speed = (step - self.logged_step) * tokens_a_step / (now - self.logged)
        self.logged, self.logged_step = now, step
        row = {
            "step": step, "tokens": step * tokens_a_step, "loss": loss,
            "lr": module.optimizers().param_groups[0]["lr"], "grad_norm": float(module.grad_norm),
            "tokens_per_s": round(speed), **gain_medians(module.model, batch[:1]),
        }  # fmt: skip
        if held_out.is_point(step, self.config):
            model, n_tokens = module.model, min(held_out.N_TOKENS, train.val_tokens)
            row["held_out_loss"] = held_out.mean_loss(
                model, self.cache, "select", self.config.model.ctx, n_tokens
            )
        try:
            with self.run.metrics.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise Stopped(
                f"cannot write {self.run.metrics}: {error.strerror}; the last good checkpoint, if any, is "
                f"{self.run.checkpoint}"
            ) from error
        self.tracker.log(row)
        self.progress.update(
            self.bar, completed=step, loss=f"loss {loss:.3f}", speed=f"{speed / 1000:.1f}k tok/s"
        )

    def _save(self, trainer: Any) -> None:
        """Write a checkpoint, then replace the last one, so that a complete checkpoint always exists."""
        if self.saved_step == trainer.global_step:
            return
        checkpoint = self.run.checkpoint
        try:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            # All processes must call save_checkpoint; the first process writes the file.
            with (
                replacing(checkpoint) if trainer.is_global_zero else nullcontext(checkpoint) as path
            ):
                trainer.save_checkpoint(path)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            if is_lost(error):
                raise
            saved = self.saved_step >= 0
            remaining = "there is no earlier checkpoint"
            if saved:
                remaining = f"the checkpoint of step {self.saved_step} stays in {checkpoint}"
            raise Stopped(
                f"cannot save the checkpoint of step {trainer.global_step} "
                f"({str(error).splitlines()[0]}): free disk space; {remaining}"
            ) from error
        self.saved_step = trainer.global_step


@torch.no_grad()
def gain_medians(model: LanguageModel, tokens: Int[Tensor, "row pos"]) -> dict[str, float]:
    """Return the medians of the per-token norm's r and gain over the rows' tokens, BOS left out.

    They are logged over training because P23 needs them. The result is empty if the norm is not per-token.
    """
    norm = model.mlp(0).ln
    if norm is None or norm.eps is None:
        return {}
    record: Activations = {}
    model.residual(tokens, record)
    square = record["blocks.0.mlp.ln.hook_scale"][:, 1:].double().square()  # s2 + eps
    return {
        "r": float((1 - norm.eps / square).median()),
        "gain": float(square.rsqrt().median()),
    }
