"""Tilings and pixels equal the reference's, as recorded in the golden folder."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlm_tune.config.schema import ImageConfig, TileRule, TilesConfig
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.sample import Picture
from vlm_tune.data.tiles import choose_grid, count_tiles, make_tiles, normalize

GOLDEN = Path(os.environ.get("VLM_TUNE_GOLDEN") or Path(__file__).parents[1] / "golden")
STEP = 28  # the recording holds every 28th pixel


def load(name: str) -> list[dict]:
    """Return a recording, empty where the folder has none."""
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.exists() else []


TILINGS, PIXELS = load("tiling.json"), load("pixels.json")
each_picture = pytest.mark.parametrize(
    ("index", "case"), list(enumerate(PIXELS)), ids=[Path(case["image"]).stem for case in PIXELS]
)


@pytest.fixture(scope="module")
def sampled() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "pixels.safetensors")


def open_golden(case: dict) -> Image.Image:
    return ImageReader(ImageConfig(), GOLDEN).open_picture(Picture(case["image"]))


def floats(image: Image.Image, tiles: TilesConfig, normalization: str) -> torch.Tensor:
    """Return the float pixels (T, 3, H, W) that the vision encoder gets."""
    made = make_tiles(image, tiles, normalization=normalization)
    return normalize(torch.from_numpy(made), normalization, torch.float32)


@pytest.mark.skipif(not TILINGS, reason="this golden folder has no tiling.json")
def test_golden_tilings_are_equal() -> None:
    wrong = []
    for case in TILINGS:
        tiles = TilesConfig(case["tile_size"], case["min_tiles"], case["max_tiles"], case["use_thumbnail"])
        found = choose_grid(case["width"], case["height"], tiles), count_tiles(case["width"], case["height"], tiles)
        if found != (tuple(case["grid"]), case["num_tiles"]):
            wrong.append((case, found))
    assert not wrong


@each_picture
def test_golden_tiles_are_bit_equal(index: int, case: dict) -> None:
    made = make_tiles(open_golden(case), TilesConfig())
    assert made.dtype == np.uint8
    assert len(made) == case["num_tiles"]
    assert hashlib.sha256(made.tobytes()).hexdigest() == case["uint8_sha256"]


@each_picture
def test_golden_number_of_tiles_comes_from_the_header(index: int, case: dict) -> None:
    size = ImageReader(ImageConfig(), GOLDEN).read_size(Picture(case["image"]))
    assert count_tiles(*size, TilesConfig()) == case["num_tiles"]


@each_picture
def test_golden_float_pixels_are_within_1e_6(index: int, case: dict, sampled: dict[str, torch.Tensor]) -> None:
    pixels = floats(open_golden(case), TilesConfig(), "imagenet")
    torch.testing.assert_close(pixels[:, :, ::STEP, ::STEP], sampled[f"{index:02}.tiles"], rtol=0, atol=1e-6)
    assert pixels.mean().item() == pytest.approx(case["pixel_mean"], abs=1e-6)
    assert pixels.std().item() == pytest.approx(case["pixel_std"], abs=1e-6)


@each_picture
@pytest.mark.parametrize(
    ("rule", "normalization", "name"),
    [(TileRule.pad, "imagenet", "pad2square"), (TileRule.resize, "clip", "clip")],
    ids=["pad2square", "clip_resize"],
)
def test_golden_square_transforms_are_within_1e_6(
    index: int, case: dict, rule: TileRule, normalization: str, name: str, sampled: dict[str, torch.Tensor]
) -> None:
    pixels = floats(open_golden(case), TilesConfig(rule=rule), normalization)[0]
    torch.testing.assert_close(pixels[:, ::STEP, ::STEP], sampled[f"{index:02}.{name}"], rtol=0, atol=1e-6)
