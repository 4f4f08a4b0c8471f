"""Lightning's Trainer for a configuration: devices, precision, accumulation, callbacks, loggers."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from vlm_tune.config.schema import Config, Precision, Strategy
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import resolve_precision
from vlm_tune.model.kernels.freed import keep_freed_memory
from vlm_tune.model.ready import require_packages
from vlm_tune.training.callbacks.checkpoints import AtomicCheckpoints, SaveCheckpoints
from vlm_tune.training.callbacks.metrics import MetricsFile
from vlm_tune.training.callbacks.progress import ProgressLine
from vlm_tune.training.intervals import every

PRECISIONS = {Precision.fp32: "32-true", Precision.bf16: "bf16-mixed", Precision.fp16: "16-mixed"}
LOGGERS: dict[str, Any] = {
    "tensorboard": lambda run: TensorBoardLogger(run, name="", version="tensorboard"),
    "wandb": lambda run: WandbLogger(save_dir=run, name=run.name),
}


def make_trainer(config: Config, max_steps: int, run: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """Set up the loop. Its steps end the run; epochs are the data stream's affair."""
    trainer = config.trainer
    if not has_gpu(config):
        keep_freed_memory()
    slots = trainer.devices * trainer.nodes * trainer.micro_batch
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.nodes,
        strategy=find_strategy(config),
        precision=PRECISIONS[resolve_precision(trainer.precision)],  # type: ignore[arg-type]
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=trainer.global_batch // slots,
        gradient_clip_val=config.stage.clip or None,
        val_check_interval=every(trainer.val_every, max_steps) * (trainer.global_batch // slots),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=find_loggers(config, run),
        log_every_n_steps=trainer.log_every,
        callbacks=[
            ProgressLine(trainer.log_every),
            MetricsFile(run, trainer.log_every),
            SaveCheckpoints(run, every(trainer.save_every, max_steps), trainer.keep),
            *callbacks,
        ],
        plugins=[AtomicCheckpoints()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )


def check_trainer(config: Config) -> None:
    """Raise ConfigError for what is not on this machine, before a run folder is made."""
    trainer, strategy = config.trainer, config.strategy.name
    if not has_gpu(config):
        if trainer.accelerator in ("gpu", "cuda"):
            raise ConfigError(
                f"trainer.accelerator={trainer.accelerator}, but there is no GPU here: set it to auto or cpu"
            )
        if resolve_precision(trainer.precision) is Precision.fp16:
            raise ConfigError("trainer.precision=fp16 needs a GPU: set trainer.precision=bf16 or fp32 on a CPU")
        if strategy not in (Strategy.auto, Strategy.ddp):
            raise ConfigError(f"strategy={strategy.value} needs GPUs: set strategy=ddp on CPUs")
    require_packages(config)


def has_gpu(config: Config) -> bool:
    """Tell whether a run has a GPU."""
    return torch.cuda.is_available() and config.trainer.accelerator != "cpu"


def find_loggers(config: Config, run: Path) -> list[Logger] | bool:
    """Make the loggers by name; a visible dict, so that a configuration can call no other code."""
    return [LOGGERS[name](run) for name in config.logger.names] or False


def find_strategy(config: Config) -> Any:
    """Choose how devices share the work."""
    name, many = config.strategy.name, config.trainer.devices * config.trainer.nodes > 1
    if name is Strategy.auto:
        name = Strategy.ddp if many else Strategy.auto
    if name is Strategy.auto:
        return "auto"
    if name is Strategy.ddp:
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(process_group_backend="nccl" if has_gpu(config) else "gloo", find_unused_parameters=False)
    if name is Strategy.fsdp:
        from lightning.pytorch.strategies import FSDPStrategy

        return FSDPStrategy(use_orig_params=True, state_dict_type="full")
    return {
        Strategy.zero1: "deepspeed_stage_1",
        Strategy.zero2: "deepspeed_stage_2",
        Strategy.zero3: "deepspeed_stage_3",
    }[name]
