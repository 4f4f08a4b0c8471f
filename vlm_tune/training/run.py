"""A training run from start to end: starting point, model, stage, data, trainer, fit, report."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from rich.console import Console

from vlm_tune.config.parse import read_config
from vlm_tune.config.schema import Config, FeatureCaching
from vlm_tune.console import follow, make_console, tell
from vlm_tune.data.datamodule import DataModule
from vlm_tune.errors import CheckpointError, Stopped
from vlm_tune.model.build import build_model, device_of
from vlm_tune.model.checkpoint import CONFIG, checkpoint_name, run_config, run_of, start_of
from vlm_tune.model.fill_cache import fill_cache, plan_cache
from vlm_tune.model.find_batch import find_passes, regroup
from vlm_tune.model.kernels.freed import hand_back_freed_memory
from vlm_tune.model.parts.stage import apply_stage
from vlm_tune.model.preference.reference import fill_reference
from vlm_tune.model.vlm import VisionLanguageModel
from vlm_tune.training.callbacks.checkpoints import catch_up
from vlm_tune.training.callbacks.faults import explain
from vlm_tune.training.callbacks.writer import count_parts
from vlm_tune.training.examiner import Examiner
from vlm_tune.training.intervals import describe
from vlm_tune.training.launch import from_the_first, meet, most_of_all
from vlm_tune.training.module import VlmModule
from vlm_tune.training.report import RunReport, show_data, show_parts
from vlm_tune.training.resume import (
    find_resume,
    go_on_from,
    initial_checkpoint,
    longer,
    moved,
    remarks_on,
    start_from,
    with_packs_of,
)
from vlm_tune.training.run_folder import handed_folder, make_run_folder, only_here
from vlm_tune.training.trainer import check_trainer, has_gpu, make_trainer
from vlm_tune.words import counted


def train(config: Config, console: Console | None = None) -> Path:
    """Run one stage from its configuration to its report; return the run's folder."""
    console = console or make_console()
    check_trainer(config)
    meet(config.trainer, has_gpu(config))
    checkpoint = find_resume(config)
    start = start_of(checkpoint) if checkpoint else initial_checkpoint(config)
    L.seed_everything(config.seed, workers=True, verbose=False)

    model = build_model(config)
    tell(console, model.notes)
    config = model.config
    parts = apply_stage(model.vlm, config)
    if start is not None:
        start_from(model.vlm, start)

    data = DataModule(config, model.encoder, follow)
    data.setup()
    config = data.config = choose_packs(config, model.vlm, data, checkpoint, console)
    max_steps = data.max_steps()
    examiner = Examiner(config, model, data, console)
    run = run_of(checkpoint) if checkpoint else Path(from_the_first(lambda: str(make_run_folder(config, start))))

    console.print(f"run folder: {run}\nstarts from: {checkpoint or start or 'the base weights'}", soft_wrap=True)
    tell(console, remarks_on(checkpoint) if checkpoint else [])
    show_data(console, data)
    show_parts(console, parts)

    console.print(describe(config.trainer, max_steps), soft_wrap=True)
    for change in (longer, moved):
        if checkpoint is not None and (said := change(run_config(checkpoint), config)):
            console.print(said, soft_wrap=True)

    module = VlmModule(model, config, max_steps)
    is_finished = checkpoint is not None and checkpoint.name == checkpoint_name(module.max_steps)
    if is_finished:
        console.print("this run is finished: there is no step left, and its report is written anew")
    num_parts = count_parts(config.trainer, sum(part.num_trained for part in parts))
    if num_parts is not None:
        console.print(f"a checkpoint is a folder of {counted(num_parts, 'part')}, one a process")
    trainer = make_trainer(config, module.max_steps, run, examiner.enter(run, max_steps), console, num_parts)
    with only_here(run) if trainer.is_global_zero else nullcontext():
        if trainer.is_global_zero:  # every rank finds the same rows
            data.write_quarantine(run / "quarantine.jsonl")
        keep_features(model.vlm, data, config, trainer.strategy.root_device, console)
        fill_reference(model.vlm, data, trainer.strategy.root_device, follow)  # by the weights that the run began with
        if checkpoint is not None:
            go_on_from(model.vlm, checkpoint)
        hand_back_freed_memory()
        fit(trainer, module, data, checkpoint)
        if is_finished:
            catch_up(trainer, module, data, run)
        if trainer.is_global_zero:
            report = RunReport(config, run, parts, start)
            examiner.tell(report)
            console.print(f"report: {report.write(module, data)}", soft_wrap=True)
    return run


def choose_packs(
    config: Config, vlm: VisionLanguageModel, data: DataModule, checkpoint: Path | None, console: Console
) -> Config:
    """Put the packs that trainer.find_batch finds into a configuration, or those that were found for the same run."""
    if not config.trainer.find_batch:
        return config
    if checkpoint is not None:
        return with_packs_of(run_config(checkpoint), config)
    if (run := handed_folder()) is not None:
        return with_packs_of(read_config(run / CONFIG), config)
    found = regroup(config, most_of_all(find_passes(vlm, data, config, device_of(config))))
    packs, asked = (
        f"{each.trainer.global_batch} packs of {each.stage.pack_length:,} tokens and {each.stage.pack_tiles:,} tiles"
        for each in (found, config)
    )
    console.print(f"trainer.find_batch: a step is {packs}, the largest that fit (given: {asked})", soft_wrap=True)
    return found


def fit(trainer: L.Trainer, module: VlmModule, data: DataModule, checkpoint: Path | None) -> None:
    """Train; raise KeyboardInterrupt for an immediate stop, and our own errors for what ends a run from outside."""
    gc.freeze()  # a full collection would write into all that data workers share with this process, and so copy it
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stopped:
        if trainer.global_rank and isinstance(trainer.strategy.cluster_environment, LightningEnvironment):  # type: ignore[attr-defined]
            stopped.code = 0  # Lightning would take any other code for a crash, and kill the first process at once
        raise
    except SystemExit as stopped:  # Lightning turns a KeyboardInterrupt into this
        raise KeyboardInterrupt from stopped
    except (RuntimeError, MemoryError) as error:
        ours = explain(error, trainer, data.config)
        if ours is None:
            raise
        raise ours from error
    finally:
        gc.unfreeze()


def fill_ahead(config: Config, console: Console) -> None:
    """Cache the frozen encoder's features of a run's pictures, as the run itself would before its first step."""
    model = build_model(config)
    tell(console, model.notes)
    config = model.config
    apply_stage(model.vlm, config)
    start = earlier_stage(config)
    if start is not None:
        start_from(model.vlm, start)
    source = start or "the base weights"
    console.print(f"pictures are encoded by the encoder of {source}", soft_wrap=True)
    data = DataModule(config, model.encoder, follow)
    data.setup()
    wanted = replace(config, data=replace(config.data, feature_cache=FeatureCaching.on))
    keep_features(model.vlm, data, wanted, device_of(config), console)


def keep_features(
    vlm: VisionLanguageModel, data: DataModule, config: Config, device: torch.device, console: Console
) -> None:
    """Cache a frozen encoder's features of the run's pictures, if that is enabled and fits."""
    plan = plan_cache(vlm, data, config)
    if plan is not None:
        console.print(plan.summary)
        if plan.fits:
            fill_cache(plan, vlm, data, device, follow)


def earlier_stage(config: Config) -> Path | None:
    """Find what the run would start from; None if that stage has not run yet: most leave the encoder unchanged."""
    try:
        return initial_checkpoint(config)
    except CheckpointError:
        if config.stage.init_from != "auto":
            raise
        return None
