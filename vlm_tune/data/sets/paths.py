"""Where a run's files are: a path as written, a recipe's file, those next to it; and the rows held out without one."""

from difflib import get_close_matches
from pathlib import Path

from vlm_tune.config.schema import Config
from vlm_tune.errors import DataError
from vlm_tune.recipes.recipe import run_recipe


def find_file(path: str, key: str = "data.path") -> Path:
    """Return the local path for a path or recipe:NAME/FILE; a recipe runs the first time it is used.

    A pattern of files (`train-*.tar`) stays as it is: `rows` expands it. Raise DataError for a missing file.
    """
    if not path:
        raise DataError(f"no file is named. Give an existing one: {key}=FILE")
    if path.startswith("recipe:"):
        name, _, file = path.removeprefix("recipe:").partition("/")
        found = run_recipe(name) / file
    else:
        found = Path(path).expanduser()
    if not found.exists() and "*" not in found.name:
        near = get_close_matches(found.name, [other.name for other in found.parent.glob("*")], n=1)
        hint = f"Did you mean {found.with_name(near[0])}?" if near else f"Give an existing file: {key}=FILE"
        place = "" if found.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"no such file{place}. {hint}", path)
    return found


def sibling(path: str, part: str) -> Path | None:
    """Find the validation or test file next to a training file: x_train.jsonl -> x_val.jsonl, or test.jsonl."""
    train = find_file(path)
    for name in (part.join(train.name.rsplit("train", 1)), f"{part}{train.suffix}"):  # pretrain_train: the last one
        if name != train.name and train.with_name(name).is_file():
            return train.with_name(name)
    return None


def num_put_aside(num_rows: int, config: Config) -> int:
    """Count the rows that are put aside for validation where there is no file for it."""
    return min(int(num_rows * config.data.val_share), config.trainer.max_val_rows)


def find_test(config: Config) -> Path | None:
    """Find the test file: data.test, or test.jsonl next to the training file; None if there is none."""
    data = config.data
    if data.test == "none":
        return None
    return sibling(data.path, "test") if data.test == "auto" else find_file(data.test, "data.test")
