"""Pictures are read safely: each fault is a DataError with its place, and the header tells the decoded size."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.pictures.signatures import FORMATS
from vlm_tune.data.sample import Picture
from vlm_tune.errors import DataError

SIZE = (60, 40)
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
PHOTO = Image.fromarray(PIXELS)


def encode(image: Image.Image, name: str = "PNG", **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, name, **options)
        return file.getvalue()


def with_orientation(orientation: int, name: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PHOTO, name, exif=exif)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return an image root with one good picture, beside a picture that is out of it."""
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "cat.png").write_bytes(encode(PHOTO))
    (tmp_path / "outside.png").write_bytes(encode(PHOTO))
    return folder


@pytest.fixture
def reader(root: Path) -> ImageReader:
    return ImageReader(ImageConfig(), root)


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_are_read_whatever_the_file_is_called(name: str, root: Path, reader: ImageReader) -> None:
    (root / "picture").write_bytes(encode(PHOTO, name))
    assert reader.check_picture(Picture("picture")) == SIZE
    image = reader.open_picture(Picture("picture"))
    assert (image.mode, image.size) == ("RGB", SIZE)


def test_content_of_the_row_is_read_instead_of_a_path(reader: ImageReader) -> None:
    picture = Picture("", content=encode(PHOTO))
    assert reader.read_size(picture) == SIZE
    np.testing.assert_array_equal(np.asarray(reader.open_picture(picture)), PIXELS)


@pytest.mark.parametrize("path", ["cat.png", "./cat.png", "sub/../cat.png", "{root}/cat.png"])
def test_paths_inside_the_root_are_read(path: str, root: Path, reader: ImageReader) -> None:
    assert reader.read_size(Picture(path.format(root=root))) == SIZE


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (
            "../outside.png",
            "lies outside the image root .*root: it is .*outside.png. Move it there, or set data.image.r",
        ),
        ("{root}/../outside.png", "lies outside the image root"),
        ("/etc/hostname", "lies outside the image root .*: it is /etc/hostname"),
        ("link.png", "is a symbolic link out of the image root .*root: it is .*outside.png"),
        ("https://example.org/cat.png", "is a URL; pictures are read from disk only. Download it"),
        ("", "a picture of the row has no valid path"),
        ("a\0b", r'picture "a\\x00b" has no valid path'),
        ("x" * 300, "cannot be read: File name too long"),
        ("sub", "is not a file. Give the path of a picture file"),
        ("pipe", "is not a file. Give the path of a picture file"),
        (
            "cat.jpg",
            'is not there; did you mean "cat.png" of the same folder\\? Paths are relative to data.image.root=',
        ),
        ("CAT.PNG", r'is not there; did you mean "cat.png"\? It differs only in the case of letters: write it so'),
        ("catt.png", 'is not there; did you mean "cat.png" of the same folder'),
        ("dog.png", "is not there. Paths are relative to data.image.root=.*root"),
        ("nowhere/cat.png", "is not there, and .*nowhere is no folder with files. Paths are relative"),
        ("cat.png/cat.png", "is not there, and"),
        ("zero.png", r"is empty \(0 bytes\). Copy it again, or remove the row"),
        ("page.png", r"is not an image of a known format \(it starts with b'<title>'\). Readable are JPEG, PNG"),
    ],
)
def test_each_fault_of_a_path_has_its_reason(path: str, reason: str, root: Path, reader: ImageReader) -> None:
    os.symlink(root.parent / "outside.png", root / "link.png")
    os.mkfifo(root / "pipe")
    (root / "zero.png").touch()
    (root / "page.png").write_text("<title>")
    with pytest.raises(DataError, match=reason) as caught:
        reader.read_size(Picture(path.format(root=root)), "train.jsonl:17", "dish_0042")
    assert str(caught.value).startswith('train.jsonl:17 (id "dish_0042"): ')
    assert (caught.value.where, caught.value.sample_id) == ("train.jsonl:17", "dish_0042")


def test_a_link_inside_the_root_is_followed(root: Path, reader: ImageReader) -> None:
    os.symlink(root / "cat.png", root / "link.png")
    assert reader.read_size(Picture("link.png")) == SIZE


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    os.symlink(root, root.parent / "linked")
    assert ImageReader(ImageConfig(), root.parent / "linked").read_size(Picture("cat.png")) == SIZE


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", list(FORMATS))
def test_truncated_files_are_found_without_and_with_decoding(name: str, share: float, reader: ImageReader) -> None:
    whole = encode(PHOTO, name)
    picture = Picture("", content=whole[: int(len(whole) * share)])
    for read in (reader.check_picture, reader.open_picture):
        with pytest.raises(DataError, match=rf"is a truncated or damaged {name} file: .*Copy or export it again"):
            read(picture)


