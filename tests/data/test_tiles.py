"""The grid, the number of tiles and the tiles agree under every rule, and equal the sources they name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from vlm_tune.config.schema import TileRule, TilesConfig
from vlm_tune.data.tiles import (
    NORMALIZATIONS,
    choose_grid,
    count_tiles,
    make_tiles,
    normalize,
    picture_tiles,
    tile_limits,
)
from vlm_tune.errors import ConfigError

LLAVA_NEXT = TilesConfig(size=336, max=4, rule=TileRule.anyres)
LLAVA_NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # (height, width), as published


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    rule=st.sampled_from(TileRule),
    limits=st.tuples(st.integers(1, 3), st.integers(1, 12), st.none() | st.integers(1, 12)),
    has_thumbnail=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_count_from_the_size_equals_the_tiles_made(
    width: int, height: int, rule: TileRule, limits: tuple[int, int, int | None], has_thumbnail: bool
) -> None:
    tiles = TilesConfig(size=16, min=limits[0], max=limits[1], thumbnail=has_thumbnail, rule=rule)
    made = make_tiles(noise(width, height), tiles, limits[2])
    assert made.shape == (count_tiles(width, height, tiles, limits[2]), 16, 16, 3)
    assert made.dtype == np.uint8
    assert made.flags.writeable  # torch warns of read-only memory
    assert made.flags.c_contiguous


@given(width=st.integers(1, 8000), height=st.integers(1, 8000), max_tiles=st.integers(1, 40))
@pytest.mark.parametrize("rule", list(TileRule))
def test_grid_never_exceeds_the_limit(rule: TileRule, width: int, height: int, max_tiles: int) -> None:
    columns, rows = choose_grid(width, height, TilesConfig(rule=rule), max_tiles)
    assert 1 <= columns * rows <= max_tiles


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid", "num_tiles"),
    [
        ((448, 448), 12, (1, 1), 1),
        ((10, 10), 12, (1, 1), 1),
        ((640, 640), 12, (2, 2), 5),
        ((1000, 1000), 12, (3, 3), 10),
        ((1920, 1080), 12, (4, 2), 9),
        ((640, 480), 12, (4, 3), 13),
        ((640, 480), 6, (3, 2), 7),
        ((560, 448), 6, (1, 1), 1),
        ((100, 1000), 12, (1, 10), 11),
        ((2000, 100), 12, (12, 1), 13),
    ],
)
def test_dynamic_rule_has_the_documented_grids(
    size: tuple[int, int], max_tiles: int, grid: tuple[int, int], num_tiles: int
) -> None:
    tiles = TilesConfig(max=max_tiles)
    assert choose_grid(*size, tiles) == grid
    assert count_tiles(*size, tiles) == num_tiles


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((300, 300), (1, 1)),
        ((640, 480), (1, 1)),
        ((800, 600), (2, 1)),
        ((1024, 768), (2, 2)),
        ((1000, 1000), (2, 2)),
        ((1920, 1080), (4, 2)),
    ],
)
def test_area_rule_has_the_documented_grids(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert choose_grid(*size, TilesConfig(rule=TileRule.area)) == grid


@given(width=st.integers(1, 6000), height=st.integers(1, 6000), max_tiles=st.integers(1, 40))
def test_area_rule_never_blows_a_picture_up(width: int, height: int, max_tiles: int) -> None:
    columns, rows = choose_grid(width, height, TilesConfig(rule=TileRule.area), max_tiles)
    assert columns * rows == 1 or columns * rows * 448**2 <= width * height * 4 / 3


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
@settings(max_examples=500)
def test_anyres_grid_equals_that_of_transformers(width: int, height: int) -> None:
    grid_height, grid_width = select_best_resolution((height, width), LLAVA_NEXT_GRIDS)
    assert choose_grid(width, height, LLAVA_NEXT) == (grid_width // 336, grid_height // 336)


@pytest.mark.parametrize("size", [(640, 480), (333, 1000), (100, 90), (336, 336), (1500, 301)])
def test_anyres_pixels_equal_those_of_transformers(size: tuple[int, int]) -> None:
    image = noise(*size)
    processor = LlavaNextImageProcessorPil(do_pad=False, size={"shortest_edge": 336}, crop_size=336)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    found = normalize(torch.from_numpy(make_tiles(image, LLAVA_NEXT)), "openai_clip", torch.float32)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [TileRule.dynamic, TileRule.area])
def test_thumbnail_is_the_last_tile_and_shows_the_whole_picture(rule: TileRule) -> None:
    image = noise(96, 64)
    made = make_tiles(image, TilesConfig(size=32, max=6, rule=rule))
    assert len(made) == 7
    np.testing.assert_array_equal(made[-1], np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_tiles_stand_row_by_row() -> None:
    image = noise(96, 64)
    made = make_tiles(image, TilesConfig(size=32, max=6, thumbnail=False))
    crops = [image.crop((x, y, x + 32, y + 32)) for y in (0, 32) for x in (0, 32, 64)]
    np.testing.assert_array_equal(made, np.stack([np.asarray(crop) for crop in crops]))


@pytest.mark.parametrize("size", [(40, 20), (20, 41)])
def test_padding_has_the_mean_colour_and_keeps_the_aspect_ratio(size: tuple[int, int]) -> None:
    tile = make_tiles(Image.new("RGB", size, (255, 0, 0)), TilesConfig(size=40, rule=TileRule.pad))[0]
    assert tile[0, 0].tolist() == [int(255 * value) for value in NORMALIZATIONS["imagenet"].mean]
    assert tile[20, 20].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("is_frame", "limits"),
    [
        ([], ()),
        ([False], (12,)),
        ([False] * 2, (6, 6)),
        ([False] * 5, (2,) * 5),
        ([False] * 30, (1,) * 30),
        ([True] * 8, (1,) * 8),
        ([False, True, False, True], (6, 1, 6, 1)),
    ],
)
def test_pictures_share_the_budget_and_frames_have_one_tile(is_frame: list[bool], limits: tuple[int, ...]) -> None:
    assert tile_limits(is_frame, TilesConfig(max=12)) == limits


def test_a_lower_limit_replaces_that_of_the_configuration() -> None:
    assert tile_limits([False, False], TilesConfig(max=12), max_tiles=4) == (2, 2)
    assert picture_tiles([(640, 480), (640, 480)], [False, False], TilesConfig(max=12)) == (7, 7)
    assert picture_tiles([(640, 480), (640, 480)], [False, False], TilesConfig(max=12), max_tiles=2) == (1, 1)


@pytest.mark.parametrize("name", list(NORMALIZATIONS))
def test_normalize_is_to_tensor_and_normalize(name: str) -> None:
    from torchvision import transforms

    made = make_tiles(noise(64, 32), TilesConfig(size=32, max=2))
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*NORMALIZATIONS[name])])
    expected = torch.stack([transform(tile) for tile in made])
    assert torch.equal(normalize(torch.from_numpy(made), name, torch.float32), expected)
    assert torch.equal(normalize(torch.from_numpy(made), name, torch.bfloat16), expected.to(torch.bfloat16))


def test_unknown_normalization_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r'model.vision.normalize="imagnet" is not known: set one of imagenet, clip'):
        normalize(torch.zeros((1, 2, 2, 3), dtype=torch.uint8), "imagnet", torch.float32)
