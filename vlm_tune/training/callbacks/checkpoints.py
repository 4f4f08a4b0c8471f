"""Save checkpoints: at intervals, at the best validation loss, and at the end."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from vlm_tune.data.batch import Batch
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.stream import Cursor
from vlm_tune.errors import CheckpointError, Stopped, VlmTuneError
from vlm_tune.model.checkpoint import (
    BEST,
    CHECKPOINTS,
    checkpoint_name,
    checkpoints,
    read_checkpoint,
    refuse_damaged,
    write_atomically,
)
from vlm_tune.model.seal import find_damage, seal
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.callbacks.watch import WatchSteps
from vlm_tune.training.run_folder import link_latest
from vlm_tune.words import counted


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and reads it without running code that it might contain."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write under a temporary name, seal it, then rename."""

        def write(partial: Path) -> None:
            torch.save(checkpoint, partial)
            seal(partial)

        write_atomically(Path(path), write)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read only weights, numbers and text, and only from an undamaged file."""
        if damage := find_damage(Path(path)):
            raise refuse_damaged(Path(path), damage)
        return super().load_checkpoint(path, map_location, weights_only=True)


class SaveCheckpoints(L.Callback):
    """Save `step_N.ckpt` every `save_every` optimizer steps and at the end; keep the newest ones, and `best.ckpt`."""

    def __init__(self, run: Path, save_every: int, keep: int, watch: WatchSteps, console: Console) -> None:
        self.console = console
        self.folder = run / CHECKPOINTS
        self.run = run
        self.save_every = save_every
        self.keep = keep
        self.watch = watch
        self.place: tuple[dict[str, Any], int, int, Cursor] | None = None  # after the last complete step
        self.is_between = False  # whether weights and optimizer still belong to that step
        self.best = float("inf")
        self.best_step = -1
        self.saved_step = -1
        self.validated_step = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Run the validation of the step that the run continues from: a kill may have come before its end.

        Lightning would skip it. Checkpoints are written before the validation, so that such a kill costs no steps.
        """
        if trainer.is_global_zero:
            self._tell(put_newer_aside(self.run, trainer.global_step))
        num_batches = trainer.global_step * trainer.accumulate_grad_batches
        every = trainer.val_check_batch
        if num_batches and isinstance(every, int) and num_batches % every == 0:
            validate(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate after the last step, unless that was just done: a short run may end before its first validation."""
        if self.validated_step != trainer.global_step:
            validate(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save at the end of an optimizer step, never between the micro-batches of one; stop there if asked to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        watch, step = self.watch, trainer.global_step
        is_last = watch.must_stop or watch.error is not None or step >= trainer.max_steps
        if step != self.saved_step and (is_last or watch.must_save or step % self.save_every == 0):
            self._save(trainer, step)
        loops = trainer._checkpoint_connector._get_loops_state_dict()
        self.place = loops, module.num_samples, module.num_tokens, trainer.datamodule.cursor  # type: ignore[attr-defined]
        self.is_between = True
        if watch.error is not None:
            raise watch.error
        if watch.must_stop and step < trainer.max_steps:
            raise Stopped(step, watch.stop.asked or "a signal to another process")

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Note that until the end of the step, weights and optimizer belong to no step."""
        self.is_between = module.is_in_step and self.is_between

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop in the middle of a validation, which a resumed run repeats; ranks that share one finish it first."""
        if self.watch.stop.asked and trainer.world_size == 1:
            raise Stopped(trainer.global_step, self.watch.stop.asked)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Save the last complete step if something else ends the run; a second request to stop is not delayed."""
        is_alone = trainer.world_size == 1 or (type(trainer.strategy) is DDPStrategy and trainer.is_global_zero)
        if isinstance(exception, KeyboardInterrupt) or not (is_alone and self.is_between):
            return
        try:
            self._save_last_whole(trainer)
        except (VlmTuneError, OSError) as error:
            self._tell(f"the state after step {trainer.global_step} could not be saved: {error}")

    def _save_last_whole(self, trainer: L.Trainer) -> None:
        """Write a checkpoint as it would have been at the end of the last complete step, from this process alone."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        assert self.place is not None
        module: Any = trainer.lightning_module
        loops, module.num_samples, module.num_tokens, trainer.datamodule.cursor = self.place  # type: ignore[attr-defined]
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False) | {"loops": loops}
        trainer.strategy.save_checkpoint(checkpoint, self.folder / checkpoint_name(step))
        self._after_saving(trainer, step)
        self._tell(f"the state after step {step} is saved")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the weights with the lowest validation loss as best.ckpt."""
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics:
            return
        self.validated_step = trainer.global_step
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.best:
            self.best, self.best_step = loss, trainer.global_step
            trainer.save_checkpoint(self.folder / BEST)

    def _save(self, trainer: L.Trainer, step: int) -> None:
        trainer.save_checkpoint(self.folder / checkpoint_name(step))
        self._after_saving(trainer, step)

    def _after_saving(self, trainer: L.Trainer, step: int) -> None:
        is_first = self.saved_step < 0
        self.saved_step = step
        self.watch.saved_at = time.monotonic()
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
    """Run a validation that Lightning would skip."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def catch_up(trainer: L.Trainer, module: Any, data: DataModule, run: Path) -> None:
    """Validate a finished run that was killed between its last checkpoint and the validation after it."""
    rows = read_metrics(run / "metrics.csv")
    if data.val is not None and not any("val/loss" in row and row["step"] == module.max_steps for row in rows):
        trainer.validate(module, datamodule=data, verbose=False)


def put_newer_aside(run: Path, step: int) -> str:
    """Rename checkpoints after the step that a run returns to: they would look like its newest. Return a note."""
    kept = checkpoints(run)
    newer = [path for path in kept if path.name > checkpoint_name(step)]
    if not newer:
        return ""
    best = run / CHECKPOINTS / BEST
    best_step = step_of(best)
    if best_step == step and newer == kept:
        os.link(best, best.with_name(checkpoint_name(step)))  # else resume=last would find nothing
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