def test_a_truncated_header_is_found(reader: ImageReader) -> None:
    with pytest.raises(DataError, match=r"is a truncated or damaged JPEG file: its header is not complete"):
        reader.read_size(Picture("", content=encode(PHOTO, "JPEG")[:20]))


@pytest.mark.parametrize("name", list(FORMATS))
def test_bytes_behind_the_end_are_no_fault(name: str, reader: ImageReader) -> None:
    assert reader.check_picture(Picture("", content=encode(PHOTO, name) + bytes(50))) == SIZE


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF"])
def test_checking_a_whole_file_decodes_nothing(name: str, reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.core, "new", None)  # what allocates the pixels
    monkeypatch.setattr("vlm_tune.data.pictures.images.decode_rgb", None)
    assert reader.check_picture(Picture("", content=encode(PHOTO, name))) == SIZE


def test_empty_content_is_refused(reader: ImageReader) -> None:
    with pytest.raises(DataError, match=r"a picture of the row is empty \(0 bytes\)"):
        reader.read_size(Picture("", content=b""))


def test_too_many_pixels_are_refused_from_the_header(root: Path) -> None:
    reader = ImageReader(ImageConfig(max_pixels=2399), root)
    with pytest.raises(DataError, match=r"is too large: 60 x 40 pixels, data.image.max_pixels=2399. Make it smaller"):
        reader.read_size(Picture("cat.png"))


def test_a_decompression_bomb_is_refused_whatever_the_limit(root: Path) -> None:
    header = bytearray(encode(PHOTO, "PPM").replace(b"60 40", b"60000 40000"))
    reader = ImageReader(ImageConfig(max_pixels=10**12), root)
    with pytest.raises(DataError, match=r"is too large for Pillow: .*2400000000 pixels.* Make it smaller"):
        reader.read_size(Picture("", content=bytes(header)))


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ((61, 40), r"is 60 x 40 pixels, the row declares 61 x 40. Correct its width and height"),
        ((40, 60), r"is 60 x 40 pixels, the row declares 40 x 60, its sides swapped. Correct its width and height"),
    ],
)
def test_a_declared_size_that_lies_is_refused(declared: tuple[int, int], reason: str, reader: ImageReader) -> None:
    assert reader.read_size(Picture("cat.png", size=SIZE)) == SIZE
    for read in (reader.read_size, reader.open_picture):
        with pytest.raises(DataError, match=reason):
            read(Picture("cat.png", size=declared))


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured_where_asked(orientation: int, name: str, root: Path) -> None:
    picture = Picture("", content=with_orientation(orientation, name))
    reader = ImageReader(ImageConfig(exif=True), root)
    image = reader.open_picture(picture)
    with Image.open(io.BytesIO(picture.content or b"")) as original:
        upright = ImageOps.exif_transpose(original).convert("RGB")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))
    assert reader.read_size(picture) == image.size == (SIZE if orientation < 5 else SIZE[::-1])


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_ignored_by_default(orientation: int, reader: ImageReader) -> None:
    picture = Picture("", content=with_orientation(orientation, "PNG"))
    assert reader.read_size(picture) == SIZE
    np.testing.assert_array_equal(np.asarray(reader.open_picture(picture)), PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK"])
def test_modes_become_rgb_as_pillow_converts_them(mode: str, reader: ImageReader) -> None:
    image = PHOTO.convert(mode)
    opened = reader.open_picture(Picture("", content=encode(image, "TIFF")))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_blended(reader: ImageReader) -> None:
    image = PHOTO.copy()
    image.putalpha(0)
    np.testing.assert_array_equal(np.asarray(reader.open_picture(Picture("", content=encode(image)))), PIXELS)


@pytest.mark.filterwarnings("error")
def test_transparency_of_a_palette_is_dropped(reader: ImageReader) -> None:
    image = PHOTO.convert("P")
    content = encode(image, transparency=bytes(range(256)))
    opened = reader.open_picture(Picture("", content=content))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_high_byte(name: str, reader: ImageReader) -> None:
    grey = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[::-1]) * 27
    opened = reader.open_picture(Picture("", content=encode(Image.fromarray(grey), name)))
    np.testing.assert_array_equal(np.asarray(opened), np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_defined_white_are_refused(mode: str, reader: ImageReader) -> None:
    with pytest.raises(DataError, match=r"has 32 bits a channel, for which white is not defined. Convert it to 8 bits"):
        reader.read_size(Picture("", content=encode(PHOTO.convert(mode), "TIFF")))


def test_the_first_frame_of_an_animation_counts(reader: ImageReader) -> None:
    black = Image.new("RGB", SIZE)
    content = encode(black, "WEBP", save_all=True, append_images=[PHOTO], lossless=True)
    assert np.asarray(reader.open_picture(Picture("", content=content))).max() == 0


def test_pillow_stays_as_it_was(reader: ImageReader) -> None:
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    reader.open_picture(Picture("cat.png"))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before == (89478485, False)
