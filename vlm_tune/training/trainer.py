"""Lightning's Trainer for a configuration: devices, precision, accumulation, callbacks, loggers."""

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger
from rich.console import Console

from vlm_tune.config.schema import Config, Precision, Strategy
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import device_of, resolve_precision
from vlm_tune.model.kernels.freed import keep_freed_memory
from vlm_tune.model.ready import require_packages
from vlm_tune.training.callbacks.checkpoints import SaveCheckpoints
from vlm_tune.training.callbacks.faults import LastBatch
from vlm_tune.training.callbacks.loggers import LOGGERS
from vlm_tune.training.callbacks.metrics import MetricsFile
from vlm_tune.training.callbacks.patience import StopEarly
from vlm_tune.training.callbacks.progress import ProgressLine
from vlm_tune.training.callbacks.ranks import WatchRanks
from vlm_tune.training.callbacks.stop import StopWhenAsked
from vlm_tune.training.callbacks.watch import WatchSteps
from vlm_tune.training.callbacks.writer import CheckpointWriter
from vlm_tune.training.intervals import every
from vlm_tune.training.strategies import ZERO, ZeroPrecision, make_strategy

PRECISIONS = {Precision.fp32: "32-true", Precision.bf16: "bf16-mixed", Precision.fp16: "16-mixed"}


def make_trainer(
    config: Config, max_steps: int, run: Path, callbacks: list[L.Callback], console: Console, parts: int | None = None
) -> L.Trainer:
    """Set up the loop. It ends by steps; the data stream handles epochs. `parts` is how many a checkpoint has."""
    trainer = config.trainer
    if not has_gpu(config):
        keep_freed_memory()
    stop, writer = StopWhenAsked(), CheckpointWriter(parts)
    watch = WatchSteps(run, trainer.max_bad_steps, trainer.save_minutes, stop, console)
    saves = SaveCheckpoints(run, every(trainer.save_every, max_steps), trainer.keep, watch, writer)
    is_zero, precision = config.strategy.name in ZERO, PRECISIONS[resolve_precision(trainer.precision)]
    slots = trainer.groups * trainer.micro_batch
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.nodes,
        strategy=make_strategy(config, has_gpu(config)),
        precision=None if is_zero else precision,  # type: ignore[arg-type]
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=trainer.global_batch // slots,
        gradient_clip_val=config.stage.clip or None,
        val_check_interval=every(trainer.val_every, max_steps) * (trainer.global_batch // slots),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=find_loggers(config, run),
        callbacks=[
            ProgressLine(trainer.log_every, console),
            MetricsFile(run, trainer.log_every, console),
            *callbacks,  # before a step's checkpoint, so that a kill between the two loses no answers
            saves,
            StopEarly(trainer.patience, saves, console),
            watch,
            stop,
            LastBatch(),
            WatchRanks(),  # last, so that it knows when the others have finished their work for a step
        ],
        plugins=[writer, *([ZeroPrecision(precision)] if is_zero else [])],  # type: ignore[arg-type]
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # FSDP2 keeps what a validation gathered, and training uses it
        default_root_dir=run,
    )


def check_trainer(config: Config) -> None:
    """Raise ConfigError for what this machine lacks, before a run folder is made."""
    trainer, precision = config.trainer, resolve_precision(config.trainer.precision)
    if precision is Precision.fp16 and config.strategy.name is Strategy.fsdp:
        raise ConfigError(
            "strategy=fsdp has no loss scaling, which trainer.precision=fp16 needs: set trainer.precision=bf16 or "
            "fp32, or strategy=zero3"
        )
    if not has_gpu(config):
        if trainer.accelerator in ("gpu", "cuda"):
            raise ConfigError(
                f"trainer.accelerator={trainer.accelerator}, but there is no GPU here: set it to auto or cpu"
            )
        if precision is Precision.fp16:
            raise ConfigError("trainer.precision=fp16 needs a GPU: set trainer.precision=bf16 or fp32 on a CPU")
    require_packages(config)


def has_gpu(config: Config) -> bool:
    """Return whether a run uses a GPU."""
    return device_of(config).type == "cuda"


def find_loggers(config: Config, run: Path) -> list[Logger] | bool:
    """Make the loggers by name; an explicit dict, so that a configuration cannot call other code."""
    return [LOGGERS[name](run) for name in config.logger.names] or False
