"""Read the user's pictures safely: only inside the image root, only known formats, each fault with an error of its own.

Plumbing before tiles (2). The size comes from the header, without decoding, so that millions of rows can be indexed.
"""

import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

# Pillow knows a format once its plugin is imported; without these it would import every plugin to find these three.
from PIL import AvifImagePlugin, ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures import videos
from vlm_tune.data.pictures.near_paths import near
from vlm_tune.data.pictures.pixels import decode_rgb, shows_through
from vlm_tune.data.pictures.signatures import HEIF, OPAQUE, find_format
from vlm_tune.data.pictures.whole_files import is_whole
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError

# The end of a complete file. Other formats are decoded to find out, and so are files with something after their end.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"\x00\x00\x00\x00IEND\xae\x42\x60\x82", "GIF": b"\x00;"}
_UPRIGHT_READERS = ("TIFF", HEIF)  # whose readers turn a picture upright, size included, whether asked to or not
_END_BYTES = 4096  # at each end of a file
_MAX_CHECKED = 1 << 16  # pictures that one process remembers: about 20 MB

# EXIF orientation -> what turns the picture upright, as in PIL.ImageOps.exif_transpose. From 5 on, the sides swap.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Look(NamedTuple):
    """What a header says of a picture that a setting decides on."""

    has_alpha: bool  # it can hold transparency
    is_turned: bool  # stored turned or mirrored, by its EXIF orientation


class _Header(NamedTuple):
    """An open picture of which only the header has been read."""

    image: Image.Image
    file: BinaryIO
    format: str
    upright: Image.Transpose | None  # what the EXIF orientation asks for, if it is honoured
    size: tuple[int, int]  # (width, height) in pixels, upright


