"""A run's folder and its checkpoints: locations, contents, and loading the weights into a model.

Both training and everything that reads a finished run (chat, evaluate, export) use this file.
"""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.config.parse import read_config
from vlm_tune.config.schema import Config
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.seal import find_damage, is_zip

if TYPE_CHECKING:  # torch takes seconds to import, and a missing run is reported before
    from torch import Tensor, nn

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BEST = "best.ckpt"  # in it, next to those of single steps
START = "starts_from.txt"  # the earlier stage's checkpoint; empty = the base weights


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step, so that names sort as steps do."""
    return f"step_{step:08d}.ckpt"


def checkpoints(run: Path) -> list[Path]:
    """List a run's complete checkpoints, oldest first (`best.ckpt` is not among them)."""
    return sorted((run / CHECKPOINTS).glob("step_*.ckpt"))


def newest_whole(run: Path, before: str = "~") -> Path | None:
    """Find the newest undamaged checkpoint among those whose names come before a given one."""
    return next((path for path in reversed(checkpoints(run)) if path.name < before and not find_damage(path)), None)


def find_runs(runs: Path) -> list[Path]:
    """List the run folders that hold a checkpoint, oldest first; links are left out."""
    folders = [path.parent for path in runs.glob(f"*/{CONFIG}") if not path.parent.is_symlink()]
    return sorted((run for run in folders if checkpoints(run)), key=lambda run: checkpoints(run)[-1].stat().st_mtime_ns)


def find_run(runs: Path, stage: str, model: str) -> Path | None:
    """Find the newest run of a stage and a model that holds a checkpoint."""
    return next((run for run in reversed(find_runs(runs)) if is_of(run, stage, model)), None)


def find_stopped(runs: Path, stage: str, model: str, after: Path) -> Path | None:
    """Find a run of a stage and a model that began after a file was written, and was stopped without a checkpoint."""
    for config in runs.glob(f"*/{CONFIG}"):
        is_newer = config.stat().st_mtime_ns > after.stat().st_mtime_ns and not config.parent.is_symlink()
        if is_newer and not checkpoints(config.parent) and is_of(config.parent, stage, model):
            return config.parent
    return None


def is_of(run: Path, stage: str, model: str) -> bool:
    """Return whether a run is of a stage and a model; False for one that an older version wrote."""
    try:
        config = read_config(run / CONFIG)
    except ConfigError:
        return False
    return (config.stage.name, config.model.name) == (stage, model)


def find_checkpoint(path: str) -> Path:
    """Turn a run folder (its newest checkpoint) or a checkpoint file into the file's path."""
    given = Path(path).expanduser()
    if given.is_dir():
        if found := checkpoints(given.resolve()):
            return found[-1]
        raise CheckpointError(f"{path}: the folder holds no checkpoint. Name a run folder or a .ckpt file")
    if not given.is_file():
        raise CheckpointError(f"{path}: no such run folder or checkpoint. `ls runs` shows the runs")
    return given.resolve()


def run_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint."""
    run = checkpoint.parent.parent
    if not (run / CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint}: there is no {CONFIG} two folders above it. Keep a checkpoint in its run folder"
        )
    return run


def run_config(checkpoint: Path, overrides: list[str] | None = None) -> Config:
    """Read the configuration that a checkpoint was trained with."""
    return read_config(run_of(checkpoint) / CONFIG, overrides)


def start_of(checkpoint: Path) -> Path | None:
    """Read which earlier checkpoint a run had started from: its own checkpoints leave out frozen parts."""
    run = run_of(checkpoint)
    text = (run / START).read_text(encoding="utf-8").strip() if (run / START).exists() else ""
    if not text:
        return None
    start = Path(text)
    moved = run.parent / start.parent.parent.name / CHECKPOINTS / start.name  # when all runs were moved together
    for path in (start, moved):
        if path.is_file():
            return path
    raise CheckpointError(
        f"{run}: this run was started from {start}, which is gone, and parts that it kept frozen are in that alone. "
        f"Put the folder {start.parent.parent.name} back, or beside this one"
    )


def refuse_damaged(path: Path, damage: str) -> CheckpointError:
    """Make the error for a damaged checkpoint: it names the newest undamaged one before it."""
    whole = newest_whole(path.parent.parent, path.name)
    return CheckpointError(
        f"{path}: not a readable checkpoint ({damage}). Take an older one of the run{f': {whole}' if whole else ''}"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, if it is undamaged, without running any code that it might contain."""
    import torch

    try:
        if is_zip(path) and (damage := find_damage(path)):
            raise refuse_damaged(path, damage)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error) or "the file ends too early").splitlines()[0]
        raise refuse_damaged(path, reason) from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(f"{path}: it holds objects other than weights and is not loaded, for safety") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: it holds a {type(state).__name__}. Name a checkpoint of a vlm_tune run")
    return state


def trained_weights(checkpoint: Path) -> dict[str, "Tensor"]:
    """Read the trained weights of a checkpoint under the model's own names."""
    import torch

    state = read_checkpoint(checkpoint)
    if "state_dict" not in state:
        raise CheckpointError(f"{checkpoint}: it holds no state_dict. Name a checkpoint of a vlm_tune run")
    weights = state["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise CheckpointError(
            f"{checkpoint}: its state_dict holds no weights by name. Name a checkpoint of a vlm_tune run"
        )
    broken = [name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{checkpoint}: {len(broken)} of its weights are no numbers ({broken[0]}). Take an older one of the run"
        )
    return {name.removeprefix("vlm."): weight for name, weight in state["state_dict"].items()}


def load_weights(model: "nn.Module", weights: dict[str, "Tensor"], source: Path, complete: bool) -> None:
    """Copy weights into a model. Unknown or misshapen names are errors; with `complete`, so are missing ones.

    `complete=False` is the start of a new stage from an older one: its new adapters have no weights yet.
    """
    import torch

    from vlm_tune.model.layouts.weights import listed  # late as torch is, which it imports

    parameters = dict(model.named_parameters())
    problems = [f"{name}: the model has no such weight" for name in weights if name not in parameters]
    problems += [
        f"{name}: {tuple(weight.shape)} in the checkpoint, {tuple(parameters[name].shape)} in the model"
        for name, weight in weights.items()
        if name in parameters and weight.shape != parameters[name].shape
    ]
    if complete:
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        problems += [f"{name}: missing in the checkpoint" for name in trained if name not in weights]
    if problems:
        raise CheckpointError(
            f"{source}: it does not fit this model and stage\n  {listed(problems)}\n  Use the model and LoRA settings "
            "of that run, or export it merged and start from model.path=FOLDER"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def write_atomically(path: Path, write: Any) -> None:
    """Write a file under a temporary name and rename it: a crash or a full disk leaves what was there before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]  # torch's words for a full disk do not name it
        free = shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointError(
            f"{path}: could not be written ({reason}; {free:,.1f} MiB are free there). Older checkpoints are "
            "untouched: free some space or set runs=FOLDER on another disk, then go on with resume=last"
        ) from error
