"""Rows of webdataset shards: the neighbouring members of a tar file whose names differ only behind the first dot."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vlm_tune.errors import DataError

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


class TarRows:
    """Read single samples of a shard; `where` names the sample: 'shard-0000.tar:000017'.

    A sample becomes one record: the fields of its .json, its .txt as "caption", its pictures as "images".
    """

    def __init__(self, path: Path, name: str) -> None:
        """Find where each sample starts. Raise DataError for a damaged or empty archive."""
        self.path, self.name = path, name
        self._offsets = _scan(path, name)
        self._file: BinaryIO | None = None
        if len(self) == 0:
            raise DataError("holds no rows. A shard holds files such as 000017.jpg and 000017.json.", name)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, object]:
        """Read one sample. Raise DataError where its .json or .txt cannot be read."""
        record: dict[str, object] = {}
        pictures: list[dict[str, object]] = []
        for key, ending, content in self._members(index):
            record.setdefault("id", key)
            if ending.rsplit(".", 1)[-1].lower() in _PICTURES:
                pictures.append({"bytes": content, "path": f"{key}.{ending}"})
            elif ending.lower() == "json":
                record |= self._fields(index, content)
            elif ending.lower() in ("txt", "caption"):
                record["caption"] = self._text(index, content)
            # Other members (.cls, .npy, embeddings) are not for us: shards are shared between kinds of training.
        if pictures:  # in place of paths from before they were put into the shard
            record.pop("image", None)
            record["images"] = pictures
        return record

    def where(self, index: int) -> str:
        """Return 'shard-0000.tar:000017'."""
        return f"{self.name}:{self._members(index)[0][0]}"

    def __getstate__(self) -> dict[str, object]:
        """Leave the open file behind."""
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]

    def _members(self, index: int) -> list[tuple[str, str, bytes]]:
        """Read one sample's span of the archive: (key, ending, content) of each member."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        span = io.BytesIO(os.pread(self._file.fileno(), end - start, start))
        members = []
        with tarfile.open(fileobj=span, mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    members.append((*_split(member.name), content.read()))
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


def _split(name: str) -> tuple[str, str]:
    """('a/000017.seg.png') -> ('a/000017', 'seg.png'): the key reaches to the first dot of the file's own name."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return f"{folder}{slash}{key}", ending


def _scan(path: Path, name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Find the offset of each sample's first header, and the end of the last: (N+1,)."""
    starts: list[int] = []
    last_key, end = None, 0
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                key, _ = _split(member.name)
                if member.isfile() and key != last_key:
                    starts.append(member.offset)
                    last_key = key
                end = member.offset_data + (member.size + 511) // 512 * 512
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"not a tar file, or damaged: {error}. Write or download it again.", name) from error
    if end > path.stat().st_size:
        raise DataError("the archive is cut off. Download it again.", name)
    return np.array([*starts, end] if starts else [0], np.int64)
