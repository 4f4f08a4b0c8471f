"""The layout of the tokens of an any-resolution picture (LLaVA-NeXT): counted and ordered by the same functions.

The tokens of the base tile come first. Those of the grid follow, row by row over the whole grid, without the ones that
show nothing but padding, and a newline token ends each row.
"""

from math import isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NEWLINE = -1  # in an order of tokens


class Spread(NamedTuple):
    """The grid of a picture's tiles and its size in pixels, which together decide its tokens."""

    columns: int
    rows: int
    width: int
    height: int

    @property
    def num_tiles(self) -> int:
        """Count the tiles, including the base tile."""
        return self.columns * self.rows + (self.columns * self.rows > 1)


def count_tokens(spread: Spread, tokens_per_tile: int) -> int:
    """Return the number of tokens of a picture, including newlines.

    With tiles of 24 x 24 tokens, 640 x 480 on a grid of 2 x 2: 576, plus 36 rows of 48 tokens and a newline: 2340.
    """
    if spread.columns * spread.rows == 1:
        return tokens_per_tile + 1
    top, left = padding(spread, isqrt(tokens_per_tile))
    rows = spread.rows * isqrt(tokens_per_tile) - 2 * top
    columns = spread.columns * isqrt(tokens_per_tile) - 2 * left
    return tokens_per_tile + rows * (columns + 1)


def token_order(spread: Spread, tokens_per_tile: int) -> npt.NDArray[np.int64]:
    """Return the index, among a picture's T * S tokens, of the token at each place, or NEWLINE: (count_tokens,)."""
    base, side = np.arange(tokens_per_tile), isqrt(tokens_per_tile)
    columns, rows = spread.columns, spread.rows
    if columns * rows == 1:
        return np.append(base, NEWLINE)
    assert side * side == tokens_per_tile, "only a square of tokens can be spread over a grid"
    top, left = padding(spread, side)
    tiles = tokens_per_tile + np.arange(rows * columns * tokens_per_tile)
    whole = tiles.reshape(rows, columns, side, side).transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
    kept = whole[top : rows * side - top, left : columns * side - left]
    lines = np.pad(kept, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([base, lines.ravel()])


def padding(spread: Spread, side: int) -> tuple[int, int]:
    """Return how many rows of tokens at the top and bottom, and columns left and right, show nothing but padding.

    Bit-compatible with LLaVA-NeXT: the float expressions must stay as they are.
    Source: transformers `modeling_llava_next.py:unpad_image`.
    """
    columns, rows = spread.columns * side, spread.rows * side
    if spread.width / spread.height > columns / rows:
        filled = int(round(spread.height * (columns / spread.width), 7))
        return (rows - filled) // 2, 0
    filled = int(round(spread.width * (rows / spread.height), 7))
    return 0, (columns - filled) // 2
