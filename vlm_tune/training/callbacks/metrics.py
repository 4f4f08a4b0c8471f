"""metrics.csv: one row a logged step. A resumed run continues the file where its checkpoint stands."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vlm_tune.data.batch import Batch
from vlm_tune.model.checkpoint import write_atomically

COLUMNS = (
    "step",
    "train/loss",
    "val/loss",
    "lr/vision",
    "lr/projector",
    "lr/llm",
    "speed/samples",
    "speed/tokens",
    "speed/waiting",
    "skipped",
)


class MetricsFile(L.Callback):
    """Append the logged values to RUN/metrics.csv."""

    def __init__(self, run: Path, log_every: int) -> None:
        self.path = run / "metrics.csv"
        self.log_every = log_every

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Keep the rows up to the step that the run goes on from; the validation of that step is run again."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        rows = read_metrics(self.path)
        kept = [row for row in rows if row["step"] < step or (row["step"] == step and "val/loss" not in row)]
        write_atomically(self.path, lambda partial: write_metrics(partial, kept))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Write the values of an optimizer step."""
        step = trainer.global_step
        is_whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_whole_step and step % self.log_every == 0:
            self._write(trainer, [name for name in COLUMNS if name != "val/loss"])

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        """Write the validation loss in a row of its own."""
        if not trainer.sanity_checking:
            self._write(trainer, ["val/loss"])

    def _write(self, trainer: L.Trainer, names: list[str]) -> None:
        if not trainer.is_global_zero:
            return
        seen = trainer.callback_metrics
        values = {name: float(seen[name]) for name in names if name in seen and torch.isfinite(seen[name])}
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": trainer.global_step, **values})


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Write the rows of a metrics file, below the names of its columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a metrics file; empty cells are left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: int(value) if name == "step" else float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
