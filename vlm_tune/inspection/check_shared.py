"""What the training rows share with the validation and the test file: pictures by content, and whole rows.

Pictures are first compared by size in bytes; only if the sizes match are both ends of both files read.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from vlm_tune.config.schema import Config
from vlm_tune.data.encode import Encoder
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.data.sets.mixture import open_data
from vlm_tune.data.sets.paths import find_file, sibling
from vlm_tune.errors import DataError

MAX_ROWS = 50_000  # of a held-out file that are compared
MAX_KEPT = 1 << 16  # pictures whose size one process remembers
EDGE = 1 << 16  # bytes read at either end of a picture
LISTED = 500  # shared rows, and pictures, that are listed; all are counted

Content = tuple[int, bytes]
"""Size in bytes and digest of a picture's file."""


class Contents:
    """The sizes and digests of picture files; each file is opened once."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader
        self._sizes: dict[str, int] = {}
        self._digests: dict[str, bytes] = {}

    def size(self, picture: Picture) -> int:
        """Return the size in bytes of a picture's file (or of its video). Raise DataError."""
        if picture.content is not None:
            return len(picture.content)
        if picture.path not in self._sizes:
            if len(self._sizes) >= MAX_KEPT:
                self._sizes.clear()
            with self._reader.open_encoded(picture) as file:
                self._sizes[picture.path] = file.seek(0, 2)
        return self._sizes[picture.path]

    def digest(self, picture: Picture) -> bytes:
        """Hash both ends of a picture's file: compressed pictures that agree there and in size count as the same."""
        if picture.content is None and picture.path in self._digests:
            return self._digests[picture.path]
        with self._reader.open_encoded(picture) as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(EDGE)
            file.seek(max(len(first), size - EDGE))
            digest = blake2b(first + file.read(), digest_size=16).digest()
        if picture.content is None:
            if len(self._digests) >= MAX_KEPT:
                self._digests.clear()
            self._digests[picture.path] = digest
        return digest


class HeldPicture(NamedTuple):
    """A picture of a held-out file, known by its digest, which is computed on demand; no pixels are kept."""

    name: str
    where: str
    digest: Callable[[], bytes]  # raises DataError

    @classmethod
    def of(cls, picture: Picture, where: str, contents: Contents) -> "HeldPicture":
        """Take a picture file to be digested later, or a picture inside the row, digested now."""
        if picture.content is not None:
            return cls(picture_name(picture), where, partial(bytes, contents.digest(picture)))
        return cls(picture_name(picture), where, partial(contents.digest, picture))


@dataclass
class Shared:
    """What some rows share with one held-out file."""

    num_rows: int = 0  # rows that are in both
    num_showing: int = 0  # rows that show a picture of the held-out file
    pictures: dict[Content, dict[str, str]] = field(default_factory=dict)  # no more than the held-out file has
    rows: list[dict[str, str]] = field(default_factory=list)  # the first LISTED

    def merge(self, other: "Shared") -> None:
        """Add the findings of later rows."""
        self.num_rows += other.num_rows
        self.num_showing += other.num_showing
        self.pictures = other.pictures | self.pictures
        self.rows = [*self.rows, *other.rows][:LISTED]


