"""Files that are no picture of a readable format are named by their first bytes, with what to do; AVIF and HEIC."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError
from vlm_tune.inspection.check import check_file
from vlm_tune.model.encoder import build_encoder

SIZE = (48, 32)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)).resize((48, 32))
BOX = b"\0\0\0\x18ftyp"


def encode(image: Image.Image, name: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, name, **options)
        return file.getvalue()


def tiff(**tags: int | bytes) -> bytes:
    numbers = {"subfile_type": 254, "dng_version": 50706}
    found = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        found[numbers[name]] = value
    return encode(PHOTO, "TIFF", tiffinfo=found)


@pytest.fixture
def reader(tmp_path: Path) -> ImageReader:
    return ImageReader(ImageConfig(), tmp_path)


OTHERS = {
    b'<svg xmlns="http://www.w3.org/2000/svg"/>': "an SVG drawing. Export it as PNG",
    b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- Inkscape -->\n<svg/>': "an SVG drawing",
    b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd"><svg:svg/>': "an SVG drawing",
    b"\n<!DOCTYPE html>\n<html>": r"a web page \(HTML\). The download did not give the picture: download it again",
    b"<html><head>403": r"a web page \(HTML\)",
    b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS. Fetch the picture itself: git lfs pull",
    b"%PDF-1.7": "a PDF document. Export its pages as PNG",
    b"%!PS-Adobe-3.0 EPSF": "a PostScript document",
    b"8BPS\0\1": r"a Photoshop file \(PSD\)",
    b"\xff\x0a\xfa\x1f": "a JPEG XL picture. Convert it",
    b"\0\0\0\x0cJXL \r\n\x87\n": "a JPEG XL picture",
    b"\0\0\0\x0cjP  \r\n\x87\n": "a JPEG 2000 picture",
    b"\xff\x4f\xff\x51\0\x2f": "a JPEG 2000 picture",
    b"\0\0\1\0\2\0\x10\x10": r"a Windows icon \(ICO\)",
    b"II*\0\x10\0\0\0CR\2\0": "a camera's RAW photo. Develop it",  # Canon CR2, a TIFF by its first bytes
    BOX + b"crx \0\0\0\1": "a camera's RAW photo",  # Canon CR3
    b"FUJIFILMCCD-RAW 0201": "a camera's RAW photo",
    b"IIU\0\x08\0\0\0": "a camera's RAW photo",  # Panasonic
    tiff(subfile_type=1): "a camera's RAW photo",  # NEF, ARW: what would be read is a stamp-sized preview
    tiff(dng_version=b"\1\4\0\0"): "a camera's RAW photo",
    b"v/1\x01\2\0\0\0": "an OpenEXR picture",
    b"#?RADIANCE\n": "a Radiance HDR picture",
    bytes(128) + b"DICM": r"a medical picture \(DICOM\)",
    BOX + b"isom\0\0\2\0": 'a video. Name it in "video", with <video> in place of <image>',
    BOX + b"qt  \0\0\2\0": "a video",
    b"\x1aE\xdf\xa3\x01\0\0\0": "a video",
    b"RIFF\0\0\0\0AVI LIST": "a video",
    b"PK\x03\x04\x14\0": "an archive. Unpack it",
    b"\x1f\x8b\x08\0": "an archive",
}


@pytest.mark.parametrize("content", OTHERS, ids=lambda content: ascii(content[:24]))
def test_what_is_no_picture_is_named(content: bytes, reader: ImageReader) -> None:
    with pytest.raises(DataError, match=f"is not an image of a known format: it is {OTHERS[content]}"):
        reader.read_size(Picture("", content=content))


@pytest.mark.parametrize("content", [b"hello", bytes(200), b"<title>", b"<?xml version='1.0'?><gpx/>"])
def test_what_nobody_knows_is_shown(content: bytes, reader: ImageReader) -> None:
    with pytest.raises(DataError, match=r"is not an image of a known format \(it starts with b.*\). Readable are JPEG"):
        reader.read_size(Picture("", content=content))


def test_an_ordinary_tiff_is_no_raw_photo(reader: ImageReader) -> None:
    assert reader.read_size(Picture("", content=tiff(subfile_type=0))) == SIZE


def test_check_counts_them_as_no_images(tmp_path: Path, parts: list[str]) -> None:
    (tmp_path / "a.svg").write_bytes(b"<svg/>")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A drawing."}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"image": "a.svg", "conversations": said}) + "\n")
    config = load_config(["data=own", *parts, f"data.path={tmp_path}/train.jsonl", "data.workers=0"])
    found = check_file(config, build_encoder(config)[0], tmp_path / "train.jsonl")
    assert [fault.kind for fault in found.faults] == ["not an image"]


# AVIF


def test_avif_is_read_whatever_the_file_is_called(tmp_path: Path, reader: ImageReader) -> None:
    content = encode(PHOTO, "AVIF", quality=90)
    (tmp_path / "a.jpg").write_bytes(content)
    assert reader.check_picture(Picture("a.jpg")) == SIZE
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(reader.open_picture(Picture("a.jpg"))), np.asarray(image))


def test_avif_of_another_main_brand_is_read(reader: ImageReader) -> None:
    content = encode(PHOTO, "AVIF").replace(b"ftypavif\0\0\0\0avifmif1", b"ftypmif1\0\0\0\0mif1avif", 1)
    assert reader.read_size(Picture("", content=content)) == SIZE


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9])
def test_a_truncated_avif_is_found_without_decoding(share: float, reader: ImageReader) -> None:
    content = encode(PHOTO, "AVIF")
    picture = Picture("", content=content[: int(len(content) * share)])
    for read in (reader.check_picture, reader.open_picture):
        with pytest.raises(DataError, match="is a truncated or damaged AVIF file: "):
            read(picture)


def test_checking_a_whole_avif_decodes_nothing(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_tune.data.pictures.images.decode_rgb", None)
    assert reader.check_picture(Picture("", content=encode(PHOTO, "AVIF"))) == SIZE


def test_an_avif_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    picture = Picture("", content=encode(PHOTO, "AVIF"))
    with pytest.raises(DataError, match=r"is too large: 48 x 32 pixels, data.image.max_pixels=1000"):
        ImageReader(ImageConfig(max_pixels=1000), tmp_path).read_size(picture)


# HEIC


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc", b"msf1"])
def test_heic_names_the_package_that_reads_it(
    brand: bytes, reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    content = BOX + brand + b"\0\0\0\0mif1heic" + bytes(40)
    with pytest.raises(DataError, match=r"is a HEIC picture, which needs the package pillow-heif: .* pip install"):
        reader.read_size(Picture("", content=content))


def heic(image: Image.Image) -> bytes:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (pip install '.[heic]')")
    with io.BytesIO() as file:
        heif.from_pillow(image).save(file, quality=100)
        return file.getvalue()


def test_heic_is_read_where_the_package_is_installed(tmp_path: Path, reader: ImageReader) -> None:
    image = Image.new("RGB", SIZE, (200, 10, 30))
    (tmp_path / "IMG_0001.jpg").write_bytes(heic(image))  # as iPhones call it
    assert reader.check_picture(Picture("IMG_0001.jpg")) == SIZE
    opened = np.asarray(reader.open_picture(Picture("IMG_0001.jpg"))).astype(int)
    np.testing.assert_allclose(opened, np.broadcast_to((200, 10, 30), opened.shape), atol=4)


def test_a_truncated_heic_is_found(reader: ImageReader) -> None:
    content = heic(PHOTO)
    for share in (0.2, 0.9):
        with pytest.raises(DataError, match="is a truncated or damaged HEIF file: "):
            reader.check_picture(Picture("", content=content[: int(len(content) * share)]))


def test_transparent_heic_is_laid_over_the_colour(tmp_path: Path) -> None:
    content = heic(Image.new("RGBA", SIZE, (10, 200, 30, 0)))
    image = ImageReader(ImageConfig(alpha="white"), tmp_path).open_picture(Picture("", content=content))
    assert np.asarray(image).min() == 255
