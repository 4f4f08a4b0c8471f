"""The numbers of a run, in metrics.csv and in its loggers: one row per logged step.

A resumed run continues the file from its checkpoint's step.
"""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from vlm_tune.console import make_console
from vlm_tune.data.batch import Batch
from vlm_tune.model.checkpoint import write_atomically
from vlm_tune.pages.recorded import COLUMNS, PAIR_COLUMNS, write_metrics
from vlm_tune.pages.recorded import read_metrics as read_metrics
from vlm_tune.training.run_folder import append


class MetricsFile(L.Callback):
    """Append the module's numbers to RUN/metrics.csv, and hand them to the loggers.

    Lightning's own way, `self.log`, takes some ten milliseconds of each step on a CPU.
    """

    def __init__(self, run: Path, log_every: int, console: Console) -> None:
        self.console = console
        self.path = run / "metrics.csv"
        self.log_every = log_every
        self.columns: tuple[str, ...] = COLUMNS
        self.pending: list[dict[str, float]] = []  # rows not yet written because the disk was full

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Keep the rows up to the step that the run continues from; that step's validation is repeated."""
        if not trainer.is_global_zero:
            return
        self.columns = (*COLUMNS, *PAIR_COLUMNS) if module.config.stage.preference.is_on else COLUMNS
        step = trainer.global_step
        rows = read_metrics(self.path)
        rows += [row for row in self.pending if row not in rows]
        rows.sort(key=lambda row: (row["step"], "val/loss" in row))
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and "val/loss" not in row)]
        write_atomically(self.path, lambda partial: write_metrics(partial, kept, self.columns))
        self.pending = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Write the values of an optimizer step."""
        step = trainer.global_step
        is_whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_whole_step and step % self.log_every == 0:
            place: dict[str, float] = {"max_steps": trainer.max_steps}
            self._write(trainer, module, [name for name in self.columns if not name.startswith("val/")], place)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Write the validation loss in a row of its own."""
        self._write(trainer, module, [name for name in self.columns if name.startswith("val/")], {})

    def _write(self, trainer: L.Trainer, module: Any, names: list[str], place: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        known = {name: module.numbers[name] for name in names if name in module.numbers}
        finite = {name: value for name, value in known.items() if math.isfinite(value)}
        self._append({"step": trainer.global_step, **finite, **place})
        for logger in trainer.loggers:  # last: a server that has gone takes no row from the file
            logger.log_metrics(known, trainer.global_step)
            logger.save()

    def _append(self, row: dict[str, float]) -> None:
        said_before = bool(self.pending)
        self.pending.append(row)
        lines = io.StringIO(newline="")
        csv.DictWriter(lines, self.columns).writerows(self.pending)
        try:
            append(self.path, lines.getvalue())
            self.pending = []
        except OSError as error:
            if not said_before:
                reason = (
                    f"{error.filename}: {error.strerror}: its rows are kept until there is room, and in checkpoints"
                )
                self.console.print(reason, soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """Save the rows that the file lacks."""
        return {"pending": self.pending}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.pending = state_dict["pending"]


class Curves(TensorBoardLogger):
    """TensorBoard on a disk that may be full: metrics.csv holds the same numbers, so the run continues without it."""

    has_failed = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log, unless the disk is full."""
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Flush, unless the disk is full."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """Close, unless the disk is full."""
        self._try(super().finalize, status)

    def _try(self, write: Callable[..., None], *values: Any) -> None:
        if self.has_failed:
            return
        try:
            write(*values)
        except OSError as error:
            self.has_failed = True
            make_console().print(
                f"{self.log_dir}: {error.strerror}: the run goes on without TensorBoard, metrics.csv has the numbers",
                soft_wrap=True,
            )
