"""What a picture file is, by its first bytes alone: the supported formats, and messages for the others."""

import re
from typing import BinaryIO

from vlm_tune.errors import DataError

# Supported formats by their first bytes. The file name plays no part, and no other decoder is ever tried.
FORMATS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "TIFF": rb"II[*+]\x00(?!.{4}CR)|MM\x00[*+]",  # not Canon's CR2
    "PPM": rb"P[1-6]\s",
    "AVIF": rb".{4}ftyp(avi[fs]|(mif1|msf1).{4}(.{4}){0,8}?avi[fs])",
}
OPAQUE = ("JPEG", "BMP", "PPM")  # never transparent
HEIF = "HEIF"  # Apple's pictures: read by pillow-heif if it is installed
_HEIF = rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)"
_READABLE = {name: re.compile(pattern, re.DOTALL) for name, pattern in {**FORMATS, HEIF: _HEIF}.items()}
_HEAD = 64  # bytes
_LONG_HEAD = 4096  # bytes of an unsupported file that are read to name it

_AS_PNG = "Export it as PNG"
_DEVELOP = "Develop it, and export it as JPEG or PNG"
# Files that people mistake for supported pictures: what it is, and what to do.
_OTHERS = {
    rb"\s*(<\?xml.*?>\s*|<!--.*?-->\s*|<!DOCTYPE svg.*?>\s*)*<(\w+:)?svg\b": ("an SVG drawing", _AS_PNG),
    rb"\s*(<\?xml.*?>\s*|<!--.*?-->\s*)*<(!doctype )?html\b": (
        "a web page (HTML)",
        "The download did not give the picture: download it again",
    ),
    rb"version https://git-lfs": ("a pointer of Git LFS", "Fetch the picture itself: git lfs pull"),
    rb"%PDF-": ("a PDF document", "Export its pages as PNG"),
    rb"%!PS|\xc5\xd0\xd3\xc6": ("a PostScript document", _AS_PNG),
    rb"8BPS": ("a Photoshop file (PSD)", _AS_PNG),
    rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n": ("a JPEG XL picture", "Convert it to PNG or JPEG"),
    rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n": ("a JPEG 2000 picture", "Convert it to PNG or JPEG"),
    rb"\0\0[\x01\x02]\0[^\0]\0": ("a Windows icon (ICO)", _AS_PNG),
    rb"II[*]\0.{4}CR|IIR[OS]|IIU\0|FUJIFILMCCD-RAW|.{4}ftypcrx |FOVb|\0MRM": ("a camera's RAW photo", _DEVELOP),
    rb"v/1\x01": ("an OpenEXR picture", _AS_PNG),
    rb"#\?(RADIANCE|RGBE)": ("a Radiance HDR picture", _AS_PNG),
    rb".{128}DICM": ("a medical picture (DICOM)", _AS_PNG),
    rb"\x93NUMPY": ("a NumPy array", "Save it as PNG"),
    rb".{4}(ftyp|moov)|\x1aE\xdf\xa3|RIFF.{4}AVI ": (
        "a video",
        'Name it in "video", with <video> in place of <image>; or extract the frame that you mean',
    ),
    rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf\x27\x1c|Rar!": ("an archive", "Unpack it, and give the picture's path"),
}
_FOREIGN = [(re.compile(pattern, re.DOTALL | re.IGNORECASE), words) for pattern, words in _OTHERS.items()]


def find_format(file: BinaryIO) -> str:
    """Return the name of the format, judging by the first bytes, and rewind the file.

    Raise DataError for an unsupported file; it says what the file is, if known, and what to do.
    """
    first = file.read(_HEAD)
    file.seek(0)
    for name, signature in _READABLE.items():
        if signature.match(first):
            if name == HEIF:
                _require_heif()
            return name
    first = file.read(_LONG_HEAD).removeprefix(b"\xef\xbb\xbf")
    file.seek(0)
    for pattern, (what, remedy) in _FOREIGN:
        if pattern.match(first):
            raise DataError(f"is not an image of a known format: it is {what}. {remedy}")
    readable = ", ".join(FORMATS)
    raise DataError(f"is not an image of a known format (it starts with {first[:16]!r}). Readable are {readable}")


def _require_heif() -> None:
    """Register HEIF with Pillow; raise DataError if the package for it is missing."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise DataError(
            f"is a HEIC picture, which needs the package pillow-heif: {error}. pip install pillow-heif, or convert "
            "the picture to JPEG"
        ) from error
    register_heif_opener()
