"""The packs of a step are dealt to the ranks so that each has a like share of its tokens and tiles."""

import numpy as np
import pytest

from vlm_tune.config.schema import LossWeight
from vlm_tune.data.sizes import Index
from vlm_tune.data.stream import BatchStream, StreamSettings

ROWS = 2000


def rows_of(seed):
    """Draw texts, pictures of a few tiles, and pictures of many: 256 tokens a tile, and text of any length."""
    chance = np.random.default_rng(seed)
    tiles = np.choose(
        chance.integers(0, 3, ROWS), [np.zeros(ROWS, int), chance.integers(1, 7, ROWS), np.full(ROWS, 13)]
    )
    tokens = tiles * 256 + np.minimum(2500, chance.lognormal(5, 1, ROWS)).astype(int) + 10
    none = np.zeros(ROWS, np.uint64)
    return Index(np.arange(ROWS), tokens, tokens // 4, tiles, none, none, none.astype(np.int32), none)


def imbalance(index, world, passes, seed):
    """Return the largest rank's share over the mean, of tokens and tiles, on average over an epoch's steps."""
    settings = StreamSettings(True, (4096, 48), 1, world * passes, LossWeight.token, seed)
    ranks = [iter(BatchStream(index, settings, rank=(rank, world))) for rank in range(world)]
    shares = []
    for _ in range(BatchStream(index, settings).groups_per_epoch() // (world * passes)):
        rows = [[row for _ in range(passes) for row in next(rank).rows] for rank in ranks]
        sums = np.array([[index.tokens[each].sum(), index.tiles[each].sum()] for each in rows])
        shares.append(sums.max(0) / np.maximum(1, sums.mean(0)))
    return np.mean(shares, 0)


@pytest.mark.parametrize(
    ("world", "passes", "most_tokens", "most_tiles"), [(2, 8, 1.02, 1.015), (8, 2, 1.08, 1.06), (8, 8, 1.03, 1.025)]
)
def test_ranks_have_like_shares_of_a_step(world, passes, most_tokens, most_tiles):
    shares = np.array([imbalance(rows_of(seed), world, passes, seed) for seed in range(3)])
    assert shares[:, 0].max() < most_tokens
    assert shares[:, 1].max() < most_tiles


def test_which_rows_make_up_a_step_does_not_depend_on_the_ranks():
    index, settings = rows_of(0), StreamSettings(True, (4096, 48), 1, 16, LossWeight.token, 0)
    alone, ranks = (
        iter(BatchStream(index, settings)),
        [iter(BatchStream(index, settings, rank=(rank, 4))) for rank in range(4)],
    )
    for _ in range(20):
        step = {batch.place: batch for batch in (next(rank) for rank in ranks for _ in range(4))}
        assert [step[place] for place in range(16)] == [next(alone) for _ in range(16)]
