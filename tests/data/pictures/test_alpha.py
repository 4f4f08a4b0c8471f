"""Transparent pictures become what data.image.alpha says, in every mode that has it; `check` counts them."""

import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import ImageConfig
from vlm_tune.data.pictures.feature_cache import fingerprint
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.errors import ConfigError
from vlm_tune.export.export import handing_over
from vlm_tune.inspection.check import check_file
from vlm_tune.inspection.check_report import facts, summarise
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.fill_cache import _settings
from vlm_tune.pages.report_html import thumbnail
from vlm_tune.serve.chat import Chat

SIZE = (24, 16)
RED, HIDDEN = (200, 10, 30), (10, 200, 30)  # seen on the left, hidden on the right
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0), "#8000ff": (128, 0, 255)}


def stamp() -> Image.Image:
    """Return a picture whose right half is transparent."""
    image = Image.new("RGBA", SIZE, (*HIDDEN, 0))
    image.paste((*RED, 255), (0, 0, SIZE[0] // 2, SIZE[1]))
    return image


def encode(image: Image.Image, name: str = "PNG", **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, name, **options)
        return file.getvalue()


def palette(transparency: int | bytes) -> bytes:
    """Write a PNG of two colours, the second of which is transparent."""
    image = Image.new("P", SIZE, 1)
    image.putpalette([*RED, *HIDDEN])
    image.paste(0, (0, 0, SIZE[0] // 2, SIZE[1]))
    return encode(image, transparency=transparency)


def png(depth: int, colour_type: int, row: bytes, key: tuple[int, ...] = ()) -> bytes:
    """Write a PNG of one row by hand: Pillow writes neither few bits nor 16-bit colour."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    width = 8 * len(row) // depth // {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    head = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = chunk(b"IHDR", head) + transparent + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def opened(content: bytes, alpha: str) -> np.ndarray:
    return np.asarray(ImageReader(ImageConfig(alpha=alpha), Path("/")).open_picture(Picture("", content=content)))


# Each file's left side is opaque, its right side is transparent.
FILES = {
    "RGBA.png": encode(stamp()),
    "RGBA.webp": encode(stamp(), "WEBP", lossless=True),
    "lossy.webp": encode(stamp(), "WEBP", quality=95),
    "RGBA.avif": encode(stamp(), "AVIF", quality=100, subsampling="4:4:4"),
    "RGBA.tiff": encode(stamp(), "TIFF"),
    "LA.png": encode(stamp().convert("LA")),
    "LA.tiff": encode(stamp().convert("LA"), "TIFF"),
    "PA.tiff": encode(stamp().convert("PA"), "TIFF"),
    "P with one index.png": palette(1),
    "P with a table.png": palette(b"\xff\x00"),
    "P.gif": encode(stamp(), "GIF"),
    "1 bit.png": png(1, 0, b"\xf0", (0,)),
    "L of 2 bits.png": png(2, 0, b"\xaf\x55", (1,)),
    "L of 4 bits.png": png(4, 0, b"\xaa\x33", (3,)),
    "L.png": png(8, 0, b"\x05\x05\x04\x04", (4,)),
    "L of 16 bits.png": png(16, 0, words(2001, 2001, 2000, 2000), (2000,)),
    "RGB.png": png(8, 2, bytes([*RED, *RED, *HIDDEN, *HIDDEN]), HIDDEN),
    "RGB of 16 bits.png": png(16, 2, words(*[51400, 2570, 7710] * 2, *[2570, 51400, 7710] * 2), (2570, 51400, 7710)),
    "LA of 16 bits.png": png(16, 4, words(*[5000, 65535] * 2, *[9000, 0] * 2)),
    "RGBA of 16 bits.png": png(16, 6, words(*[51400, 2570, 7710, 65535] * 2, *[2570, 51400, 7710, 0] * 2)),
}


@pytest.mark.parametrize("alpha", COLOURS)
@pytest.mark.parametrize("name", FILES)
def test_the_colour_is_seen_where_the_picture_is_transparent(name: str, alpha: str) -> None:
    dropped, laid = opened(FILES[name], "drop"), opened(FILES[name], alpha)
    assert laid.shape == dropped.shape
    np.testing.assert_array_equal(laid[:, 0], dropped[:, 0])  # opaque: as it is
    np.testing.assert_array_equal(laid[:, -1], [COLOURS[alpha]] * len(laid))


@pytest.mark.parametrize("name", FILES)
def test_the_header_alone_tells_that_there_is_alpha(name: str) -> None:
    reader, picture = ImageReader(ImageConfig(), Path("/")), Picture("", content=FILES[name])
    assert reader.read_look(picture).has_alpha
    assert reader.shows_through(picture)


@pytest.mark.parametrize(
    "content",
    [encode(stamp().convert("RGB")), encode(stamp().convert("RGB"), "JPEG"), encode(stamp().convert("RGB"), "BMP")],
    ids=["PNG", "JPEG", "BMP"],
)
def test_a_picture_without_alpha_is_the_same_under_every_setting(content: bytes) -> None:
    reader = ImageReader(ImageConfig(), Path("/"))
    assert not reader.read_look(Picture("", content=content)).has_alpha
    assert not reader.shows_through(Picture("", content=content))
    for alpha in COLOURS:
        np.testing.assert_array_equal(opened(content, alpha), opened(content, "drop"))


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    content = encode(stamp().convert("RGB").convert("RGBA"))
    reader = ImageReader(ImageConfig(), Path("/"))
    assert reader.read_look(Picture("", content=content)).has_alpha
    assert not reader.shows_through(Picture("", content=content))
    np.testing.assert_array_equal(opened(content, "white"), opened(content, "drop"))


@pytest.mark.parametrize("alpha", COLOURS)
def test_blending_rounds_to_the_nearest(alpha: str) -> None:
    seen, opacity = np.meshgrid(np.arange(256), np.arange(256))  # every grey under every alpha
    pixels = np.stack([seen, seen, seen, opacity], 2).astype(np.uint8)
    exact = (opacity * seen)[..., None] + (255 - opacity)[..., None] * np.array(COLOURS[alpha])
    np.testing.assert_array_equal(opened(encode(Image.fromarray(pixels)), alpha), (2 * exact + 255) // 510)


def test_the_file_is_turned_upright_after_it_is_blended(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Picture("", content=encode(stamp(), exif=exif))
    image = np.asarray(ImageReader(ImageConfig(exif=True, alpha="white"), tmp_path).open_picture(picture))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, -1].tolist() == list(RED)


# The setting


@pytest.mark.parametrize("alpha", ["pink", "#fff", "#12345g", "White", "transparent", "rgb(1,2,3)", ""])
def test_a_colour_that_is_none_is_refused(alpha: str) -> None:
    with pytest.raises(ConfigError, match=r"data.image.alpha=.*: set drop, white, black, or a colour in two pairs"):
        load_config(["data=own", "data.path=train.jsonl", f"data.image.alpha='{alpha}'"])


@pytest.mark.parametrize("alpha", ["drop", "white", "black", '"#80ff00"'])
def test_the_settings_of_the_message_are_taken(alpha: str) -> None:
    config = load_config(["data=own", "data.path=train.jsonl", f"data.image.alpha={alpha}"])
    assert config.data.image.alpha == alpha.strip('"')


# The same look everywhere


def test_the_report_shows_a_picture_as_it_was_trained(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(stamp()))
    pages = {alpha: thumbnail(str(tmp_path / "a.png"), ImageConfig(alpha=alpha)) for alpha in ("drop", *COLOURS)}
    assert len(set(pages.values())) == 4


@pytest.mark.parametrize("alpha", ["drop", *COLOURS])
def test_the_export_says_how_to_hand_a_picture_over(alpha: str) -> None:
    code = handing_over(alpha).partition("hand a transparent picture over as ")[2]
    with Image.open(io.BytesIO(encode(stamp()))) as picture:
        if alpha == "drop":
            made = picture.convert("RGB")
        else:
            made = Image.alpha_composite(Image.new("RGBA", picture.size, alpha), picture.convert("RGBA")).convert("RGB")
    assert f"'{alpha}'" in code or alpha == "drop"
    np.testing.assert_array_equal(np.asarray(made), opened(encode(stamp()), alpha))


# check


def write_rows(folder: Path, pictures: dict[str, bytes], times: int = 1) -> None:
    rows = []
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A stamp."}]
        rows += [{"id": f"{name}{time}", "image": name, "conversations": said} for time in range(times)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def checked(folder: Path, parts: list[str], *overrides: str) -> tuple[dict, dict[str, str]]:
    config = load_config(["data=own", *parts, f"data.path={folder}/train.jsonl", "data.workers=0", *overrides])
    encoder = build_encoder(config)[0]
    report = summarise(check_file(config, encoder, folder / "train.jsonl"), config, encoder.settings)
    return report["images"] | report["transparency"], facts(report | {"shared": []})


def test_check_counts_alpha_and_recommends_a_colour(tmp_path: Path, parts: list[str]) -> None:
    opaque = encode(stamp().convert("RGB").convert("RGBA"))
    write_rows(
        tmp_path, {"a.png": encode(stamp()), "b.png": opaque, "c.jpg": encode(stamp().convert("RGB"), "JPEG")}, 2
    )
    images, told = checked(tmp_path, parts)
    assert {name: images[name] for name in ("found", "alpha", "decoded", "transparent")} == {
        "found": 6,
        "alpha": 4,
        "decoded": 2,
        "transparent": 1,
    }
    assert told["transparency"].startswith("4 pictures have an alpha channel; of 2 of them that were decoded, 1 ")
    assert "data.image.alpha=drop trains the colours that nobody sees: set white or black" in told["transparency"]


def test_check_recommends_nothing_where_a_colour_is_set(tmp_path: Path, parts: list[str]) -> None:
    write_rows(tmp_path, {"a.png": encode(stamp())})
    assert checked(tmp_path, parts, "data.image.alpha=white")[1]["transparency"].endswith("=white is laid below them")


def test_check_is_silent_about_opaque_pictures(tmp_path: Path, parts: list[str]) -> None:
    write_rows(tmp_path, {"c.jpg": encode(stamp().convert("RGB"), "JPEG")})
    images, told = checked(tmp_path, parts)
    assert images["alpha"] == 0
    assert "transparency" not in told


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("false", "data.image.exif=false trains them so: set it to true to train them as they are shown"),
        ("true", "data.image.exif=true trains them upright"),
    ],
)
def test_check_counts_photos_that_are_stored_turned(tmp_path: Path, parts: list[str], setting: str, said: str) -> None:
    turned, upright = Image.Exif(), Image.Exif()
    turned[0x0112], upright[0x0112] = 6, 1  # as a phone held upright writes it
    plain = stamp().convert("RGB")
    files = {"phone.jpg": encode(plain, "JPEG", exif=turned), "camera.jpg": encode(plain, "JPEG", exif=upright)}
    write_rows(tmp_path, files | {"none.png": encode(plain)}, 2)
    told = checked(tmp_path, parts, f"data.image.exif={setting}")[1]["orientation"]
    assert told == f"2 pictures are stored turned or mirrored, by EXIF data. {said}"


def test_check_decodes_no_more_than_a_few_of_a_chunk(tmp_path: Path, parts: list[str]) -> None:
    write_rows(tmp_path, {f"{number}.png": encode(stamp()) for number in range(20)})
    images, _ = checked(tmp_path, parts)
    assert (images["alpha"], images["decoded"]) == (20, 8)


def test_features_of_one_setting_never_serve_another() -> None:
    vlm: Any = SimpleNamespace(vision=SimpleNamespace(select_layer=-1, keeps_class=False))
    configs = [load_config(["data=own", "data.path=a", f"data.image.alpha={alpha}"]) for alpha in ("drop", "white")]
    assert len({fingerprint({}, _settings(vlm, config)) for config in configs}) == 2


def test_chat_shows_a_picture_as_the_run_did(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(stamp()))
    model: Any = None
    talk = Chat(model, load_config(["data=own", "data.path=a", "data.image.alpha=white"]))
    talk.show(str(tmp_path / "a.png"))
    (shown,) = talk.pending
    image = talk._reader(shown).open_picture(shown, "chat", None)
    assert image.getpixel((SIZE[0] - 1, 0)) == (255, 255, 255)
