"""Files derived from the user's (offsets, unpacked copies, Arrow tables): made once, found again by content."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from vlm_tune.data.fetch import cache_folder
from vlm_tune.errors import DataError

CODECS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 24  # bytes read at once
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def rows_folder(folder: Path | None) -> Path:
    """Return the folder of derived files: the caller's, or one in the user's cache."""
    return folder if folder is not None else cache_folder() / "rows"


def content_key(path: Path) -> str:
    """Name what a file holds by its size, its time and a hash of 16 samples: cheap for any size.

    Size and time alone miss an edit that keeps both (an archive unpacked with old times, a copy with preserved times).
    """
    stat = path.stat()
    digest = hashlib.sha256(f"rows-1 {stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(max(0, stat.st_size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:20]


def derived(path: Path, folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the file that `make` derives from `path`, made only where it is not there yet.

    Several processes may ask at once: one makes it, the others wait. A half-written file is never seen.
    """
    target = folder / f"{content_key(path)}-{name}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = folder / f".{target.name}.{os.getpid()}"
            try:
                make(partial)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target


def unpacked(path: Path, folder: Path) -> Path:
    """Return the plain copy of a gzip or zstd file; random access into a compressed one would read it from its start.

    Raise DataError for a damaged or cut-off file.
    """

    def unpack(target: Path) -> None:
        try:
            with (
                pa.input_stream(str(path), compression=CODECS[path.suffix.lower()]) as source,
                target.open("wb") as out,
            ):
                while block := source.read(BLOCK):
                    out.write(block)
        except OSError as error:
            raise DataError(f"cannot be unpacked: {error}. Copy or download it again.", path.name) from error

    inner = path.with_suffix(".tar").name if path.suffix.lower() == ".tgz" else path.stem
    return derived(path, folder, inner, unpack)
