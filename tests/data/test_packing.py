"""Packs hold each sample once, whole, within both budgets, in an order that depends on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.data.packing import (
    HEAD_COPIES,
    WINDOW,
    plan_batches,
    plan_packs,
    plan_trees,
    side_by_side,
    trees_of,
)
from vlm_tune.data.sizes import Index

SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9)), min_size=1, max_size=150)
BUDGET = st.tuples(st.integers(20, 400), st.integers(1, 14))


def columns(sizes):
    table = np.array(sizes, dtype=np.int32)
    return table[:, 0], table[:, 1]


def shuffled(count, seed):
    return np.random.default_rng(seed).permutation(count)


@given(SIZES, BUDGET, st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_packs_hold_each_sample_once_and_keep_both_budgets(sizes, budget, seed):
    tokens, tiles = columns(sizes)
    packs = list(plan_packs(shuffled(len(sizes), seed), tokens, tiles, budget))
    assert sorted(row for pack in packs for row in pack) == list(range(len(sizes)))
    for pack in packs:
        fits = tokens[pack].sum() <= budget[0] and tiles[pack].sum() <= budget[1]
        assert fits or len(pack) == 1, "only a row that is too large for any pack may break a budget, in its own"


@given(SIZES, BUDGET, st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_packs_are_the_same_each_time(sizes, budget, seed):
    tokens, tiles = columns(sizes)
    order = shuffled(len(sizes), seed)
    assert list(plan_packs(order, tokens, tiles, budget)) == list(plan_packs(order.copy(), tokens, tiles, budget))


@given(SIZES, BUDGET, st.lists(st.integers(1, 4), min_size=150, max_size=150))
@settings(max_examples=100, deadline=None)
def test_a_row_that_is_named_several_times_is_packed_as_often(sizes, budget, repeats):
    tokens, tiles = columns(sizes)
    order = np.repeat(np.arange(len(sizes)), repeats[: len(sizes)])
    packs = plan_packs(np.random.default_rng(0).permutation(order), tokens, tiles, budget)
    assert sorted(row for pack in packs for row in pack) == order.tolist()


def test_a_sample_goes_into_the_emptiest_pack_that_has_room():
    tokens, tiles = columns([(60, 1), (50, 1), (40, 1), (35, 1)])
    assert list(plan_packs(np.arange(4), tokens, tiles, (100, 9))) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("head_tokens", "budget", "pictures"), [(20, 960, 10), (1800, 8192, 4)])
def test_a_pack_of_trees_shows_about_half_as_many_pictures_as_one_of_rows_or_more(head_tokens, budget, pictures):
    """36 pictures with nine rows each that have 20 tokens of their own: 24 and 4 rows would fill a pack unshared."""
    index = rows_of_pictures(36, 9, head_tokens, 20)
    packs = plan_trees(np.arange(len(index)), index, (budget, 99))
    assert sorted(row for pack in packs for row in pack) == list(range(len(index)))
    assert np.mean([len(set(index.head[pack])) for pack in packs]) >= pictures


def rows_of_pictures(num_pictures, num_rows, head_tokens, own_tokens):
    """Index pictures with as many rows each, that share a head."""
    count = num_pictures * num_rows
    same = {"tokens": head_tokens + own_tokens, "supervised": 5, "tiles": 1, "content": 0, "head_tokens": head_tokens}
    columns = {name: np.full(count, value, np.int32) for name, value in same.items()}
    heads = np.random.default_rng(0).integers(1, 1 << 63, num_pictures).repeat(num_rows).astype(np.uint64)
    return Index(rows=np.arange(count), head=heads, pictures=heads, **columns)


@pytest.mark.parametrize(("head_tokens", "own_tokens"), [(1800, 20), (900, 40), (40, 20)])
def test_the_rows_of_a_tree_see_a_bounded_number_of_its_heads_keys(head_tokens, own_tokens):
    """The attention of each row keeps the keys of its head: 92 short questions about a picture would keep 92."""
    index = rows_of_pictures(3, 120, head_tokens, own_tokens)
    packs = plan_trees(np.arange(len(index)), index, (4096, 99))
    assert sorted(row for pack in packs for row in pack) == list(range(len(index)))
    for pack in packs:
        seen_again = (len(pack) - len(trees_of(pack, index, True))) * head_tokens
        assert seen_again <= (HEAD_COPIES + 1) * 4096


@pytest.mark.parametrize("window", [WINDOW, 150])
def test_the_passes_over_a_row_that_a_mixture_repeats_are_in_different_trees(window):
    index = rows_of_pictures(40, 5, 40, 20)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(index)), 3))
    order = side_by_side(order, index.head)
    for start in range(0, len(order), window):
        for pack in plan_trees(order[start : start + window], index, (100, 99)):  # a tree a pack
            assert len(set(pack)) == len(pack)


def test_the_passes_over_a_row_that_a_mixture_repeats_are_apart():
    index = rows_of_pictures(400, 5, 40, 20)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(index)), 3))
    places = np.argsort(side_by_side(order, index.head), kind="stable").reshape(-1, 3)
    near = (np.diff(np.sort(places), axis=1) < 50).any(axis=1)  # of 6,000 places
    assert near.mean() < 0.1


def test_a_pack_without_room_for_tiles_is_passed_over():
    tokens, tiles = columns([(60, 3), (50, 1), (40, 2)])
    assert list(plan_packs(np.arange(3), tokens, tiles, (100, 4))) == [[0], [1, 2]]


def test_lengths_are_mixed_at_the_cost_of_two_percent_of_the_packs():
    rng = np.random.default_rng(0)
    tokens = rng.choice([20, 30, 200, 400], WINDOW).astype(np.int32)
    packs = list(plan_packs(np.arange(WINDOW), tokens, np.zeros_like(tokens), (1024, 1)))
    num_long = [int((tokens[pack] >= 200).sum()) for pack in packs]
    assert max(num_long) - min(num_long) <= 3, "no pack holds short samples alone"
    assert len(packs) <= 1.02 * tokens.sum() / 1024 + 2


def test_windows_are_packed_apart():
    tokens = np.full(WINDOW + 1, 10, np.int32)
    packs = list(plan_packs(np.arange(WINDOW + 1), tokens, np.zeros_like(tokens), (10 * WINDOW * 2, 1)))
    assert [len(pack) for pack in packs] == [WINDOW, 1]


def test_tiles_that_run_out_first_cost_no_time():
    # nearly every pack stays open for more text: a search through all of them would be quadratic
    tokens, tiles = np.full(WINDOW, 20, np.int32), np.full(WINDOW, 13, np.int32)
    assert len(list(plan_packs(np.arange(WINDOW), tokens, tiles, (100_000, 13)))) == WINDOW


def lengths(kind, count=3 * WINDOW):
    """Tokens and tiles of rows, distributed as in the demo, in LLaVA's 665k and in InternVL's mixtures."""
    rng = np.random.default_rng(0)
    text = rng.gamma(2, 90, count) + 20
    if kind == "demo":  # a picture of 16 tokens, a question and a few words
        return rng.integers(34, 60, count).astype(np.int32), np.ones(count, np.int32)
    tiles = (rng.random(count) < 0.94).astype(np.int32)
    if kind == "internvl":  # a share of the pictures in each grid of up to 12 tiles, and the thumbnail
        tiles *= rng.choice([1, 5, 7, 10, 13], count, p=[0.3, 0.2, 0.25, 0.1, 0.15])
    per_tile = {"llava": 576, "internvl": 256, "benchmark": 16}[kind]
    text = np.where(tiles == 0, rng.gamma(2, 500, count) + 40, text)  # ShareGPT's rows are long and show nothing
    return np.minimum(text + per_tile * tiles, 4096).astype(np.int32), tiles.astype(np.int32)


@pytest.mark.parametrize(
    ("kind", "budget"),
    [
        ("demo", (1024, 48)),
        ("llava", (4096, 48)),
        ("llava", (8192, 48)),
        ("internvl", (8192, 48)),
        ("internvl", (16384, 96)),
        ("benchmark", (1024, 48)),
    ],
)
def test_packs_are_at_least_95_percent_full(kind, budget):
    tokens, tiles = lengths(kind)
    packs = list(plan_packs(shuffled(len(tokens), 0), tokens, tiles, budget))
    assert tokens.sum() / (len(packs) * budget[0]) >= 0.95


@given(SIZES, st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_groups_of_like_length_hold_each_sample_once(sizes, batch, seed):
    tokens, _ = columns(sizes)
    groups = list(plan_batches(shuffled(len(sizes), seed), tokens, batch, seed))
    assert sorted(row for group in groups for row in group) == list(range(len(sizes)))
    assert all(len(group) <= batch for group in groups)
    assert len(groups) == -(-len(sizes) // batch)


def test_groups_waste_little_on_padding():
    tokens = np.random.default_rng(0).integers(10, 1000, WINDOW).astype(np.int32)
    groups = list(plan_batches(np.arange(WINDOW), tokens, 8, 0))
    assert tokens.sum() / sum(tokens[group].max() * len(group) for group in groups) >= 0.98
