"""The sizes of all good rows of a run, as columns, from which packs, batches and epochs are planned."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

ROW = np.dtype(
    [
        ("row", "<i8"),
        ("tokens", "<i4"),
        ("supervised", "<i4"),
        ("tiles", "<i4"),
        ("content", "<u8"),
        ("head", "<u8"),
        ("head_tokens", "<i4"),
        ("pictures", "<u8"),
    ]
)


@dataclass(frozen=True)
class Index:
    """One entry for each good row; `rows` are their numbers in the file."""

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    tiles: npt.NDArray[np.int32]
    content: npt.NDArray[np.uint64]  # a hash of the content of the row: see `trained_content`
    head: npt.NDArray[np.uint64]  # a hash of its pictures and all tokens up to the last one's end; 0 = no pictures
    head_tokens: npt.NDArray[np.int32]  # those tokens; rows of equal heads begin with them
    pictures: npt.NDArray[np.uint64]  # a hash of the files of its pictures: see `picture_files`

    @classmethod
    def of(cls, table: npt.NDArray[np.void], first_row: int = 0) -> "Index":
        """Return an index of a table of ROWs, with rows numbered from `first_row` (for a set of a mixture)."""
        rows = table["row"] + first_row if first_row else table["row"]
        return cls(rows, *(table[each.name] for each in fields(cls)[1:]))

    @classmethod
    def join(cls, parts: list["Index"]) -> "Index":
        """Concatenate the entries of several sets."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: npt.NDArray[np.int64]) -> "Index":
        """Return the chosen entries, in the order given."""
        return Index(*(column[chosen] for column in vars(self).values()))

    def fingerprint(self) -> str:
        """Hash the sizes of the entries, which with seed and settings decide the order of training."""
        return _hash(self.rows, self.tokens, self.supervised, self.tiles)

    def content_fingerprint(self, start: int = 0, end: int | None = None) -> str:
        """Hash the contents of the entries from `start` to before `end`."""
        return _hash(self.content[start:end])

    def picture_fingerprint(self) -> str:
        """Hash the files of all entries' pictures."""
        return _hash(self.pictures)


def _hash(*columns: npt.NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
