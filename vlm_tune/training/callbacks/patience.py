"""End a run early whose validation loss has stopped improving: trainer.patience validations without a new best."""

from typing import Any

import lightning as L
from rich.console import Console

from vlm_tune.errors import ConfigError
from vlm_tune.model.checkpoint import BEST, CHECKPOINTS
from vlm_tune.training.callbacks.checkpoints import SaveCheckpoints
from vlm_tune.words import counted


class StopEarly(L.Callback):
    """Stops after a validation, with its step saved; comes after `SaveCheckpoints`, which knows the best one.

    There is nothing to keep in a checkpoint: the best step is in it, and a resumed run shows the validation of its
    step once more. One that had stopped so stops again, unless patience has been raised.
    """

    def __init__(self, patience: int | None, saves: SaveCheckpoints, console: Console) -> None:
        self.patience = patience
        self.saves = saves
        self.console = console
        self.start = -1  # the step whose checkpoint the run goes on from

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """Raise ConfigError where there is no validation to judge by."""
        if self.patience is not None and trainer.datamodule.val is None:  # type: ignore[attr-defined]
            raise ConfigError(
                f"trainer.patience={self.patience}, but there are no validation rows. Name them with data.val=FILE, "
                "raise data.val_share, or leave trainer.patience out"
            )

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Note the step: its checkpoint is there."""
        self.start = checkpoint["global_step"]

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Ask all ranks, which know the same losses, to stop when patience is out."""
        step = trainer.global_step
        num_steps = int(trainer.val_check_batch or 1) // trainer.accumulate_grad_batches
        if self.patience is None or step >= trainer.max_steps or step % num_steps:
            return
        if (step - self.saves.best_step) // num_steps < self.patience:
            return
        if step != self.start:
            self.saves.save_step(trainer)
        trainer.should_stop = True
        without = counted(self.patience, "validation")
        self.console.print(
            f"stopped early after step {step}: {without} without a lower validation loss (trainer.patience). The best, "
            f"{self.saves.best:.4f} at step {self.saves.best_step}, is {self.saves.run / CHECKPOINTS / BEST}",
            soft_wrap=True,
        )