class ImageReader:
    """Read pictures whose paths are relative to `root`; every fault is a DataError with `where` and the sample's id.

    The faults: a missing, empty or unreadable file, not an image, truncated or damaged, more than config.max_pixels
    pixels, a path out of the root (`..`, absolute, symbolic link), a URL, a declared size that is not the file's,
    pixels without a defined brightness. There is no global state, so workers and several data sets can read side by
    side.
    """

    def __init__(self, config: ImageConfig, root: Path) -> None:
        self.config = config
        self.root = os.path.realpath(root)

    def read_size(self, picture: Picture, where: str = "", sample_id: str | None = None) -> tuple[int, int]:
        """Return (width, height) in pixels from the header alone: the size of what `open_picture` will return.

        With config.exif the sides are swapped if the EXIF orientation says so. Raise DataError.
        """
        if picture.frame is not None:
            return self._read_video_size(picture, where, sample_id)
        with self._opened(picture, where, sample_id) as header:
            return header.size

    def check_picture(self, picture: Picture, where: str = "", sample_id: str | None = None) -> tuple[int, int]:
        """Return the size as `read_size` does, but raise DataError for a truncated file, too.

        A file that ends as its format does is taken as complete, a check that costs almost nothing; any other (cut off,
        or with something after its end) is decoded to be certain. A video is compared with its own index.
        """
        if picture.frame is not None:
            return self._read_video_size(picture, where, sample_id)
        with self._opened(picture, where, sample_id) as header:
            if not _ends_properly(header):
                self._decode(header)
            return header.size

    def read_content(self, picture: Picture, where: str = "", sample_id: str | None = None) -> bytes:
        """Return bytes that identify the picture's pixels: the encoded file; for a frame, the video's hash and number.

        The path is restricted as everywhere. Raise DataError.
        """
        with self._naming(picture, where, sample_id):
            if picture.frame is not None:
                return b"%s frame %d" % (videos.digest(self._inside_root(picture.path)), picture.frame)
            with self.open_encoded(picture) as file:
                return file.read()

    def read_ends(self, picture: Picture, where: str = "", sample_id: str | None = None) -> bytes:
        """Return the size and both ends of the file of a picture or video, which differ for all but made-up files.

        A compressed picture's end depends on all of its pixels or on their number of bytes; of one that is not (BMP,
        PPM), a change in the middle is missed. Raise DataError.
        """
        with self._naming(picture, where, sample_id), self.open_encoded(picture) as file:
            first, size = file.read(_END_BYTES), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END_BYTES))
            return b"%d %s %s" % (size, first, file.read())

    def open_picture(self, picture: Picture, where: str = "", sample_id: str | None = None) -> Image.Image:
        """Return the decoded picture, RGB, upright if config.exif is set. Raise DataError.

        `pixels.decode_rgb` converts the mode and treats transparency as config.alpha says; of an animation, the first
        frame is taken.
        """
        if picture.frame is not None:
            return next(self.open_pictures([picture], where, sample_id))
        with self._opened(picture, where, sample_id) as header:
            image = self._decode(header)
            return image if header.upright is None else image.transpose(header.upright)

    def read_look(self, picture: Picture) -> Look:
        """Return what a file's header says of its look. Raise DataError."""
        with self._opened(picture, "", None) as header:
            has_alpha = header.format not in OPAQUE and header.image.has_transparency_data
            return Look(has_alpha, header.format not in _UPRIGHT_READERS and _read_orientation(header.image) != 1)

    def shows_through(self, picture: Picture) -> bool:
        """Decode the picture; return whether any pixel is not opaque, so that config.alpha matters. Raise DataError."""
        with self._opened(picture, "", None) as header, _damage(header.format):
            return shows_through(header.image)

    def open_pictures(
        self, pictures: Sequence[Picture], where: str = "", sample_id: str | None = None
    ) -> Iterator[Image.Image]:
        """Yield the decoded pictures as `open_picture` does; a video is opened once for consecutive frames."""
        for path, group in groupby(pictures, key=lambda picture: None if picture.frame is None else picture.path):
            members = list(group)
            if path is None:
                yield from (self.open_picture(picture, where, sample_id) for picture in members)
                continue
            with self._naming(members[0], where, sample_id):
                numbers = [picture.frame for picture in members if picture.frame is not None]
                yield from videos.read_frames(self._inside_root(path), numbers)

    def _read_video_size(self, picture: Picture, where: str, sample_id: str | None) -> tuple[int, int]:
        with self._naming(picture, where, sample_id):
            size = videos.read_header(self._inside_root(picture.path)).size
            self._check_pixels(*size)
            return size

    @contextmanager
    def _opened(self, picture: Picture, where: str, sample_id: str | None) -> Iterator[_Header]:
        """Open the picture and read its header; add its name, `where` and the id to every fault, also of the body."""
        with self._naming(picture, where, sample_id), self.open_encoded(picture) as file:
            yield self._read_header(picture, file)

    @contextmanager
    def _naming(self, picture: Picture, where: str, sample_id: str | None) -> Iterator[None]:
        """Add the picture's name, `where` and the id to every fault."""
        try:
            yield
        except DataError as error:
            shown = picture.path if picture.path.isprintable() else ascii(picture.path)[1:-1]
            name = f'picture "{shown}"' if picture.frame is None else f'video "{shown}"'
            name = name if shown else "a picture of the row"
            raise DataError(f"{name} {error.reason}", where, sample_id) from error

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.config.max_pixels:
            limit = f"data.image.max_pixels={self.config.max_pixels}"
            raise DataError(f"is too large: {width} x {height} pixels, {limit}. Make it smaller, or raise the limit")

    def open_encoded(self, picture: Picture) -> BinaryIO:
        """Open the encoded picture, or the whole video of a frame, for reading.

        Raise DataError for a path outside the root and for anything that is not a file.
        """
        if picture.content is not None:
            if not picture.content:
                raise DataError("is empty (0 bytes). Write the file's bytes into the row again")
            return io.BytesIO(picture.content)
        path = self._inside_root(picture.path)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
                raise DataError("is not a file. Give the path of a picture file")
            if status.st_size == 0:
                raise DataError("is empty (0 bytes). Copy it again, or remove the row")
            return open(path, "rb")  # closed by the `with` of the caller
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DataError(
                f"is not there{near(self.root, picture.path)} Paths are relative to data.image.root={self.root}"
            ) from error
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}. Check the file and its permissions") from error

    def _inside_root(self, path: str) -> str:
        """Return the real path; raise DataError for a URL, no path, and anything outside the image root."""
        if "://" in path and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
            raise DataError("is a URL; pictures are read from disk only. Download it and give the file's path")
        if not path or "\0" in path:
            raise DataError("has no valid path. Give the path of a picture file")
        plain = os.path.normpath(os.path.join(self.root, path))
        folder, name = os.path.split(plain)
        try:
            real = os.path.join(_real_folder(folder), name)
            if os.path.islink(real):
                real = os.path.realpath(real)
        except (OSError, ValueError) as error:
            raise DataError(f"has no valid path: {error}. Give the path of a picture file") from error
        inside = os.path.join(self.root, "")
        for candidate, fault in ((plain, "lies outside"), (real, "is a symbolic link out of")):
            if not os.path.join(candidate, "").startswith(inside):
                remedy = "Move it there, or set data.image.root to a folder that holds all pictures"
                raise DataError(f"{fault} the image root {self.root}: it is {candidate}. {remedy}")
        return real

    def _read_header(self, picture: Picture, file: BinaryIO) -> _Header:
        """Read the header and compare it with the limits and with the size that the row declares."""
        name = find_format(file)
        with _damage(name):
            image = Image.open(file, formats=[name])
            orientation = _read_orientation(image) if self.config.exif and name not in _UPRIGHT_READERS else 1
        width, height = image.size if orientation < 5 else image.size[::-1]
        self._check_pixels(width, height)
        if image.mode == "F" or (image.mode == "I" and name != "PPM"):  # 16-bit PPM comes as mode I
            raise DataError("has 32 bits a channel, for which white is not defined. Convert it to 8 bits a channel")
        if picture.size is not None and picture.size != (width, height):
            declared = f"the row declares {picture.size[0]} x {picture.size[1]}"
            turned = ", its sides swapped" if picture.size == (height, width) else ""
            raise DataError(f"is {width} x {height} pixels, {declared}{turned}. Correct its width and height")
        if name == "TIFF" and _is_preview(image):
            remedy = "Develop it, and export it as JPEG or PNG"
            raise DataError(f"is not an image of a known format: it is a camera's RAW photo. {remedy}")
        return _Header(image, file, name, _UPRIGHT.get(orientation), (width, height))

    def _decode(self, header: _Header) -> Image.Image:
        """Decode to RGB; raise DataError for a file that is truncated or damaged."""
        with _damage(header.format):
            return decode_rgb(header.image, self.config.alpha)


