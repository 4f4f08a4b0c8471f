"""(2) A picture becomes tiles of one size; how many is known from its width and height alone.

The grid, the number of tiles and the tiles themselves come only from the functions in this file, so the image tokens in
the text always match the tiles that the vision tower gets.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_tune.config.schema import TileRule, TilesConfig
from vlm_tune.data.pictures.anyres import Spread
from vlm_tune.errors import ConfigError

if TYPE_CHECKING:  # processes that only count tiles (`check`, the index) start without torch
    import torch


class Normalization(NamedTuple):
    """Mean and standard deviation of red, green and blue, on a scale of 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATIONS = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # InternVL
    # InternVL's "clip" truncates OpenAI's digits; a pixel differs by up to 5e-5, so each has a name of its own.
    "clip": Normalization((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),
    "openai_clip": Normalization((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # LLaVA
    "siglip": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "half": Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def choose_grid(width: int, height: int, tiles: TilesConfig, max_tiles: int | None = None) -> tuple[int, int]:
    """Return the grid (columns, rows) of tiles for a picture of width x height pixels, without thumbnail or base tile.

    `max_tiles` replaces `tiles.max` if a picture has only a share of its sample's tiles (see `tile_limits`).
    With tiles of 448 pixels and at most 12 of them, 640 x 480 becomes (4, 3): the aspect ratio is the same, the picture
    is enlarged. `rule=area` makes it (1, 1), since 640 x 480 pixels fill only one and a half tiles.
    The rules are explained at `_closest_ratio`, `_fit_area` and `_fit_anyres`; `resize` and `pad` always give (1, 1).
    """
    limit = tiles.max if max_tiles is None else max_tiles
    if tiles.rule is TileRule.dynamic:
        return _closest_ratio(width, height, tiles.size, tiles.min, limit)
    if tiles.rule is TileRule.area:
        return _fit_area(width, height, tiles.size, tiles.min, limit)
    if tiles.rule is TileRule.anyres:
        return _fit_anyres(width, height, tiles.size, tiles.min, limit)
    return 1, 1


def count_tiles(width: int, height: int, tiles: TilesConfig, max_tiles: int | None = None) -> int:
    """Return the number of tiles of a picture of width x height pixels, including thumbnail or base tile.

    640 x 480 with tiles of 448 pixels, at most 12: 4 x 3 and the thumbnail, 13.
    """
    columns, rows = choose_grid(width, height, tiles, max_tiles)
    return columns * rows + int(_has_overview(columns, rows, tiles))


def tile_limits(is_frame: Sequence[bool], tiles: TilesConfig, max_tiles: int | None = None) -> tuple[int, ...]:
    """Return the most tiles, without thumbnail, that each picture of one sample may have.

    `is_frame` has one entry per picture: a frame of a video has 1 tile, the n other pictures share the budget, with
    max(1, max // n) each. With at most 12 tiles and is_frame = (False, False, True): (6, 6, 1).
    Source: InternVL, internvl_chat_finetune.py, multi_modal_multi_image_get_item and video_get_item.
    """
    limit = tiles.max if max_tiles is None else max_tiles
    share = max(1, limit // max(1, len(is_frame) - sum(is_frame)))
    return tuple(1 if frame else share for frame in is_frame)


def picture_tiles(
    sizes: Sequence[tuple[int, int]], is_frame: Sequence[bool], tiles: TilesConfig, max_tiles: int | None = None
) -> tuple[int, ...]:
    """Return the number of tiles of each picture of one sample, from their (width, height) in pixels.

    Two photos of 640 x 480 with at most 12 tiles may have 6 each: (3, 2) and a thumbnail, so (7, 7).
    """
    limits = tile_limits(is_frame, tiles, max_tiles)
    return tuple(count_tiles(width, height, tiles, limit) for (width, height), limit in zip(sizes, limits, strict=True))


def picture_spreads(
    sizes: Sequence[tuple[int, int]], is_frame: Sequence[bool], tiles: TilesConfig, max_tiles: int | None = None
) -> tuple[Spread, ...]:
    """Return how the tiles of each picture of one sample lie, from their (width, height) in pixels (rule=anyres)."""
    limits = tile_limits(is_frame, tiles, max_tiles)
    return tuple(Spread(*choose_grid(*size, tiles, limit), *size) for size, limit in zip(sizes, limits, strict=True))


def anyres_grids(tiles: TilesConfig) -> list[tuple[int, int]]:
    """List the grids (columns, rows) of rule=anyres in the order in which they are tried.

    At most 4 tiles: (2, 1), (1, 2), (3, 1), (2, 2), (1, 3), LLaVA-NeXT's five.
    """
    return list(_anyres_grids(tiles.min, tiles.max))


def make_tiles(
    image: Image.Image, tiles: TilesConfig, max_tiles: int | None = None, normalization: str = "imagenet"
) -> npt.NDArray[np.uint8]:
    """Cut an RGB picture into tiles (T, size, size, 3), uint8, where T = count_tiles(*image.size, tiles, max_tiles).

    Tiles are ordered row by row. The thumbnail (the whole picture in one tile) comes last, as in InternVL; the base
    tile of `anyres` comes first, as in LLaVA-NeXT. `normalization` (model.vision.normalize) matters only to
    `rule=pad`, which pads with its mean. The values stay bytes, a quarter of the memory to move from worker to device;
    `normalize` turns them into floats there.
    Sources: InternVL, dynamic_preprocess; LLaVA, expand2square and process_anyres_image. Raise ConfigError for an
    unknown normalization.
    """
    assert image.mode == "RGB", "open pictures with ImageReader.open_picture"
    size = tiles.size
    columns, rows = choose_grid(*image.size, tiles, max_tiles)
    if tiles.rule is TileRule.pad:
        image = _pad_to_square(image, find_normalization(normalization))
    if columns * rows == 1:
        return _pixels(image, size, size)[np.newaxis].copy()  # (1, size, size, 3); Pillow's own array is read-only
    is_anyres = tiles.rule is TileRule.anyres
    resize = _padded_pixels if is_anyres else _pixels
    whole = resize(image, columns * size, rows * size)  # (rows * size, columns * size, 3)
    made = np.empty((columns * rows + _has_overview(columns, rows, tiles), size, size, 3), np.uint8)  # (T, H, W, 3)
    body = made[1:] if is_anyres else made[: columns * rows]
    # One copy for all tiles, straight to their final place; the references make a picture and a tensor of each.
    body.reshape(rows, columns, size, size, 3)[:] = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    if _has_overview(columns, rows, tiles):
        made[0 if is_anyres else -1] = _pixels(image, size, size)
    return made


def normalize(tiles: "torch.Tensor", name: str, dtype: "torch.dtype") -> "torch.Tensor":
    """Turn tiles (T, H, W, 3), uint8, into encoder input (T, 3, H, W) of `dtype`, on the device where they are.

    (pixel / 255 - mean) / std in float32, in the order of torchvision's ToTensor and Normalize, so the result equals
    theirs bit for bit. Colours stay side by side in memory (channels last), as in the tiles: convolutions read that
    faster. Raise ConfigError for an unknown name.
    """
    mean, std = find_normalization(name)
    pixels = tiles.flatten(2).float().div_(255)  # (T, H, W*3): a row of pixels at a time is several times as fast
    width = tiles.shape[2]
    pixels.sub_(pixels.new_tensor(mean).repeat(width)).div_(pixels.new_tensor(std).repeat(width))
    return pixels.to(dtype).view(tiles.shape).permute(0, 3, 1, 2)


def find_normalization(name: str) -> Normalization:
    """Return the mean and standard deviation of that name; raise ConfigError for an unknown one."""
    found = NORMALIZATIONS.get(name)
    if found is None:
        raise ConfigError(f'model.vision.normalize="{name}" is not known: set one of {", ".join(NORMALIZATIONS)}')
    return found


def _has_overview(columns: int, rows: int, tiles: TilesConfig) -> bool:
    """Whether the whole picture is one more tile: never with a single tile; else always with anyres."""
    return columns * rows > 1 and (tiles.thumbnail or tiles.rule is TileRule.anyres)


@lru_cache(maxsize=256)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int, float], ...]:
    """Return (columns, rows, columns / rows) of every grid of min_tiles to max_tiles tiles, small grids first.

    The reference sorts a Python set by the number of tiles, which leaves the order of equal numbers open. Sorting by
    columns as well makes it definite; the choice never depends on it.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    return tuple((columns, rows, columns / rows) for columns, rows in grids)


@lru_cache(maxsize=65536)
def _closest_ratio(width: int, height: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the grid with the closest aspect ratio; of equal ones, the largest that the picture fills to over half.

    Bit-compatible with InternVL's find_closest_aspect_ratio: ties are exact equality of floats, so the expressions must
    stay as they are. 448 x 448 gives (1, 1), not (2, 2), of which it fills only a quarter; 1000 x 1000 gives (3, 3).
    """
    best, best_difference = (1, 1), math.inf
    ratio, area = width / height, width * height
    for columns, rows, grid_ratio in _grids(min_tiles, max_tiles):
        difference = abs(ratio - grid_ratio)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and area > 0.5 * size * size * columns * rows:
            best = (columns, rows)
    return best


@lru_cache(maxsize=65536)
def _fit_area(width: int, height: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the grid that best keeps area and aspect ratio, among those that the picture's own pixels fill.

    Candidates have at most n = max(1, round(width * height / size^2)) tiles, so a picture that gets more than one never
    grows to more than 4/3 of its pixels. Among them, the score of Eagle 2.5's image area preservation decides:

        min(grid area / picture area, 0.6) * min(grid ratio / picture ratio, picture ratio / grid ratio)

    and the fewest tiles if scores are equal. With tiles of 448 pixels, at most 12: 640 x 480 gives (1, 1), 800 x 600
    (2, 1), 1024 x 768 (2, 2), 1920 x 1080 (4, 2). Source of the score: Eagle 2.5, arXiv 2504.15271; n is ours.
    """
    ratio, area = width / height, width * height
    num_filled = max(min_tiles, 1, math.floor(area / size**2 + 0.5))
    best, best_score = (1, 1), 0.0
    for columns, rows, grid_ratio in _grids(min_tiles, min(max_tiles, num_filled)):
        kept = min(columns * rows * size**2 / area, 0.6)
        score = kept * min(grid_ratio / ratio, ratio / grid_ratio)
        if score > best_score:
            best, best_score = (columns, rows), score
    return best


@lru_cache(maxsize=65536)
def _fit_anyres(width: int, height: int, size: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
    """Return the grid in which the padded picture keeps the most of its pixels; of equal ones, the least wasteful.

    Grids have 2 to max_tiles tiles; above 2, the strip of max_tiles is left out, which makes `max=4` exactly the five
    of LLaVA-NeXT: 2x1, 1x2, 3x1, 1x3, 2x2. If there are fewer than 2 tiles, only the base tile remains: (1, 1).
    Source: select_best_resolution of LLaVA-NeXT. For pictures smaller than a tile, a wide and a tall grid are equal;
    transformers takes the wide one, LLaVA the tall one. Ours is that of transformers, which loads the exports.
    """
    best, best_kept, best_wasted = (1, 1), 0, math.inf
    for columns, rows in _anyres_grids(min_tiles, max_tiles):
        scale = min(columns * size / width, rows * size / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = columns * size * rows * size - kept
        is_better = kept > best_kept or (kept == best_kept and wasted < best_wasted)
        if is_better:
            best, best_kept, best_wasted = (columns, rows), kept, wasted
    return best


@lru_cache(maxsize=256)
def _anyres_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    longest = max(2, max_tiles - 1)
    grids = [(columns, rows) for columns, rows, _ in _grids(max(2, min_tiles), max_tiles)]
    ordered = sorted(grids, key=lambda grid: (grid[0] * grid[1], -grid[0]))
    return tuple(grid for grid in ordered if max(grid) <= longest)


def _pixels(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Resize with Pillow's bicubic filter, as the references do, to (height, width, 3)."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _padded_pixels(image: Image.Image, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Fit into width x height, keeping the aspect ratio, and centre on black: (height, width, 3)."""
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        inner_width, inner_height = width, min(math.ceil(image.height * scale_width), height)
    else:
        inner_width, inner_height = min(math.ceil(image.width * scale_height), width), height
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    canvas[top : top + inner_height, left : left + inner_width] = _pixels(image, inner_width, inner_height)
    return canvas


def _pad_to_square(image: Image.Image, normalization: Normalization) -> Image.Image:
    """Centre a picture on a square of the mean colour, which normalises to about zero (LLaVA's expand2square)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    red, green, blue = (int(value * 255) for value in normalization.mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
