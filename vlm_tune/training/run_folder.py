"""A run's folder: a unique name, and everything needed to read or repeat the run."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_tune.config.parse import write_config
from vlm_tune.config.schema import Config
from vlm_tune.errors import ConfigError, TrainingError
from vlm_tune.model.checkpoint import CHECKPOINTS, CONFIG, START, write_atomically

FOLDER_VARIABLE = "VLM_TUNE_RUN_FOLDER"  # passes the first process's folder to those it starts
PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "pillow", "timm", "deepspeed", "hydra-core")


def make_run_folder(config: Config, start: Path | None) -> Path:
    """Make runs/DATE_TIME_STAGE_MODEL, with a counter if that name is taken."""
    if (handed := handed_folder()) is not None:
        return handed
    runs = Path(config.runs)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{config.stage.name}_{config.model.name}"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for counter in range(1, 1000):
            folder = runs / (name if counter == 1 else f"{name}_{counter}")
            try:
                folder.mkdir()  # fails if another run took the name in the same second
                break
            except FileExistsError:
                continue
        (folder / CHECKPOINTS).mkdir()
        write_config(config, folder / CONFIG)
        (folder / START).write_text(str(start or ""), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"runs={config.runs}: cannot be written ({error.strerror}). Set runs=FOLDER to a writable one"
        ) from error
    folder = folder.resolve()
    os.environ[FOLDER_VARIABLE] = str(folder)
    return folder


def handed_folder() -> Path | None:
    """Return the folder that the first process handed to this one, which it started; None in the first."""
    handed = os.environ.get(FOLDER_VARIABLE)
    if handed and os.environ.get("LOCAL_RANK", "0") != "0":  # a later run of the first process has a folder of its own
        return Path(handed)
    return None


@contextmanager
def only_here(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run folder; raise TrainingError if one does."""
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(
            f"{run}: another process trains in this run folder. Wait for its end, or start a run of its own without "
            "resume"
        ) from error
    try:
        yield
    finally:
        lock.release()


def link_latest(run: Path) -> str:
    """Point runs/latest at a run that has its first checkpoint; return a note if the disk has no links, else ""."""
    link = run.parent / f".latest-{os.getpid()}"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(run.name)
        link.replace(run.parent / "latest")
    except OSError as error:
        link.unlink(missing_ok=True)
        latest = run.parent / "latest"
        return f"{latest} cannot name this run ({error.strerror}): write ckpt={run}"
    return ""


def append(path: Path, text: str) -> None:
    """Append a text completely or not at all; an OSError of a full disk names the file."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise OSError(error.errno, error.strerror, str(path)) from error


def drop_lines_after(path: Path, step: float) -> None:
    """Keep the lines of a JSON Lines file whose "step" is not after the one that a run continues from."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if is_up_to(line, step)]
    if len(kept) < len(lines):
        write_atomically(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))


def is_up_to(line: str, step: float) -> bool:
    """Return whether a line belongs to a step up to `step`; one cut off by a kill does not."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False


def environment() -> dict[str, str]:
    """Describe versions, machine, command and the state of the working folder's repository."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "command": " ".join(sys.argv)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found["git"] = git.stdout.strip() if git.returncode == 0 else "not a repository"
    return found
