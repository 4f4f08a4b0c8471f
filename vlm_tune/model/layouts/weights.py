"""Weights on disk: read tensor by tensor, with little extra memory, and written shard by shard."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import convert_file_size_to_int

from vlm_tune.errors import CheckpointError
from vlm_tune.model.layouts.folder_files import read_object

MAPPED_BYTES = 64 * 1024**2  # a shard's pages that were read stay in memory until its file is opened again
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin")
COUNTED = ("position_ids", "num_batches_tracked")  # buffers of whole numbers
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """The weight files of a folder: the file of each key, and its shape."""

    folder: Path
    files: dict[str, str]
    shapes: dict[str, Shape]

    @classmethod
    def find(cls, folder: Path) -> "Shards":
        """Read keys and shapes of all shards; no weight is read yet.

        Raises CheckpointError for a folder without weights, a shard that is missing or cannot be read, and an index
        that does not name what its shards hold.
        """
        index, named, names = _weight_files(folder)
        if not names:
            raise CheckpointError(f"{folder}: no weights. It should hold {SINGLES[0]} or {INDEXES[0]} and its shards")
        files: dict[str, str] = {}
        shapes: dict[str, Shape] = {}
        for name in names:
            found = _shapes_of(folder / name)
            if twice := sorted(found.keys() & files.keys()):
                both = f"{files[twice[0]]} and {name}"
                raise CheckpointError(f"{folder}: \n  {listed(twice)}\n  in two shards, {both}. Copy the folder anew")
            files |= dict.fromkeys(found, name)
            shapes |= found
        if index is not None and named != files:
            wrong = sorted(key for key in named.keys() | files.keys() if named.get(key) != files.get(key))
            raise CheckpointError(f"{index}: \n  {listed(wrong)}\n  not where the index says. Copy the folder anew")
        return cls(folder, files, shapes)

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of some keys, shard after shard: a tensor is valid until the next one is asked for."""
        chosen = set(keys)
        for name in dict.fromkeys(self.files.values()):
            inside = [key for key, file in self.files.items() if file == name and key in chosen]
            yield from _read_file(self.folder / name, inside)

    def compare(self, expected: Mapping[str, Shape], optional: Iterable[str] = (), hint: str = "") -> None:
        """Raise CheckpointError that lists missing, unexpected and misshapen keys."""
        problems = [f"{key}: missing" for key in expected if key not in self.shapes]
        known = {*expected, *optional}
        problems += [f"{key}: unexpected" for key in self.shapes if key not in known]
        problems += [
            f"{key}: {self.shapes[key]} in the file, {shape} by config.json"
            for key, shape in expected.items()
            if key in self.shapes and self.shapes[key] != shape
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder}: {len(problems)} weights do not fit its config.json\n  {listed(problems)}\n  "
                f"{hint or 'Complete or correct the folder: nothing is skipped or guessed'}"
            )


def write_shards(shapes: Mapping[str, Shape], read: Callable[[str], Tensor], folder: Path, shard: str = "2GB") -> None:
    """Write tensors in this order as safetensors of at most `shard` each; `read` gives one when its turn comes.

    Sizes are counted in the dtype of the first.
    """
    keys, max_bytes = list(shapes), convert_file_size_to_int(shard)
    size = read(keys[0]).dtype.itemsize
    groups: list[list[str]] = [[]]
    room = max_bytes
    for key in keys:
        need = size * torch.Size(shapes[key]).numel()
        if groups[-1] and need > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(key)
        room -= need
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLES[0]]
    total = 0
    for name, group in zip(names, groups, strict=True):
        tensors = {key: read(key).contiguous() for key in group}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        places = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEXES[0]).write_text(json.dumps(index, indent=1), encoding="utf-8")


def listed(problems: list[str], most: int = 10) -> str:
    """Write problems one per line, the first ten of many."""
    rest = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join(problems[:most] + rest)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of one .safetensors or .bin file; raise CheckpointError for one that cannot be read."""
    if path.suffix == ".bin":
        return _unpickled(path)
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def notes(folder: Path) -> list[str]:
    """Return what a user should know about the weight files of a folder."""
    if any(name.endswith(".bin") for name in _weight_files(folder)[2]):
        return [f"{folder}: weights from .bin files, read as tensors only; no code in them is run"]
    return []


def _weight_files(folder: Path) -> tuple[Path | None, dict[str, str], list[str]]:
    """Find the index of a folder, the file that it names for each key, and the names of all files of weights."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is None:
        return None, {}, [name for name in SINGLES if (folder / name).is_file()][:1]
    named = _weight_map(index)
    return index, named, sorted(set(named.values()))


def _weight_map(index: Path) -> dict[str, str]:
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and Path(name).name == name and Path(name).suffix in SUFFIXES for name in named.values()
    ):
        raise CheckpointError(f"{index}: its weight_map does not name a shard beside it for each key. Copy it anew")
    return named


def _shapes_of(path: Path) -> dict[str, Shape]:
    if path.suffix == ".bin":
        return {key: tuple(tensor.shape) for key, tensor in _unpickled(path).items()}
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        counted = [key for key, each in slices.items() if "F" not in each.get_dtype() and not key.endswith(COUNTED)]
        if counted and not _is_packed(path.parent):
            kind = slices[counted[0]].get_dtype()
            raise CheckpointError(f"{path}: \n  {listed(counted)}\n  {kind}, whole numbers, for weights. Copy it anew")
        return {key: tuple(each.get_shape()) for key, each in slices.items()}


def _is_packed(folder: Path) -> bool:
    """Return whether a folder declares quantized weights."""
    config = folder / "config.json"
    return config.is_file() and "quantization_config" in read_object(config)


def _read_file(path: Path, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        weights = _unpickled(path) if keys else {}
        yield from ((key, weights[key]) for key in keys)
        return
    waiting = keys[::-1]
    while waiting:
        room = MAPPED_BYTES
        with _opened(path) as file:
            while waiting and room > 0:
                key = waiting.pop()
                tensor = file.get_tensor(key)
                room -= tensor.nbytes
                yield key, tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}). Copy it anew") from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Read a .bin file; its pages are mapped, so that only what is used comes into memory, where its age allows it."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = (str(error) or "the file ends too early").splitlines()[0]
        raise CheckpointError(f"{path}: not read ({reason}). Save the weights as safetensors") from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise CheckpointError(f"{path}: it holds something other than named tensors. Save the weights as safetensors")
    return weights
