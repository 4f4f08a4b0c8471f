"""The file of a mixture: its data sets, each with its folder, its rows and how often they are seen.

InternVL's meta file, {name: {...}}, or a list of the same in YAML or JSON. Beyond InternVL's: `weight` and `format`.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vlm_tune.data.dialects.dialects import DIALECTS
from vlm_tune.data.sets.paths import find_file
from vlm_tune.errors import DataError

_LARGEST = 1 << 24  # bytes; a larger .json holds rows
_YAML = (".yaml", ".yml")  # never a file of rows


@dataclasses.dataclass(frozen=True, slots=True)
class MetaEntry:
    """One data set of a mixture."""

    name: str
    root: Path  # base of relative picture paths
    annotation: Path
    data_augment: bool = False
    max_dynamic_patch: int | None = None  # None = the model's own limit
    repeat_time: float = 1.0  # 0.5 = half of the rows, 3.5 = all of them three times and half of them once more
    length: int | None = None  # number of rows according to the file; not relied on
    weight: float | None = None  # share of the mixture's rows, instead of repeat_time
    format: str | None = None  # dialect of the rows; None = data.format


_KNOWN = (*(field.name for field in dataclasses.fields(MetaEntry)[1:]), "name")


def is_meta(path: Path) -> bool:
    """Return whether a file is a meta file, not rows: YAML, or JSON of nothing but objects with "annotation"."""
    if path.suffix.lower() in _YAML:
        return True
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > _LARGEST:
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    is_list = isinstance(content, list)
    entries = content if is_list else list(content.values()) if isinstance(content, dict) else []
    return bool(entries) and all(
        isinstance(entry, dict) and "annotation" in entry and (not is_list or entry.keys() <= set(_KNOWN))
        for entry in entries  # rows with an annotation have other fields, too
    )


def read_meta(path: Path) -> list[MetaEntry]:
    """Read a meta file: {name: {root, annotation, data_augment, max_dynamic_patch, repeat_time, length}}, or a list.

    Relative paths are looked up next to the meta file, then in the current folder, as InternVL does. The root defaults
    to the folder of the annotation.

    Raise DataError, naming file and data set, for a missing or unknown field and for values of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_yaml = path.suffix.lower() in _YAML
        content = yaml.safe_load(text) if is_yaml else json.loads(text, object_pairs_hook=partial(_once, path))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}.", str(path)) from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix.lower() in _YAML else "JSON"
        raise DataError(f"not {kind}: {error}. Fix the file.", path.name) from error
    if isinstance(content, list):
        content = _by_name(path, content)
    if not isinstance(content, dict) or not content:
        raise DataError('not a meta file. Write {"name": {"root": ..., "annotation": ...}}.', path.name)
    entries = [_entry(path, str(name), fields) for name, fields in content.items()]
    if len({entry.weight is None for entry in entries}) > 1:
        missing = next(entry.name for entry in entries if entry.weight is None)
        raise DataError('"weight" is missing here. Give one to every set, or to none.', f"{path.name}: {missing}")
    return entries


def _once(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object as a dict; json itself would silently keep only the last of two equal names."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise DataError(f'"{name}" stands twice in one object. Keep one, or name each set by itself.', path.name)
    return found


def _by_name(path: Path, content: list[object]) -> dict[str, object]:
    """Return the entries of a list by their "name", or else their number."""
    named: dict[str, object] = {}
    for number, fields in enumerate(content, 1):
        name = str(fields.get("name", number)) if isinstance(fields, dict) else str(number)
        if name in named:
            raise DataError(f'two sets have the name "{name}". Give each its own.', path.name)
        named[name] = fields
    return named


def _entry(path: Path, name: str, fields: object) -> MetaEntry:
    where = f"{path.name}: {name}"
    if not isinstance(fields, dict):
        raise DataError("not an object. Write {...}.", where)
    unknown = [key for key in fields if key not in _KNOWN]
    if unknown:
        raise DataError(f'unknown field "{unknown[0]}". Known: {", ".join(_KNOWN)}.', where)
    if not isinstance(fields.get("annotation"), str):
        raise DataError('"annotation" is missing or not text. Write a path.', where)
    if not isinstance(fields.get("root", ""), str):
        raise DataError('"root" is not text. Write a path.', where)
    augment = fields.get("data_augment", False)
    if not isinstance(augment, bool):
        raise DataError(f'"data_augment" is {augment!r}. Write true or false.', where)
    patches, length = fields.get("max_dynamic_patch"), fields.get("length")
    for key, value in (("max_dynamic_patch", patches), ("length", length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(f'"{key}" is {value!r}. Write a whole number above 0, or leave it out.', where)
    repeat, weight = _how_often(fields, where)
    annotation = _resolve(path, fields["annotation"])
    root = _resolve(path, fields["root"]) if fields.get("root") else annotation.parent
    return MetaEntry(name, root, annotation, augment, patches, repeat, length, weight, _format(fields, where))


def _how_often(fields: dict[str, Any], where: str) -> tuple[float, float | None]:
    """Read repeat_time or weight."""
    repeat, weight = fields.get("repeat_time", 1), fields.get("weight")
    if not _is_above_zero(repeat):
        raise DataError(f'"repeat_time" is {repeat!r}. Write a number above 0: 0.5 takes half of the rows.', where)
    if weight is not None and not _is_above_zero(weight):
        raise DataError(f'"weight" is {weight!r}. Write a number above 0.', where)
    if weight is not None and "repeat_time" in fields:
        raise DataError('both "weight" and "repeat_time". Keep one of them.', where)
    return float(repeat), None if weight is None else float(weight)


def _format(fields: dict[str, Any], where: str) -> str | None:
    """Read the dialect. A user's own function runs code: only the command line may name one."""
    name = fields.get("format")
    if isinstance(name, str) and ":" in name:
        raise DataError(f'"format" is {name!r}: name a function of your own with data.format=file.py:function.', where)
    if name is not None and name not in ("auto", *DIALECTS):
        raise DataError(f'"format" is {name!r}. Known: auto, {", ".join(DIALECTS)}.', where)
    return str(name) if name is not None else None


def _is_above_zero(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _resolve(path: Path, written: str) -> Path:
    if written.startswith("recipe:"):
        return find_file(written)
    beside = path.parent / written
    return beside if beside.exists() or not Path(written).exists() else Path(written)
