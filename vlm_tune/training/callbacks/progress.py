"""The progress line: step, loss, learning rate, tokens and samples per second, time left."""

import resource
import time
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vlm_tune.config.schema import Precision
from vlm_tune.console import LINE_SECONDS, Estimate, is_quiet
from vlm_tune.data.batch import Batch
from vlm_tune.model.build import resolve_precision
from vlm_tune.model.flops import peak_tflops
from vlm_tune.training.module import VlmModule


class ProgressLine(L.Callback):
    """Show the run's progress in a terminal, or as an occasional line if the output is a file."""

    def __init__(self, log_every: int, console: Console) -> None:
        self.console = console
        self.log_every = log_every
        self.bar: Progress | None = None

    def on_train_start(self, trainer: L.Trainer, module: VlmModule) -> None:  # type: ignore[override]
        """Start counting."""
        self.started = time.perf_counter()
        self.start = (module.num_samples, module.num_tokens)
        self.peak = half_peak(module)
        self.estimate = Estimate(trainer.max_steps)
        self.text = self.left = ""
        self.last_line = 0.0
        if self.console.is_terminal and trainer.is_global_zero:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            left = TextColumn("{task.fields[left]}")  # rich's own looks back 30 seconds, less than a slow step takes
            self.bar = Progress(*columns, TimeElapsedColumn(), left, console=self.console)
            self.task = self.bar.add_task("training", total=trainer.max_steps, completed=trainer.global_step, left="")
            self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        """Update the line after each optimizer step, and note the speed."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds = time.perf_counter() - self.started
        self.left = self.estimate.advance(trainer.global_step, seconds)
        if trainer.global_step % self.log_every == 0:
            self.text = self._measure(trainer, module, seconds)
        self._show(trainer, seconds)

    def _measure(self, trainer: L.Trainer, module: Any, seconds: float) -> str:
        samples = (module.num_samples - self.start[0]) / seconds
        tokens = (module.num_tokens - self.start[1]) / seconds
        waiting = trainer.train_dataloader.seconds_waited / seconds  # type: ignore[union-attr]
        tflops = module.num_flops / 1e12 / seconds
        speed = {"speed/samples": samples, "speed/tokens": tokens, "speed/waiting": waiting}
        speed |= {"speed/memory_mb": memory_mb(module.device), "speed/seconds": module.seconds_so_far()}
        speed |= {"speed/tflops": tflops} if tflops else {}
        speed |= {"speed/mfu": tflops / self.peak} if tflops and self.peak else {}
        module.numbers |= speed
        loss = module.numbers["train/loss"]
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        used = f"  MFU {speed['speed/mfu']:.0%}" if "speed/mfu" in speed else ""
        return f"loss {loss:.4f}  lr {rate:.1e}  {tokens:,.0f} tokens/s  {samples:.1f} samples/s{used}"

    def _show(self, trainer: L.Trainer, seconds: float) -> None:
        step = trainer.global_step
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=self.text or "training", left=self.left)
        elif (
            trainer.is_global_zero
            and not is_quiet()
            and (seconds - self.last_line >= LINE_SECONDS or step >= trainer.max_steps)
        ):
            self.last_line = seconds
            self.console.print(f"step {step}/{trainer.max_steps}  {self.text}  {self.left}".rstrip())

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """Release the terminal."""
        self.on_train_end(trainer, module)


def memory_mb(device: torch.device) -> float:
    """Return the most memory held so far: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def half_peak(module: VlmModule) -> float | None:
    """Return the TFLOP/s that a card is published to reach in 16 bit; None where unknown, or where a run is in 32."""
    if module.device.type != "cuda" or resolve_precision(module.config.trainer.precision) is Precision.fp32:
        return None
    return peak_tflops(torch.cuda.get_device_name(module.device))
