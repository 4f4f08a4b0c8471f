"""Run a data recipe: a folder data_recipes/NAME whose prepare.py writes one prepared folder, once, to the cache.

`run_recipe` is what the trainer calls; `recipe_parser`, `recipe_main` and `write_rows` are the building blocks of a
prepare.py. A recipe is a program of its own, so that it can be read, run and changed without the trainer.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from filelock import FileLock, Timeout

from vlm_tune.errors import ConfigError, DataError, VlmTuneError
from vlm_tune.recipes.fetch import cache_folder

PACKAGE = Path(__file__).resolve().parent.parent
RECORD = "recipe.json"  # written last: a prepared folder is complete if and only if it holds this file

log = logging.getLogger(__name__)


def recipe_folders() -> dict[str, Path]:
    """Return the folder of each recipe by name: those in the installed package, else those next to it in a checkout."""
    for home in (PACKAGE / "data_recipes", PACKAGE.parent / "data_recipes"):
        found = {script.parent.name: script.parent for script in sorted(home.glob("*/prepare.py"))}
        if found:
            return found
    return {}


def run_recipe(named: str, cache: Path | None = None) -> Path:
    """Return CACHE/recipes/NAME, prepared by the recipe `named` NAME if that has not yet happened.

    `NAME?key=value&...` hands options to its prepare.py, as `--key=value`; each set of them has a folder of its own.
    The folder is rebuilt when the recipe's own files have changed. It appears under its name only when it is
    complete, and of several processes that ask at the same time one works and the others wait.
    Raise ConfigError for a recipe that does not exist, DataError for one that fails.
    """
    recipe = require_recipe(named)
    options = recipe_options(named)
    version = recipe_version(recipe)
    target = prepared_folder(named, cache)
    if _prepared_version(target) == version:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _hold(target.with_name(f".{target.name}.lock"), recipe.name):
        if _prepared_version(target) != version:  # another process may have prepared it while this one waited
            _prepare(recipe, options, target, version)
    return target


def prepared_folder(named: str, cache: Path | None = None) -> Path:
    """Return the folder of a recipe in the cache, prepared or not: NAME, or NAME and a hash of its options."""
    name, _, query = named.partition("?")
    folder = f"{name}-{hashlib.sha256(query.encode()).hexdigest()[:12]}" if query else name
    return (cache or cache_folder()).absolute() / "recipes" / folder


def recipe_options(named: str) -> list[str]:
    """Return the options of `NAME?key=value&...` for prepare.py; raise ConfigError for text that is not of this form.

    The values may come from anybody: each stays one argument, behind the name of its option. `out` is not one of them.
    """
    query = named.partition("?")[2]
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError as error:
        raise ConfigError(f"recipe:{named}: write the options as NAME?key=value&key=value ({error})") from error
    for key, value in given:
        if not re.fullmatch("[a-z][a-z_]*", key) or key in ("out", "help") or "\0" in value:
            raise ConfigError(f"recipe:{named}: {key}={value!r} cannot be handed over. Its README lists what it takes")
    return [f"--{key}={value}" for key, value in given]


def require_recipe(named: str) -> Path:
    """Return the folder of a recipe; raise ConfigError if there is none of that name."""
    folders, name = recipe_folders(), named.partition("?")[0]
    if name not in folders:
        there = ", ".join(sorted(folders)) or f"none at all below {PACKAGE}: install vlm_tune again"
        raise ConfigError(f"there is no data recipe {name!r}. Those there are: {there}")
    return folders[name]


def recipe_version(folder: Path) -> str:
    """Return a sha256 over the recipe's files except README: a changed recipe rebuilds its folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def recipe_parser(description: str) -> argparse.ArgumentParser:
    """Return the argument parser of a prepare.py: `--out FOLDER`, to which a recipe may add its own options."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write (made if it is not there)")
    return parser


def recipe_main(prepare: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> int:
    """Run a recipe from its command line and return the exit code: 0, or 2 with the error in one line, no traceback."""
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        prepare(options)
    except VlmTuneError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"DataError: {error}. Check the space and the permissions there, or choose another folder\n")
        return 2
    return 0


def write_rows(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Write one JSON object per line (UTF-8, not escaped to ASCII) and return the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _prepared_version(target: Path) -> str | None:
    """Return the version recorded in a prepared folder, or None where there is none or it cannot be read."""
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(record.get("version")) if isinstance(record, dict) else None


@contextmanager
def _hold(path: Path, name: str) -> Iterator[None]:
    """Hold the recipe's lock; print a note when that means waiting for another process."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process prepares the data recipe %s: waiting for it (%s)", name, path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(recipe: Path, options: list[str], target: Path, version: str) -> None:
    """Run prepare.py into a temporary folder next to `target`, record the version, and rename it to `target`."""
    for left_over in target.parent.glob(f".{target.name}-???-*"):  # of a killed run: the lock is held here
        shutil.rmtree(left_over, ignore_errors=True)
    work, old = (target.with_name(f".{target.name}-{role}-{os.getpid()}") for role in ("new", "old"))
    work.mkdir()
    try:
        started = time.monotonic()
        _run_prepare(recipe, options, work, target.parent.parent)
        seconds = round(time.monotonic() - started, 1)
        record = {"recipe": recipe.name, "options": options, "version": version, "seconds": seconds}
        (work / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        work.rename(target)
    finally:
        for left_over in (work, old):
            shutil.rmtree(left_over, ignore_errors=True)


def _run_prepare(recipe: Path, options: list[str], out: Path, cache: Path) -> None:
    """Run prepare.py as a program of its own. Its output is shown as it comes; its errors become ours."""
    environment = dict(os.environ, VLM_TUNE_CACHE=str(cache), PYTHONUNBUFFERED="1")
    # The child must also find a checkout that is used without being installed.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(recipe / "prepare.py"), "--out", str(out), *options]
    done = subprocess.run(
        command, env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode == 0:
        sys.stderr.write(done.stderr)
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    tail = "\n".join(f"  {line}" for line in lines[-8:]) or "  (it wrote no error)"
    reason = f"the recipe failed (exit code {done.returncode}) and nothing was kept:\n{tail}"
    by_hand = f"\n  To see all of it, run {sys.executable} {recipe / 'prepare.py'} --out FOLDER"
    raise DataError(reason + ("" if done.returncode == 2 else by_hand), where=f"data recipe {recipe.name}")
