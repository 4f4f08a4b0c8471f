"""Where a run starts: from scratch, from an earlier stage's weights, or exactly where an interrupted run stopped."""

from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.config.checks import find_problems
from vlm_tune.config.own_function import MARK, UNKNOWN, remember
from vlm_tune.config.schema import Config, flatten
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.checkpoint import (
    BEST,
    CHECKPOINTS,
    bears_seals,
    checkpoint_name,
    checkpoints,
    damage_of,
    find_checkpoint,
    find_run,
    find_stopped,
    is_run_folder,
    load_weights,
    newest_whole,
    read_checkpoint,
    refuse_damaged,
    run_config,
    run_of,
    trained_weights,
)
from vlm_tune.words import counted

if TYPE_CHECKING:  # settings that cannot be resumed are reported before torch is imported, which takes seconds
    from vlm_tune.model.vlm import VisionLanguageModel

# keys that do not affect what is computed: they may differ from the interrupted run's
FREE = (
    "resume",
    "resume_allow",
    "runs",
    "logger.",
    "data.workers",
    "trainer.log_every",
    "trainer.keep",
    "trainer.sharded_checkpoints",
    "trainer.chat_every",
    "trainer.val_every",
    "trainer.save_every",
    "trainer.save_minutes",
    "trainer.max_bad_steps",
    "trainer.find_batch",
    "trainer.patience",
    "trainer.devices",
    "trainer.nodes",
    "trainer.sequence_parallel",
    "trainer.accelerator",
    "strategy.",
)
NEEDED = ("global_step", "loops", "optimizer_states", "lr_schedulers", "counts", "DataModule")
RAISED = ("stage.max_steps", "stage.epochs")  # they may grow: the run then continues beyond its old end


def find_resume(config: Config) -> Path | None:
    """Find the checkpoint to continue from; raise if the settings differ from the interrupted run's."""
    if config.resume is None:
        return None
    if config.resume == "last":
        run = find_run(Path(config.runs), config.stage.name, config.model.name)
        if run is None:
            raise CheckpointError(
                f"resume=last: {config.runs} holds no run of stage={config.stage.name} model={config.model.name} with "
                "a checkpoint. Start it without resume"
            )
        report = run / "report.json"
        stopped = find_stopped(run.parent, config.stage.name, config.model.name, report) if report.exists() else None
        if stopped is not None:
            raise CheckpointError(
                f"resume=last: {stopped} was stopped before its first checkpoint (trainer.save_every="
                f"{config.trainer.save_every}), and the run before it, {run}, is finished. Start anew without resume"
            )
        checkpoint = take_whole(run)
    elif is_run_folder(Path(config.resume).expanduser()):
        checkpoint = take_whole(Path(config.resume).expanduser().resolve())
    else:
        checkpoint = find_checkpoint(config.resume)
        if damage := damage_of(checkpoint):
            raise refuse_damaged(checkpoint, damage)
    before = run_config(checkpoint)
    if problems := find_problems(with_packs_of(before, config)):
        raise ConfigError.from_problems(problems)
    differing = differences(before, config)
    refused = [line for key, line in differing.items() if key not in config.resume_allow]
    if refused:
        raise ConfigError(
            f"resume={config.resume}: {counted(len(refused), 'setting')} "
            f"{'differs' if len(refused) == 1 else 'differ'} from those of {run_of(checkpoint)}\n  "
            + "\n  ".join(refused)
            + "\n  Give the same settings again, or allow a change by its key: resume_allow=[KEY]"
        )
    return checkpoint


def take_whole(run: Path) -> Path:
    """Return a run's newest undamaged checkpoint; raise CheckpointError if there is none."""
    newest = find_checkpoint(str(run))
    whole = newest_whole(run)
    if whole is None:
        best = run / CHECKPOINTS / BEST
        way_on = f"resume='{best}'" if best.exists() and not damage_of(best) else "start anew without resume"
        raise CheckpointError(f"{newest}: {damage_of(newest)}, nor is any other of its run whole: {way_on}")
    return whole


def remarks_on(checkpoint: Path) -> list[str]:
    """Return notes on newer checkpoints skipped as damaged, and on one of an older version that has no seal."""
    newer = [path for path in checkpoints(run_of(checkpoint)) if path.name > checkpoint.name]
    damaged = [(path, damage) for path in newer if (damage := damage_of(path))]
    said = [f"{path.name} is damaged ({damage}): the run goes on from {checkpoint.name}" for path, damage in damaged]
    if not bears_seals(checkpoint):
        said.append(f"{checkpoint.name} bears no checksum, as those of older versions: it is taken as it is")
    return said


