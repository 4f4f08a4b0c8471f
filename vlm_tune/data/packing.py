"""Which samples share a pack: best-fit decreasing over a bounded window, within a budget of tokens and one of tiles.

Best fit alone fills packs with samples of equal length, and those tend to be of one kind: a step of short answers, a
step of long captions, and a loss that jumps. So the same number of packs is filled evenly instead, if possible.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from vlm_tune.data.sizes import Index

MIXING_COST = 0.02  # share of additional packs that an even mixture of lengths may cost
TREE_GROWTH = 2  # a row of a long head has many beside it, a row of a short one few
HEAD_COPIES = 8  # keys of heads that the rows of a tree see again, over its tokens: each row's attention keeps them
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without a pattern: 2**64 over the golden ratio
WINDOW = 2048  # samples packed together: bounds memory, and keeps the order random


def plan_packs(
    order: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32], tiles: npt.NDArray[np.int32], budget: tuple[int, int]
) -> Iterator[list[int]]:
    """Yield packs of rows, each entry of `order` exactly once, in an order that depends only on the arguments.

    order   (R,) row numbers, shuffled (a mixture may repeat a row); tokens, tiles: sizes by row number;
    budget  tokens and tiles of one pack.
    A row larger than a budget has a pack of its own. The packs of a window come in the order of their first row in
    `order`, which is as good as random.
    """
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        need_tokens, need_tiles = tokens[window], tiles[window]
        by_size = np.argsort(-need_tokens, kind="stable").tolist()
        packs = _pack(by_size, need_tokens.tolist(), need_tiles.tolist(), budget)
        packs = sorted(map(sorted, packs))  # no place is in two packs, so the first one decides
        yield from (window[pack].tolist() for pack in packs)


def plan_trees(order: npt.NDArray[np.int64], index: Index, budget: tuple[int, int]) -> list[list[int]]:
    """Plan packs as `plan_packs` does, with rows of one head together in a tree, whose head costs its size once.

    A tree grows to TREE_GROWTH times its first row, so that a pack shows about half as many pictures as without
    sharing, or more; to the budget at most, and as far as HEAD_COPIES allows. A row that a mixture repeats has
    different trees. Trees of one picture go to packs at random.
    """
    trees: list[list[int]] = []
    sizes: list[tuple[int, int]] = []
    open_trees: dict[int, int] = {}  # key of a head -> its tree that still has room
    for row, key in zip(order.tolist(), head_keys(order, index.head).tolist(), strict=True):
        number = open_trees.get(key) if index.head[row] else None
        if number is not None:
            tokens, tiles = sizes[number]
            tokens += cost(index, row, is_shared=True)[0]
            most = min(budget[0], TREE_GROWTH * int(index.tokens[trees[number][0]]))
            if tokens <= most and fits_tree(index, row, len(trees[number]), tokens):
                trees[number].append(row)
                sizes[number] = tokens, tiles
                continue
        open_trees[key] = len(trees)
        trees.append([row])
        sizes.append(cost(index, row, is_shared=False))
    columns = np.array(sizes, np.int32)  # (trees, 2)
    mixed = np.random.default_rng(len(trees)).permutation(len(trees))
    packs = plan_packs(mixed, columns[:, 0], columns[:, 1], budget)
    return [[row for tree in pack for row in trees[tree]] for pack in packs]


def cost(index: Index, row: int, is_shared: bool) -> tuple[int, int]:
    """Return the tokens and tiles that a row adds to a pack; `is_shared`: behind another row of its head."""
    if is_shared:
        return int(index.tokens[row]) - int(index.head_tokens[row]), 0
    return int(index.tokens[row]), int(index.tiles[row])


def shares_head(index: Index, row: int, other: int) -> bool:
    """Return whether two rows show the same pictures behind the same tokens."""
    return bool(index.head[row]) and index.head[row] == index.head[other]


def fits_tree(index: Index, row: int, num_rows: int, tokens: int) -> bool:
    """Return whether HEAD_COPIES allows a row behind `num_rows` of the same head, in a tree that then has `tokens`."""
    return num_rows * int(index.head_tokens[row]) <= HEAD_COPIES * tokens


def side_by_side(order: npt.NDArray[np.int64], heads: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Move the rows of one head next to the first of them: (R,) -> (R,), a random order of heads then.

    Where a mixture repeats rows, that holds for their first occurrences, their second ones, and so on.
    """
    _, first, inverse = np.unique(head_keys(order, heads), return_index=True, return_inverse=True)
    places = np.where(heads[order] == 0, np.arange(len(order)), first[inverse])
    return order[np.argsort(places, kind="stable")]