class HeldOut:
    """The rows of one validation or test file by their text, and its pictures by their size."""

    def __init__(self, part: str, path: Path) -> None:
        self.part = part
        self.path = path
        self.num_rows = self.num_bad = 0
        self.is_cut = False
        self.error = ""  # why the file cannot be opened
        self._rows: dict[tuple[bytes, tuple[int, ...]], list[tuple[list[HeldPicture], str]]] = {}  # text, sizes -> rows
        self._pictures: dict[int, dict[tuple[int, str], HeldPicture]] = {}  # size -> root and path -> picture
        self._digests: dict[int, dict[bytes, HeldPicture]] = {}  # only for sizes that were looked up

    def read(self, sets: Iterable[Conversations]) -> None:
        """Read the rows; those that cannot be read are counted."""
        for data in sets:
            contents = Contents(data.reader)
            for row in range(len(data)):
                if self.num_rows == MAX_ROWS:
                    self.is_cut = True
                    return
                self.num_rows += 1
                try:
                    self._add(data.sample(row), contents)
                except DataError:
                    self.num_bad += 1

    def _add(self, sample: Sample, contents: Contents) -> None:
        sizes = tuple(map(contents.size, sample.pictures))
        held = []
        for number, (size, picture) in enumerate(zip(sizes, sample.pictures, strict=True)):
            key = id(contents), picture.path or f"{sample.where} {number}"  # two roots may contain the same path
            same_size = self._pictures.setdefault(size, {})
            if key not in same_size:
                same_size[key] = HeldPicture.of(picture, sample.where, contents)
            held.append(same_size[key])
        self._rows.setdefault((text_digest(sample), sizes), []).append((held, sample.where))

    def compare(self, sample: Sample, contents: Contents, shared: Shared) -> None:
        """Record what a training row shares with these. Raise DataError for a picture that cannot be read."""
        sizes = tuple(map(contents.size, sample.pictures))
        shows = False
        for size, picture in zip(sizes, sample.pictures, strict=True):
            if size in self._pictures:
                digest = contents.digest(picture)
                if found := self._of_size(size).get(digest):
                    theirs = {"held_picture": found.name, "held_where": found.where}
                    both = {"picture": picture_name(picture), "where": sample.where} | theirs
                    shared.pictures.setdefault((size, digest), both)
                    shows = True
        shared.num_showing += shows
        for held, where in self._rows.get((text_digest(sample), sizes), []):
            if all(contents.digest(own) == other.digest() for own, other in zip(sample.pictures, held, strict=True)):
                shared.num_rows += 1
                shared.rows += [{"where": sample.where, "held_where": where}] if len(shared.rows) < LISTED else []
                return

    def _of_size(self, size: int) -> dict[bytes, HeldPicture]:
        if size not in self._digests:
            self._digests[size] = {picture.digest(): picture for picture in self._pictures[size].values()}
        return self._digests[size]

    def summary(self, shared: Shared) -> dict[str, Any]:
        """Return the entry of this file in check.json."""
        return {
            "part": self.part,
            "path": str(self.path),
            "rows": self.num_rows,
            "bad_rows": self.num_bad,
            "is_cut": self.is_cut,
            "error": self.error,
            "shared_rows": shared.num_rows,
            "shared_pictures": len(shared.pictures),
            "rows_showing_them": shared.num_showing,
            "first_rows": shared.rows,
            "first_pictures": list(shared.pictures.values())[:LISTED],
        }


def open_held(config: Config, encoder: Encoder, path: Path) -> Iterator[HeldOut]:
    """Read the validation and test files that a run on `path` would use; one that cannot be opened has its error."""
    for part, named in (("val", config.data.val), ("test", config.data.test)):
        if named in ("none", ""):
            continue
        file = sibling(str(path), part) if named == "auto" else find_file(named, f"data.{part}")
        if file is None:
            continue
        held = HeldOut(part, file)
        try:
            held.read(open_data(file, config, encoder).sets)
        except DataError as error:
            held.error = str(error)
        yield held


def text_digest(sample: Sample) -> bytes:
    """Hash the turns of a row (of a pair, with its chosen answer), with marks for pictures; white space is left out."""
    digest = blake2b(digest_size=16)
    for message in sample.messages:
        parts = (part if isinstance(part, str) else "\0" for part in message.parts)
        text = " ".join("".join((message.reasoning, "\0", *parts)).split())
        digest.update(f"{message.role}\1{text}\2".encode("utf-8", "surrogatepass"))
    return digest.digest()


def picture_name(picture: Picture) -> str:
    """Name a picture for messages."""
    return picture.path or "a picture of the row"
