"""How the tokens of an any-resolution picture (LLaVA-NeXT) lie: counted and ordered by the same functions.

The tokens of the base tile come first. The grid's tokens follow row by row over the whole grid, without those that lie
on padding alone, and a newline token ends each row.
"""

from math import isqrt
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NEWLINE = -1  # in an order of tokens


class Spread(NamedTuple):
    """Hold what decides a picture's tokens: the grid of its tiles, and its own size in pixels."""

    columns: int
    rows: int
    width: int
    height: int

    @property
    def num_tiles(self) -> int:
        """Count the tiles, the base tile included."""
        return self.columns * self.rows + (self.columns * self.rows > 1)


def count_tokens(spread: Spread, tokens_per_tile: int) -> int:
    """Return the number of tokens of a picture, newlines included.

    With tiles of 24 x 24 tokens, 640 x 480 on a grid of 2 x 2: 576, and 36 rows of 48 tokens and a newline: 2340.
    """
    if spread.columns * spread.rows == 1:
        return tokens_per_tile + 1
    top, left = padding(spread, isqrt(tokens_per_tile))
    rows = spread.rows * isqrt(tokens_per_tile) - 2 * top
    columns = spread.columns * isqrt(tokens_per_tile) - 2 * left
    return tokens_per_tile + rows * (columns + 1)


def token_order(spread: Spread, tokens_per_tile: int) -> npt.NDArray[np.int64]:
    """Return which of a picture's T * S tokens stands in each place; NEWLINE for a newline: (count_tokens,)."""
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
    """Return how many rows of tokens at the top and the bottom, and columns left and right, show nothing but padding.

    Bit-compatible with LLaVA-NeXT: the float expressions must stay as they are.
    Source: transformers `modeling_llava_next.py:unpad_image`.
    """
    columns, rows = spread.columns * side, spread.rows * side
    if spread.width / spread.height > columns / rows:
        filled = int(round(spread.height * (columns / spread.width), 7))
        return (rows - filled) // 2, 0
    filled = int(round(spread.width * (rows / spread.height), 7))
    return 0, (columns - filled) // 2
