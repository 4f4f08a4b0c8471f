"""Files derived from the user's (offsets, unpacked copies, Arrow tables): made once, found again by content."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from vlm_tune.errors import DataError

CODECS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 24  # bytes read at once
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def content_key(path: Path) -> str:
    """Return a key for the content of a file: its size, its time and a hash of 16 samples, cheap for any size.

    Size and time alone miss an edit that keeps both (an archive unpacked with old times, a copy with preserved times).
    """
    stat = path.stat()
    digest = hashlib.sha256(f"rows-1 {stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        for start in _sample_starts(stat.st_size):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:20]


def sampled(content: bytes) -> Iterator[bytes]:
    """Yield what identifies a picture inside a row, as `content_key` does for a file: its size and 16 samples."""
    yield f"{len(content)} ".encode()
    yield from (content[start : start + _SAMPLE_BYTES] for start in _sample_starts(len(content)))


def hashed(parts: Iterable[bytes]) -> int:
    """Hash a list of strings to 64 bits; never 0, which means "no hash"."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") is not ("a", "bc")
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


def _sample_starts(size: int) -> list[int]:
    return [max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1) for number in range(_SAMPLES)]


def derived(path: Path, folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the file that `make` derives from `path`, creating it only if it does not exist yet.

    If several processes ask at once, one creates it and the others wait. Nobody ever sees a half-written file.
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
    """Return an uncompressed copy of a gzip or zstd file, since random access into those reads from the start.

    Raise DataError for a damaged or truncated file.
    """

    def unpack(target: Path) -> None:
        codec = CODECS[path.suffix.lower()]
        try:
            with pa.input_stream(str(path), compression=codec) as source, target.open("wb") as out:
                while block := source.read(BLOCK):
                    out.write(block)
        except OSError as error:
            raise DataError(f"cannot be unpacked: {error}. Copy or download it again.", path.name) from error

    inner = path.with_suffix(".tar").name if path.suffix.lower() == ".tgz" else path.stem
    return derived(path, folder, inner, unpack)
