"""Save checkpoints: every so many steps, at the best validation loss, and at the end."""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.console import Console

from vlm_tune.data.batch import Batch
from vlm_tune.errors import CheckpointError
from vlm_tune.model.checkpoint import (
    BEST,
    CHECKPOINTS,
    checkpoint_name,
    checkpoints,
    read_checkpoint,
    write_atomically,
)
from vlm_tune.training.run_folder import link_latest
from vlm_tune.words import counted


class AtomicCheckpoints(TorchCheckpointIO):
    """Write a checkpoint whole or not at all, and read it without running code that it might hold."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write under a temporary name, then rename."""
        write_atomically(Path(path), lambda partial: torch.save(checkpoint, partial))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read weights, numbers and text only."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class SaveCheckpoints(L.Callback):
    """Save `step_N.ckpt` every `save_every` optimizer steps and at the end; keep the newest ones, and `best.ckpt`."""

    def __init__(self, run: Path, save_every: int, keep: int, console: Console) -> None:
        self.console = console
        self.folder = run / CHECKPOINTS
        self.run = run
        self.save_every = save_every
        self.keep = keep
        self.best = float("inf")
        self.best_step = -1
        self.saved_step = -1
        self.validated_step = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Run the validation of the step that the run goes on from: a kill may have come before its end.

        Lightning would leave it out. Checkpoints are written before the validation, so that such a kill costs no steps.
        """
        if trainer.is_global_zero:
            self._tell(put_newer_aside(self.run, trainer.global_step))
        num_batches = trainer.global_step * trainer.accumulate_grad_batches
        every = trainer.val_check_batch
        if num_batches and isinstance(every, int) and num_batches % every == 0:
            validate(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate after the last step, unless that was just done: a short run may be over before its first time."""
        if self.validated_step != trainer.global_step:
            validate(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save at the end of an optimizer step, never between the micro-batches of one."""
        step = trainer.global_step
        is_whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_whole_step and step != self.saved_step and (step % self.save_every == 0 or step >= trainer.max_steps):
            self._save(trainer, step)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the weights of the lowest validation loss as best.ckpt."""
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics:
            return
        self.validated_step = trainer.global_step
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.best:
            self.best, self.best_step = loss, trainer.global_step
            trainer.save_checkpoint(self.folder / BEST)

    def _save(self, trainer: L.Trainer, step: int) -> None:
        is_first = self.saved_step < 0
        self.saved_step = step
        trainer.save_checkpoint(self.folder / checkpoint_name(step))
        if trainer.is_global_zero:
            if is_first:
                self._tell(link_latest(self.run))
            for old in checkpoints(self.run)[: -self.keep]:
                os.remove(old)

    def _tell(self, note: str) -> None:
        if note:
            self.console.print(note, soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """Remember the best loss so far."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]


def validate(trainer: L.Trainer) -> None:
    """Run the validation where Lightning would not."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def put_newer_aside(run: Path, step: int) -> str:
    """Rename the checkpoints after the step that a run goes back to: they would pass for its newest. Return a note."""
    kept = checkpoints(run)
    newer = [path for path in kept if path.name > checkpoint_name(step)]
    if not newer:
        return ""
    best = run / CHECKPOINTS / BEST
    best_step = step_of(best)
    if best_step == step and newer == kept:
        os.link(best, best.with_name(checkpoint_name(step)))  # or nothing would be left for resume=last to find
    if best_step > step:
        newer.insert(0, best)
    for path in newer:
        aside = path.with_name(f"{path.name}.replaced")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}.replaced")
        path.rename(aside)
    return f"back to step {step}: {counted(len(newer), 'newer checkpoint')} put aside as {run / CHECKPOINTS}/*.replaced"


def step_of(path: Path) -> float:
    """Read the step of a checkpoint: -1 where there is none, infinity where it cannot be read."""
    if not path.exists():
        return -1
    try:
        return int(read_checkpoint(path)["global_step"])
    except CheckpointError:
        return float("inf")
