"""Save checkpoints: at intervals, at the best validation loss, and at the end."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy

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
    remove,
)
from vlm_tune.model.parts.shards import own_rank
from vlm_tune.training.callbacks.faults import find
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.callbacks.ranks import WatchRanks
from vlm_tune.training.callbacks.watch import WatchSteps
from vlm_tune.training.callbacks.writer import CheckpointWriter
from vlm_tune.training.run_folder import link_latest
from vlm_tune.training.strategies import snapshot
from vlm_tune.words import counted


class SaveCheckpoints(L.Callback):
    """Save `step_N.ckpt` every `save_every` optimizer steps and at the end; keep the newest ones, and `best.ckpt`."""

    def __init__(self, run: Path, save_every: int, keep: int, watch: WatchSteps, writer: CheckpointWriter) -> None:
        self.console = watch.console
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
        self.is_linked = False
        self.writer = writer
        writer.then = self._tidy

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
        self._settle(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save at the end of an optimizer step, never between the micro-batches of one; stop there if asked to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.writer.look()
        watch, step = self.watch, trainer.global_step
        is_last = watch.must_stop or watch.error is not None or step >= trainer.max_steps
        if is_last or watch.must_save or step % self.save_every == 0:
            self.save_step(trainer)
        loops = trainer._checkpoint_connector._get_loops_state_dict()
        self.place = loops, module.num_samples, module.num_tokens, trainer.datamodule.cursor  # type: ignore[attr-defined]
        self.is_between = True
        if watch.must_stop or watch.error is not None:
            self._settle(trainer)
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
            self.writer.finish()
            raise Stopped(trainer.global_step, self.watch.stop.asked)

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Complete what is being written, and save the last complete step; a second request to stop is not delayed."""
        if isinstance(exception, KeyboardInterrupt):
            return
        has_raised = find(trainer, WatchRanks).has_raised  # when it is set, this process is not ended for a lost rank
        if self.writer.group is None:  # else it may wait for that rank's part
            has_raised.set()
        self._try(trainer, self.writer.finish)
        has_raised.set()
        is_alone = trainer.world_size == 1 or (type(trainer.strategy) is DDPStrategy and trainer.is_global_zero)
        if is_alone and self.is_between:
            self._try(trainer, lambda: self._save_last_whole(trainer))

    def _try(self, trainer: L.Trainer, save: Callable[[], None]) -> None:
        try:
            save()
        except (VlmTuneError, OSError) as error:
            self.saved_step = -1
            self._tell(f"the state after step {trainer.global_step} could not be saved: {error}")

    def _save_last_whole(self, trainer: L.Trainer) -> None:
        """Write a checkpoint as it would have been at the end of the last complete step, from this process alone."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        assert self.place is not None
        module: Any = trainer.lightning_module
        loops, module.num_samples, module.num_tokens, trainer.datamodule.cursor = self.place  # type: ignore[attr-defined]
        self.writer.parts = None
        self._save(trainer, checkpoint_name(step), loops=loops)
        self.writer.finish()
        self._tell(f"the state after step {step} is saved")

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Save the weights with the lowest validation loss as best.ckpt."""
        self.validated_step = trainer.global_step
        loss = module.numbers["val/loss"]
        if loss < self.best:
            self.best, self.best_step = loss, trainer.global_step
            self._save(trainer, BEST)

    def save_step(self, trainer: L.Trainer) -> None:
        """Save the step that has just ended, unless it is saved already."""
        step = trainer.global_step
        if step != self.saved_step:
            self._save(trainer, checkpoint_name(step))
            self.saved_step, self.watch.saved_at = step, time.monotonic()

    def _save(self, trainer: L.Trainer, name: str, **changed: Any) -> None:
        """Copy the state and have it written; wait where the one before it is still being written."""
        self.writer.finish()  # before the copy: only one is held
        self.writer.save_checkpoint(snapshot(trainer, **changed), self.folder / name)

    def _tidy(self) -> None:
        """Remove old checkpoints when a new one is complete, and name the run the latest when its first one is."""
        kept = checkpoints(self.run)
        for old in kept[: -self.keep]:
            remove(old)
        if kept and not self.is_linked and own_rank() == 0:
            self.is_linked = True
            self._tell(link_latest(self.run))

    def _settle(self, trainer: L.Trainer) -> None:
        """Wait until all that was saved is on the disk: torchrun ends the other processes when one has left."""
        self.writer.finish()
        trainer.strategy.barrier("checkpoints are written")

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
        trainer.strategy.checkpoint_io.finish()  # type: ignore[attr-defined]


def put_newer_aside(run: Path, step: int) -> str:
    """Rename checkpoints after the step that a run returns to: they would look like its newest. Return a note."""
    kept = checkpoints(run)
    newer = [path for path in kept if path.name > checkpoint_name(step)]
    if not newer:
        return ""
    best = run / CHECKPOINTS / BEST
    best_step = step_of(best)
    if best_step == step and newer == kept:
        named = best.with_name(checkpoint_name(step))  # else resume=last would find nothing
        shutil.copytree(best, named, copy_function=os.link) if best.is_dir() else os.link(best, named)
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