def differences(before: Config, now: Config) -> dict[str, str]:
    """List the settings that differ and matter, by key."""
    old, new = flatten(plain(asdict(before))), flatten(plain(asdict(with_packs_of(before, now))))
    new["data.format"] = remember(now.data.format)
    if old["data.format"] == f"{now.data.format}{MARK}{UNKNOWN}":  # a run from before its file was remembered
        old["data.format"] = new["data.format"]
    return {
        key: f"{key}: {old[key]} then, {new[key]} now"
        for key in new
        if old[key] != new[key] and not key.startswith(FREE) and not (key in RAISED and new[key] > old[key] > 0)
    }


def with_packs_of(run: Config, config: Config) -> Config:
    """Take over the packs that trainer.find_batch found for a run."""
    if not (run.trainer.find_batch and config.trainer.find_batch):
        return config
    stage = replace(config.stage, pack_length=run.stage.pack_length, pack_tiles=run.stage.pack_tiles)
    return replace(config, stage=stage, trainer=replace(config.trainer, global_batch=run.trainer.global_batch))


def longer(before: Config, now: Config) -> str | None:
    """Describe what running longer than the interrupted run does to the learning rate; None if it is not longer."""
    for key, old, new in (
        ("stage.max_steps", before.stage.max_steps, now.stage.max_steps),
        ("stage.epochs", before.stage.epochs, now.stage.epochs),
    ):
        if new > old > 0:
            return (
                f"{key}: {old} then, {new} now. From here on the learning rate follows the longer run's schedule, so "
                "it may rise now; the steps so far followed the shorter one's"
            )
    return None


def moved(before: Config, now: Config) -> str | None:
    """Describe the effect of different devices or another strategy on a resumed run; None if both are the same."""
    then, here = map(_devices, (before, now))
    if then == here:
        return None
    return (
        f"trainer.devices x trainer.nodes and strategy: {then} then, {here} now. The optimizer's state moves along and "
        "the same samples come next; losses are equal up to the order of floating-point sums"
    )


def _devices(config: Config) -> str:
    trainer, size = config.trainer, config.trainer.sequence_parallel
    shared = f" (sequence_parallel={size})" if size > 1 else ""
    return f"{trainer.devices}x{trainer.nodes} {config.strategy.name.value}{shared}"


def count_anew(checkpoint: dict[str, Any], batches_per_step: int) -> None:
    """Recompute Lightning's count of micro-batches for this number of devices, up to the checkpoint's step."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    missing = checkpoint["global_step"] * batches_per_step - progress["current"]["ready"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] += missing


def plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace enums by their values, at every depth."""
    return {
        key: plain(value) if isinstance(value, dict) else value.value if isinstance(value, Enum) else value
        for key, value in tree.items()
    }


def initial_checkpoint(config: Config) -> Path | None:
    """Find the earlier stage's checkpoint that this stage starts from."""
    stage = config.stage
    if stage.init_from == "none" or (stage.init_from == "auto" and stage.init_stage is None):
        return None
    if stage.init_from != "auto":
        return find_checkpoint(stage.init_from)
    run = find_run(Path(config.runs), str(stage.init_stage), config.model.name)
    if run is None and config.model.path is not None and config.model.vision.path is None:
        return None  # a whole checkpoint has its own trained projector
    if run is None:
        raise CheckpointError(
            f"stage.init_from=auto: {config.runs} holds no {stage.init_stage} run of model={config.model.name}. Run "
            f"`python -m vlm_tune stage={stage.init_stage} model={config.model.name}` first, name one with "
            "stage.init_from=RUN, or train a new projector here with stage.init_from=none"
        )
    return find_checkpoint(str(run))


def require_resumable(checkpoint: Path) -> None:
    """Raise CheckpointError for a file that lacks what a run needs to continue, or whose step differs from its name."""
    state = read_checkpoint(checkpoint)
    missing = [key for key in NEEDED if key not in state]
    if missing:
        raise CheckpointError(
            f"{checkpoint}: it lacks {', '.join(missing)}, so a run cannot go on from it. Take another one of the run, "
            f"or start a new run from its weights: stage.init_from='{checkpoint}'"
        )
    step = state["global_step"]
    if checkpoint.name.startswith("step_") and checkpoint.name != checkpoint_name(step):
        raise CheckpointError(
            f"{checkpoint}: by its name it is of another step than by what it holds, {step}. Give it back its name, "
            f"{checkpoint_name(step)}, or take another one of the run"
        )


def go_on_from(vlm: "VisionLanguageModel", checkpoint: Path) -> None:
    """Load an interrupted run's weights; raise CheckpointError unless they are exactly those that this run trains.

    Lightning loads them once more with the optimizer's state, but ignores names that do not match.
    """
    require_resumable(checkpoint)
    load_weights(vlm, trained_weights(checkpoint), checkpoint, complete=True)


def start_from(vlm: "VisionLanguageModel", checkpoint: Path) -> None:
    """Load an earlier stage's trained weights."""
    load_weights(vlm, trained_weights(checkpoint), checkpoint, complete=False)
