"""A run's folder and its checkpoints: locations, contents, and loading the weights into a model.

Both training and everything that reads a finished run (chat, evaluate, export) use this file. A checkpoint is a file,
or a folder of one file a process, its parts: each weight, and the optimizer's state of each parameter, is whole in one
of them. Only the functions here know the two kinds apart.
"""

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_tune.config.parse import read_config
from vlm_tune.config.schema import Config
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.seal import find_damage, is_sealed, is_zip

if TYPE_CHECKING:  # torch takes seconds to import, and a missing run is reported before
    from torch import Tensor, nn

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BEST = "best.ckpt"  # in it, next to those of single steps
START = "starts_from.txt"  # the earlier stage's checkpoint; empty = the base weights
PART = re.compile(r"part_(\d+)_of_(\d+)\.ckpt")
SHARED = ("state_dict", "optimizer_states")  # what parts share out; all else is in the first one


def checkpoint_name(step: int) -> str:
    """Name the checkpoint of a step, so that names sort as steps do."""
    return f"step_{step:08d}.ckpt"


def checkpoints(run: Path) -> list[Path]:
    """List a run's complete checkpoints, oldest first (`best.ckpt` is not among them)."""
    return sorted((run / CHECKPOINTS).glob("step_*.ckpt"))


def newest_whole(run: Path, before: str = "~") -> Path | None:
    """Find the newest undamaged checkpoint among those whose names come before a given one."""
    return next((path for path in reversed(checkpoints(run)) if path.name < before and not damage_of(path)), None)


def part_name(number: int, count: int) -> str:
    """Name a part of a checkpoint: part_00_of_04.ckpt is the first of four."""
    return f"part_{number:02d}_of_{count:02d}.ckpt"


def files_of(checkpoint: Path) -> list[Path]:
    """List the files of a checkpoint: itself, or its parts."""
    if not checkpoint.is_dir():
        return [checkpoint]
    return sorted(path for path in checkpoint.iterdir() if PART.fullmatch(path.name))


def damage_of(checkpoint: Path) -> str | None:
    """Return how a checkpoint differs from what was written, missing parts included; None if it does not."""
    files = files_of(checkpoint)
    if checkpoint.is_dir():
        counts = {int(match[2]) for file in files if (match := PART.fullmatch(file.name))}
        if len(counts) != 1:
            return "it holds parts of several checkpoints" if counts else "it holds no part of a checkpoint"
        (count,) = counts
        if missing := [
            name for number in range(count) if not (checkpoint / (name := part_name(number, count))).exists()
        ]:
            return (
                f"{', '.join(missing)} missing: machines that share no disk each keep their own parts, in a folder of "
                "the same name. Bring all together here"
            )
    prefix = "{}: " if checkpoint.is_dir() else ""
    return next((prefix.format(file.name) + damage for file in files if (damage := find_damage(file))), None)


def bears_seals(checkpoint: Path) -> bool:
    """Return whether a checkpoint is sealed; those of older versions are not."""
    return all(is_sealed(file) for file in files_of(checkpoint))


def is_run_folder(path: Path) -> bool:
    """Return whether a folder is a run's, and not a checkpoint in parts."""
    return path.is_dir() and ".ckpt" not in path.suffixes


def put_in_place(partial: Path, path: Path) -> None:
    """Rename what is complete, over what had the name.

    No folder is replaced in one move: a kill between the two leaves none of the name, which a resumed run writes anew.
    """
    if path.is_dir() or (partial.is_dir() and path.exists()):
        remove(path)
    partial.replace(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there. A folder is renamed before, so that half of one never has its name."""
    if not checkpoint.is_dir():
        checkpoint.unlink(missing_ok=True)
        return
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # what a kill had left
    checkpoint.rename(old)
    shutil.rmtree(old, ignore_errors=True)  # on NFS, parts that a run still reads go when it ends


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
    """Turn a run folder (its newest checkpoint) or a checkpoint into the checkpoint's path."""
    given = Path(path).expanduser()
    if is_run_folder(given):
        if found := checkpoints(given.resolve()):
            return found[-1]
        raise CheckpointError(f"{path}: the folder holds no checkpoint. Name a run folder or a .ckpt file")
    if not (given.is_file() or given.is_dir()):
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
        if path.exists():
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


def read_checkpoint(path: Path, is_mapped: bool = True) -> dict[str, Any]:
    """Read a checkpoint, if it is undamaged, without running any code that it might contain; parts are joined.

    With `is_mapped` weights stay on the disk until they are used.
    """
    if path.is_dir() and (damage := damage_of(path)):
        raise refuse_damaged(path, damage)
    first, *others = [_read(file, path, is_mapped) for file in files_of(path)]
    try:
        for part in others:
            if part["global_step"] != first["global_step"]:
                raise ValueError("steps")
            first["state_dict"] |= part["state_dict"]
            for ours, theirs in zip(first["optimizer_states"], part["optimizer_states"], strict=True):
                ours["state"] |= theirs["state"]
    except (KeyError, TypeError, ValueError) as error:
        raise refuse_damaged(path, "its parts do not belong together") from error
    return first


def _read(file: Path, checkpoint: Path, is_mapped: bool) -> dict[str, Any]:
    import torch

    try:
        if is_zip(file) and (damage := find_damage(file)):
            raise refuse_damaged(checkpoint, damage)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error) or "the file ends too early").splitlines()[0]
        raise refuse_damaged(checkpoint, reason) from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(f"{file}: it holds objects other than weights and is not loaded, for safety") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: it holds a {type(state).__name__}. Name a checkpoint of a vlm_tune run")
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
        put_in_place(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]  # torch's words for a full disk do not name it
        free = shutil.disk_usage(path.parent).free / 2**20
        raise CheckpointError(
            f"{path}: could not be written ({reason}; {free:,.1f} MiB are free there). Older checkpoints are "
            "untouched: free some space or set runs=FOLDER on another disk, then go on with resume=last"
        ) from error
