"""The user's files as rows, one at a time. A new container is a class that fulfils `Rows`, and a line of OPENERS."""

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from vlm_tune.config.hints import PICTURE_ENDINGS
from vlm_tune.data.rows.cache import CODECS, unpacked
from vlm_tune.data.rows.table import TABLES, TableRows
from vlm_tune.data.rows.tar import TarRows
from vlm_tune.data.rows.text import TextRows
from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder
from vlm_tune.words import counted

TEXTS = (".jsonl", ".json", ".ndjson")
OPENERS: dict[str, Callable[[Path, str, Path], "Rows"]] = {  # suffix -> (file, its name in messages, folder of indexes)
    **dict.fromkeys(TEXTS, TextRows),
    **dict.fromkeys(TABLES, TableRows),
    ".tar": lambda path, name, folder: TarRows(path, name),
}


class Rows(Protocol):
    """Raw records by number. Cheap to pickle: a worker process reopens the files."""

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def __getitem__(self, index: int, /) -> dict[str, object]:
        """Read one row. Raise DataError, with file and line, if it cannot be read."""
        ...

    def where(self, index: int, /) -> str:
        """Return the location of a row as it appears in messages: 'train.jsonl:17'."""
        ...


class ShardedRows:
    """Read several files as one, in the order given."""

    def __init__(self, shards: list[Rows]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, object]:
        shard, row = self._find(index)
        return shard[row]

    def where(self, index: int) -> str:
        """Return the location of a row within its own shard."""
        shard, row = self._find(index)
        return shard.where(row)

    def _find(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, index - int(self._ends[number]) + len(shard)


def open_rows(path: str | Path, index_folder: Path | None = None) -> Rows:
    """Open a file, a folder or a pattern such as `shards/train-*.tar` as rows.

    `index_folder`, by default one in the user's cache, keeps what is derived from the files (offsets, unpacked copies,
    Arrow tables) for later runs and other processes; a changed file is processed again.

    Raise DataError for a missing, empty or damaged file, an unknown file type, and a folder whose files are not the
    shards of one data set.
    """
    folder = index_folder or cache_folder() / "rows"
    opened = [_open_file(file, folder) for file in find_files(Path(path))]
    return opened[0] if len(opened) == 1 else ShardedRows(opened)


def _open_file(path: Path, folder: Path) -> Rows:
    kind = container(path)
    if not path.is_file():
        raise DataError("is not a file: a pipe or a device has no rows to go back to.", path.name)
    if path.stat().st_size == 0:
        raise DataError("holds no rows: the file is empty.", path.name)
    plain = unpacked(path, folder) if path.suffix.lower() in CODECS else path
    return OPENERS[kind](plain, path.name, folder)


def container(path: Path) -> str:
    """Return the suffix that identifies a file's container, ignoring compression: 'a.jsonl.gz' -> '.jsonl'.

    Raise DataError for an unknown one.
    """
    name = path.name.lower()
    if name.endswith(".tgz"):
        return ".tar"
    kind = Path(path.stem.lower()).suffix if path.suffix.lower() in CODECS else path.suffix.lower()
    if kind not in OPENERS:
        known = ", ".join(OPENERS)
        raise DataError(f"unknown kind of file. Known: {known}, each also as .gz or .zst.", path.name)
    return kind


def find_files(path: Path) -> list[Path]:
    """List the files of a path, a pattern or a folder. Raise DataError as `open_rows` does."""
    if "*" in path.name and not path.exists():
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise DataError("no file matches this pattern.", str(path))
        return found
    if not path.exists():
        raise DataError(_missing(path), str(path))
    return _folder_files(path) if path.is_dir() else [path]


def _missing(path: Path) -> str:
    """Return the message for a missing path: the closest names, or what the folder holds instead."""
    what = "no such file" if path.parent.is_dir() else "no such folder"
    while not path.parent.is_dir():
        path = path.parent
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"{what}: did you mean {' or '.join(near)}?"
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{what}. {folder} holds {listed or 'nothing'}."


def _folder_files(folder: Path) -> list[Path]:
    """List the files of a data set folder: Hugging Face's save_to_disk, its hub layout, or the shards of one set."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise DataError(f"holds the splits {', '.join(splits)}. Name one: {folder.name}/{splits[0]}.", str(folder))
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    found = _data_files(folder) or (_data_files(folder / "data") if (folder / "data").is_dir() else [])
    if not found:
        num_pictures = sum(entry.suffix.lower() in PICTURE_ENDINGS for entry in folder.iterdir())
        pictures = (
            f" but {counted(num_pictures, 'picture')}. Write a file of rows that names them" if num_pictures else ""
        )
        raise DataError(f"holds no data file{pictures}. Known: {', '.join(OPENERS)}.", str(folder))
    sets = {re.sub(r"[-_.]?\d+(-of-\d+)?", "", file.name) for file in found}
    if len(sets) > 1:
        names = ", ".join(file.name for file in found[:6]) + (", ..." if len(found) > 6 else "")
        raise DataError(f"holds more than one data set: {names}. Name one file, or a pattern: train-*.", str(folder))
    return found


def _data_files(folder: Path) -> list[Path]:
    """List the files in a known container; JSON beside shards of another type describes them and is not data."""

    def kind(entry: Path) -> str:
        try:
            return container(entry)
        except DataError:
            return ""

    kinds = {entry: kind(entry) for entry in sorted(folder.iterdir()) if entry.is_file()}
    found = [entry for entry, name in kinds.items() if name and not entry.name.startswith(".")]
    without_json = [entry for entry in found if kinds[entry] != ".json"]
    return without_json or found


def _saved_dataset(folder: Path) -> list[Path]:
    """List the Arrow files that `datasets.Dataset.save_to_disk` wrote."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            "not readable as written by save_to_disk. Save the data set again.", f"{folder.name}/state.json"
        ) from error
    if state.get("_indices_data_files"):
        raise DataError("is a selection of other files. Save it with flatten_indices() first.", folder.name)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise DataError(f"lacks its file {missing or '*.arrow'}. Copy or save the data set again.", folder.name)
    return [folder / name for name in names]