def head_keys(order: npt.NDArray[np.int64], heads: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return a key of each row's head, another one for each time that the row comes: (R,), hashes as heads are."""
    return heads[order] + occurrences(order) * SPREAD


def occurrences(order: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Count how often each entry of an order has come before: [3, 1, 3, 3] -> [0, 0, 1, 2]."""
    by_row = np.argsort(order, kind="stable")
    _, starts, counts = np.unique(order[by_row], return_index=True, return_counts=True)
    found = np.empty(len(order), np.uint64)
    found[by_row] = np.arange(len(order)) - np.repeat(starts, counts)
    return found


def trees_of(rows: Sequence[int], index: Index, share_prefix: bool) -> list[list[int]]:
    """Part the rows of a pack into runs that share a head; each row is its own where nothing is shared."""
    trees: list[list[int]] = []
    for row in rows:
        if share_prefix and trees and shares_head(index, row, trees[-1][0]):
            trees[-1].append(row)
        else:
            trees.append([row])
    return trees


def rows_behind(rows: Sequence[int], index: Index, share_prefix: bool) -> list[int]:
    """List the rows of a pack that share the head of one before them, which stands once."""
    return [row for tree in trees_of(rows, index, share_prefix) for row in tree[1:]]


def _pack(places: list[int], tokens: Sequence[int], tiles: Sequence[int], budget: tuple[int, int]) -> list[list[int]]:
    """Mix lengths within packs if that takes at most MIXING_COST more packs than the fewest possible."""
    fewest = _best_fit(places, tokens, tiles, budget)
    most = math.ceil((1 + MIXING_COST) * len(fewest))
    for num_packs in range(len(fewest), most + 1):
        mixed = _spread(places, tokens, tiles, (*budget, num_packs))
        if mixed is not None:
            return mixed
    return fewest


def _spread(
    places: list[int], tokens: Sequence[int], tiles: Sequence[int], limits: tuple[int, int, int]
) -> list[list[int]] | None:
    """Put each place, largest first, into the emptiest pack that has room; None if num_packs are too few."""
    max_tokens, max_tiles, num_packs = limits
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    # Tiles used -> a heap of (tokens used, pack). A single heap would be searched through for each place, once most
    # packs are full of tiles.
    by_tiles = {0: [(0, pack) for pack in range(num_packs)]}
    num_used = 0
    for place in places:
        need_tokens, need_tiles = tokens[place], tiles[place]
        (used, pack), used_tiles = (max_tokens, len(packs)), 0
        for each, heap in by_tiles.items():
            if each + need_tiles <= max_tiles and heap and heap[0] < (used, pack):
                (used, pack), used_tiles = heap[0], each
        if used + need_tokens <= max_tokens:
            heapq.heappop(by_tiles[used_tiles])
        else:
            used, used_tiles, pack = 0, 0, len(packs)
            packs.append([])  # for a place that is too large for any pack
        num_used += not packs[pack]
        if num_used > num_packs:
            return None
        packs[pack].append(place)
        heapq.heappush(by_tiles.setdefault(used_tiles + need_tiles, []), (used + need_tokens, pack))
    return [pack for pack in packs if pack]


def _best_fit(
    places: list[int], tokens: Sequence[int], tiles: Sequence[int], budget: tuple[int, int]
) -> list[list[int]]:
    """Put each place, largest first, into the fullest pack that still has room for its tokens and its tiles."""
    max_tokens, max_tiles = budget
    packs: list[list[int]] = []
    # Tiles left -> (tokens left, pack), sorted. A single list would be searched from end to end if tiles run out before
    # tokens do.
    with_room: dict[int, list[tuple[int, int]]] = {}
    for place in places:
        need_tokens, need_tiles = tokens[place], tiles[place]
        fullest, room = (max_tokens, len(packs)), max_tiles  # a new pack, unless another has room
        for tiles_left, candidates in with_room.items():
            position = bisect_left(candidates, (need_tokens, -1))
            if tiles_left >= need_tiles and position < len(candidates) and candidates[position] < fullest:
                fullest, room = candidates[position], tiles_left
        left, pack = fullest
        if pack < len(packs):
            del with_room[room][bisect_left(with_room[room], fullest)]
        else:
            packs.append([])
        packs[pack].append(place)
        if left > need_tokens:
            insort(with_room.setdefault(room - need_tiles, []), (left - need_tokens, pack))
    return packs


def plan_batches(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], batch: int, seed: int
) -> Iterator[list[int]]:
    """Yield groups of `batch` rows of similar length (padded mode): rows sorted within windows, groups shuffled."""
    generator = np.random.default_rng(seed)
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        by_length = window[np.argsort(-lengths[window], kind="stable")]
        groups = [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
        for index in generator.permutation(len(groups)):
            yield [int(row) for row in groups[index]]
