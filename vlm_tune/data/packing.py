"""Which samples share a pack: best-fit decreasing over a bounded window, within a budget of tokens and one of tiles."""

from bisect import bisect_left, insort
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

WINDOW = 2048  # samples looked at together: bounds memory, and keeps the order random


def plan_packs(
    order: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32], tiles: npt.NDArray[np.int32], budget: tuple[int, int]
) -> Iterator[list[int]]:
    """Yield packs of rows, each row exactly once, in an order that depends on nothing but the arguments.

    order   (R,) row numbers, shuffled; tokens, tiles: sizes by row number; budget: tokens and tiles of one pack.
    A row larger than a budget has a pack of its own. Packs of one window come in random-like order: that of their
    first row in `order`.
    """
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        rank = {int(row): position for position, row in enumerate(window)}
        by_size = sorted(rank, key=lambda row: (-int(tokens[row]), rank[row]))
        packs = _best_fit(by_size, tokens, tiles, budget)
        for pack in packs:
            pack.sort(key=rank.__getitem__)
        yield from sorted(packs, key=lambda pack: rank[pack[0]])


def _best_fit(
    rows: list[int], tokens: npt.NDArray[np.int32], tiles: npt.NDArray[np.int32], budget: tuple[int, int]
) -> list[list[int]]:
    """Put each row, largest first, into the fullest pack that still has room for its tokens and its tiles."""
    max_tokens, max_tiles = budget
    packs: list[list[int]] = []
    room_tiles: list[int] = []
    open_packs: list[tuple[int, int]] = []  # (tokens left, pack), sorted: the fullest that fits is found by bisection
    for row in rows:
        need_tokens, need_tiles = int(tokens[row]), int(tiles[row])
        for position in range(bisect_left(open_packs, (need_tokens, -1)), len(open_packs)):
            left, pack = open_packs[position]
            if room_tiles[pack] >= need_tiles:
                del open_packs[position]
                break
        else:
            pack, left = len(packs), max_tokens
            packs.append([])
            room_tiles.append(max_tiles)
        packs[pack].append(row)
        room_tiles[pack] -= need_tiles
        if left > need_tokens:
            insort(open_packs, (left - need_tokens, pack))
    return packs


def plan_batches(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], batch: int, seed: int
) -> Iterator[list[int]]:
    """Yield groups of `batch` rows of like length (padded mode): sorted within windows, groups shuffled."""
    generator = np.random.default_rng(seed)
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        by_length = window[np.argsort(-lengths[window], kind="stable")]
        groups = [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
        for index in generator.permutation(len(groups)):
            yield [int(row) for row in groups[index]]
