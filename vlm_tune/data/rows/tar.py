"""Rows of webdataset shards: neighbouring members of a tar file whose names differ only after the first dot.

Members are grouped into samples as webdataset 1.0 does; if it would silently skip something, an error says so.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vlm_tune.errors import DataError

# The last five cannot be opened, or not everywhere; they are listed so that they are not skipped as foreign members.
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "avif", "jfif", "heic", "heif", "jxl")
_TEXTS = ("txt", "caption")
_META = re.compile(r"__[^/]*__($|/)")  # of the archive itself: "__meta__", "__index__/..."


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample."""

    key: str  # "a/000017"
    ending: str  # "seg.png", in lower case
    name: str  # "a/000017.seg.png"
    content: bytes

    def as_picture(self) -> dict[str, object]:
        """Return the file in the form in which rows hold pictures."""
        return {"bytes": self.content, "path": self.name}


class TarRows:
    """Read single samples of a shard; `where` names the sample: 'shard-0000.tar:000017'.

    A sample becomes one record: the fields of its .json, its .txt as "caption", its pictures as "images".
    """

    def __init__(self, path: Path, name: str) -> None:
        """Find where each sample starts. Raise DataError for a damaged or empty archive, and for a scattered sample."""
        self.path, self.name = path, name
        self._offsets = _scan(path, name)
        self._file: BinaryIO | None = None
        if len(self) == 0:
            raise DataError("holds no rows. A shard holds files such as 000017.jpg and 000017.json.", name)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, object]:
        """Read one sample. Raise DataError if its files cannot be read or contradict each other."""
        members = self._members(index)
        record: dict[str, object] = {"id": members[0].key}
        for member in members:
            if member.ending == "json":
                record |= self._fields(index, member.content)
        for member in members:
            # Other members (.cls, .npy, embeddings) are skipped: shards are shared between kinds of training.
            if member.ending in _TEXTS:
                caption = self._text(index, member.content)
                if record.setdefault("caption", caption) != caption:
                    reason = f'".{member.ending}" and another file give different captions. Keep one of them.'
                    raise DataError(reason, self.where(index))
        pictures = [member for member in members if member.ending.rpartition(".")[2] in _PICTURES]
        if pictures and not _fill_parts(record.get("messages"), pictures):
            written = _written(record.pop("image", None)) or _written(record.get("images"))
            chosen = self._in_order(index, pictures, written)
            record["images"] = [member.as_picture() for member in chosen]
        return record

    def _in_order(self, index: int, pictures: list[Member], written: Sequence[str]) -> list[Member]:
        """Return the pictures that the row names, in its order; without names, all of them in the archive's order.

        A single name for a single picture need not match: it may be the path from before the picture was packed.
        """
        found = [_find(pictures, name) for name in written]
        named = [each for each in found if each is not None]
        if named and len(named) == len(found):
            return named
        if written and not len(written) == len(pictures) == 1:
            names, held = (", ".join(each[:4]) for each in (written, [member.name for member in pictures]))
            reason = (
                f"the .json names the pictures {names}; the sample holds {held}. Write the names of its files, or none"
            )
            raise DataError(f"{reason}: then they come in the archive's order.", self.where(index))
        return pictures

    def where(self, index: int) -> str:
        """Return 'shard-0000.tar:000017'."""
        return f"{self.name}:{self._members(index, first_only=True)[0].key}"

    def __getstate__(self) -> dict[str, object]:
        """Drop the open file."""
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]

    def _members(self, index: int, first_only: bool = False) -> list[Member]:
        """Read one sample's span of the archive."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        span = io.BytesIO(os.pread(self._file.fileno(), end - start, start))
        members: list[Member] = []
        with tarfile.open(fileobj=span, mode="r:") as archive:
            for file in archive:
                key, ending = _split(file)
                if not key:
                    continue
                content = archive.extractfile(file) if file.isfile() else None
                member = Member(key, ending.lower(), file.name, content.read() if content is not None else b"")
                if first_only:
                    return [member]
                if content is None:
                    reason = (
                        f"{file.name} is a link, not a file. Pack the shard with tar --dereference --hard-dereference."
                    )
                    raise DataError(reason, f"{self.name}:{key}")
                if any(member.ending == other.ending for other in members):
                    reason = f'two files end in ".{member.ending}". Keep one of them, or give each a name of its own.'
                    raise DataError(reason, f"{self.name}:{key}")
                members.append(member)
        return members

    def _text(self, index: int, content: bytes) -> str:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{content[error.start]:02x} at column {error.start + 1}"
            raise DataError(f"not UTF-8: {byte}. Save the text as UTF-8.", self.where(index)) from error

    def _fields(self, index: int, content: bytes) -> dict[str, object]:
        try:
            fields = json.loads(self._text(index, content))
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}. Mend the sample's .json.", self.where(index)) from error
        if not isinstance(fields, dict):
            raise DataError("the sample's .json is not an object. It must be {...}.", self.where(index))
        return fields


def _find(pictures: list[Member], written: object) -> Member | None:
    """Return the picture that a row refers to: by its full name, its name without folders, or its ending."""
    if not isinstance(written, str):
        return None
    last = written.rpartition("/")[2]
    fits = (each for each in pictures if written in (each.name, each.ending) or each.name.rpartition("/")[2] == last)
    return next(fits, None)


def _fill_parts(turns: object, pictures: list[Member]) -> bool:
    """Put the pictures into the image parts of OpenAI messages that name them; return whether any did."""
    is_named = False
    for turn in turns if isinstance(turns, list) else []:
        parts = turn.get("content") if isinstance(turn, dict) else None
        for part in parts if isinstance(parts, list) else []:
            for key in ("image_url", "image", "path", "url") if isinstance(part, dict) else ():
                source = part.get(key)
                found = _find(pictures, source.get("url") if isinstance(source, dict) else source)
                if found is not None:
                    part[key], is_named = found.as_picture(), True
    return is_named


def _written(value: object) -> list[str]:
    """List the names in a row's "image" or "images": strings, or objects with a path."""
    values = value if isinstance(value, list) else [value]
    paths = [each.get("path") if isinstance(each, dict) else each for each in values]
    return [path for path in paths if isinstance(path, str) and path]


def _split(file: tarfile.TarInfo) -> tuple[str, str]:
    """Split at the first dot of the file's own name: 'a/000017.seg.png' -> ('a/000017', 'seg.png').

    The key is "" for members that belong to no sample: folders, names without an ending, hidden files (macOS packs a
    "._x" for each x), and files about the archive itself.
    """
    folder, slash, name = file.name.rpartition("/")
    key, dot, ending = name.partition(".")
    is_sample = (file.isfile() or file.issym() or file.islnk()) and key and dot and not _META.match(file.name)
    return (f"{folder}{slash}{key}", ending) if is_sample else ("", "")


def _scan(path: Path, name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Find the offset of each sample's first header, and the end of the last: (N+1,)."""
    starts: list[int] = []
    seen: set[str] = set()
    last_key, end = "", 0
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                key, _ = _split(member)
                if key and key != last_key:
                    if key in seen:
                        reason = "the files of this sample lie apart, or it is there twice. Pack with tar --sort=name."
                        raise DataError(reason, f"{name}:{key}")
                    seen.add(key)
                    starts.append(member.offset)
                    last_key = key
                end = member.offset_data + (member.size + 511) // 512 * 512
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"not a tar file, or damaged: {error}. Write or download it again.", name) from error
    if end > path.stat().st_size:
        raise DataError("the archive is cut off. Download it again.", name)
    return np.array([*starts, end] if starts else [0], np.int64)