class CheckedPictures:
    """Check each picture file only once in a pass of one process over the rows, however many rows show it."""

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader
        self._found: dict[Picture, tuple[int, int] | str] = {}  # size, or the fault

    def check(self, picture: Picture, where: str = "", sample_id: str | None = None) -> tuple[int, int]:
        """Return the size as `ImageReader.check_picture` does, from memory if possible. Raise DataError."""
        if picture.content is not None:
            return self._reader.check_picture(picture, where, sample_id)
        found = self._found.get(picture)
        if found is None:
            try:
                found = self._reader.check_picture(picture)
            except DataError as error:
                found = error.reason
            if len(self._found) >= _MAX_CHECKED:
                self._found.clear()
            self._found[picture] = found
        if isinstance(found, str):
            raise DataError(found, where, sample_id)
        return found


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8, from the header alone.

    This calls the base class, since PngImageFile.getexif would decode the whole picture to find EXIF after the pixels.
    """
    found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def _ends_properly(header: _Header) -> bool:
    """Whether the file ends as its format does; False if that cannot be known."""
    position = header.file.tell()
    if end := _ENDS.get(header.format):
        header.file.seek(-len(end), os.SEEK_END)
        ends = header.file.read() == end
    else:
        ends = header.format in ("AVIF", HEIF) and is_whole(header.format, header.file)
    header.file.seek(position)  # Pillow continues from where it stopped reading
    return ends


def _is_preview(image: Image.Image) -> bool:
    """Whether a TIFF begins with a preview of its content, as RAW photos (NEF, ARW, DNG, ...) do."""
    tags = getattr(image, "tag_v2", {})
    subfile_type, dng_version = tags.get(254, 0), tags.get(50706)
    return dng_version is not None or (isinstance(subfile_type, int) and bool(subfile_type & 1))


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Report whatever a decoder raises as a fault of the file."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"is too large for Pillow: {error} Make it smaller") from error
    except Exception as error:  # a decoder may raise anything on damaged bytes
        detail = "its header is not complete" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(". ")
        raise DataError(f"is a truncated or damaged {name} file: {detail}. Copy or export it again") from error


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """Resolve the links of a folder once: doing it for each picture takes as long as reading its header."""
    return os.path.realpath(folder)
