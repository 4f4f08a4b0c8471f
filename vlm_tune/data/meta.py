"""InternVL's meta file: the data sets of a mixture, each with its folder, its rows and how often they are seen."""

import json
from dataclasses import dataclass
from pathlib import Path

from vlm_tune.errors import DataError

_KNOWN = ("root", "annotation", "data_augment", "max_dynamic_patch", "repeat_time", "length")
_LARGEST = 1 << 24  # bytes; a larger .json holds rows


@dataclass(frozen=True, slots=True)
class MetaEntry:
    """Describe one data set of a mixture."""

    name: str
    root: Path  # of relative picture paths
    annotation: Path
    data_augment: bool = False
    max_dynamic_patch: int | None = None  # None = the model's own limit
    repeat_time: float = 1.0  # 0.5 = half of the rows, 3.5 = all of them three times and half of them once more
    length: int | None = None  # rows, as the file says; not relied on


def is_meta(path: Path) -> bool:
    """Tell a meta file from a file of rows: a .json object whose values all are objects with "annotation"."""
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > _LARGEST:
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(entry, dict) and "annotation" in entry for entry in content.values())
    )


def read_meta(path: Path) -> list[MetaEntry]:
    """Read a meta file: {name: {root, annotation, data_augment, max_dynamic_patch, repeat_time, length}}.

    Relative paths are looked for beside the meta file, then from the current folder, as InternVL does.

    Raise DataError for a missing or unknown field and for values of the wrong kind, with file and data set.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}.", str(path)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}. Mend the file.", path.name) from error
    if not isinstance(content, dict) or not content:
        raise DataError('not a meta file. Write {"name": {"root": ..., "annotation": ...}}.', path.name)
    return [_entry(path, name, fields) for name, fields in content.items()]


def _entry(path: Path, name: str, fields: object) -> MetaEntry:
    where = f"{path.name}: {name}"
    if not isinstance(fields, dict):
        raise DataError("not an object. Write {...}.", where)
    unknown = [key for key in fields if key not in _KNOWN]
    if unknown:
        raise DataError(f'unknown field "{unknown[0]}". Known: {", ".join(_KNOWN)}.', where)
    for key in ("root", "annotation"):
        if not isinstance(fields.get(key), str):
            raise DataError(f'"{key}" is missing or not text. Write a path.', where)
    augment = fields.get("data_augment", False)
    if not isinstance(augment, bool):
        raise DataError(f'"data_augment" is {augment!r}. Write true or false.', where)
    patches, length = fields.get("max_dynamic_patch"), fields.get("length")
    for key, value in (("max_dynamic_patch", patches), ("length", length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(f'"{key}" is {value!r}. Write a whole number above 0, or leave it out.', where)
    repeat = fields.get("repeat_time", 1)
    if not isinstance(repeat, int | float) or isinstance(repeat, bool) or not 0 < repeat < float("inf"):
        raise DataError(f'"repeat_time" is {repeat!r}. Write a number above 0: 0.5 takes half of the rows.', where)
    root, annotation = _resolve(path, fields["root"]), _resolve(path, fields["annotation"])
    return MetaEntry(name, root, annotation, augment, patches, float(repeat), length)


def _resolve(path: Path, written: str) -> Path:
    beside = path.parent / written
    return beside if beside.exists() or not Path(written).exists() else Path(written)
