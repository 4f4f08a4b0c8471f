"""The order of training: every row once an epoch, the same for any cursor to start from and any number of devices."""

from dataclasses import replace
from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_tune.config.schema import LossWeight
from vlm_tune.data import stream as stream_module
from vlm_tune.data.packing import WINDOW, trees_of
from vlm_tune.data.sizes import Index
from vlm_tune.data.stream import BatchStream, Draw, StreamSettings

SETTINGS = StreamSettings(
    packing=True, budget=(200, 12), micro_batch=1, groups_per_step=2, loss=LossWeight.token, seed=0
)


def index_of(count, seed=0):
    rng = np.random.default_rng(seed)
    columns = [rng.integers(low, high, count).astype(np.int32) for low, high in ((5, 120), (1, 5), (0, 5))]
    heads = rng.integers(0, max(2, count // 4), count).astype(np.uint64)  # 0 = no picture
    columns[2] = np.where(heads > 0, 1 + heads % 4, 0).astype(np.int32)  # equal heads, equal pictures
    return Index(
        np.arange(count) * 3,
        *columns,
        np.zeros(count, np.uint64),
        heads,
        np.where(heads > 0, 2 + heads % 3, 0).astype(np.int32),
        np.zeros(count, np.uint64),
    )


def plain(batches):
    return [(batch.rows, batch.epoch, batch.step_weight, batch.after) for batch in batches]


@st.composite
def streams(draw, max_rows=60):
    """Any stream over a few rows, of one file or of two as a mixture, packed or padded."""
    count = draw(st.integers(2, max_rows))
    part = draw(st.integers(1, count - 1))
    counts = draw(st.tuples(st.integers(1, 3 * part), st.integers(1, 3 * (count - part))))
    mixture = Draw((0, part, count), counts, rotates=draw(st.booleans()))
    return BatchStream(
        index_of(count, draw(st.integers(0, 9))),
        StreamSettings(
            packing=draw(st.booleans()),
            budget=(draw(st.integers(60, 500)), draw(st.integers(4, 20))),
            micro_batch=draw(st.integers(1, 3)),
            groups_per_step=draw(st.sampled_from((2, 4, 6))),
            loss=draw(st.sampled_from(LossWeight)),
            seed=draw(st.integers(0, 99)),
            draw=draw(st.sampled_from((None, mixture))),
            share_prefix=draw(st.booleans()),
        ),
    )


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """Let a few rows make several windows."""
    for module in ("stream", "packing"):
        monkeypatch.setattr(f"vlm_tune.data.{module}.WINDOW", 16)


def properties(examples):
    return settings(max_examples=examples, deadline=None)


@given(streams(), st.integers(0, 3))
@properties(150)
def test_an_epoch_holds_each_row_as_often_as_it_is_drawn(stream, epoch):
    batches = takewhile(lambda batch: batch.epoch <= epoch, stream)
    rows = sorted(row for batch in batches if batch.epoch == epoch for row in batch.rows)
    drawn, index = stream.settings.draw, stream.index
    expected = np.arange(len(index)) if drawn is None else drawn.entries(stream.settings.seed, epoch)
    assert rows == sorted(expected.tolist())


@given(streams(), st.integers(1, 40), st.integers(1, 12))
@properties(150)
def test_a_stream_goes_on_from_any_step_as_if_it_had_not_stopped(stream, num_steps, more):
    per_step = stream.settings.groups_per_step
    straight = plain(islice(stream, (num_steps + more) * per_step))
    cursor = straight[num_steps * per_step - 1][-1]
    resumed = BatchStream(stream.index, stream.settings, cursor)
    assert plain(islice(resumed, more * per_step)) == straight[num_steps * per_step :]


@given(streams(), st.integers(1, 6))
@properties(100)
def test_devices_part_each_step_among_them(stream, num_steps):
    count = num_steps * stream.settings.groups_per_step
    whole = plain(islice(stream, count))
    devices = [BatchStream(stream.index, stream.settings, rank=(rank, 2)) for rank in range(2)]
    per_step = stream.settings.groups_per_step
    parts = [list(islice(each, count // 2)) for each in devices]
    steps = [
        [batch for part in parts for batch in part[start : start + per_step // 2]]
        for start in range(0, count // 2, per_step // 2)
    ]
    assert plain(batch for step in steps for batch in sorted(step, key=lambda batch: batch.place)) == whole


def test_devices_are_dealt_packs_by_what_their_trees_need():
    """A picture that many rows share is shown once: their pack is not the one of most tiles."""
    heads = np.array([1, 1, 1, 1, 2, 3, 4, 5], np.uint64)
    tokens, tiles = np.full(8, 30, np.int32), np.array([2, 2, 2, 2, 3, 3, 3, 3], np.int32)
    zeros = np.zeros(8, np.uint64)
    index = Index(np.arange(8), tokens, tokens // 3, tiles, zeros, heads, np.full(8, 20, np.int32), zeros)
    shared = replace(SETTINGS, share_prefix=True, groups_per_step=2)
    dealt = BatchStream(index, shared, rank=(0, 2))._share([[0, 1, 2, 3], [4, 5, 6]])
    assert dealt == [1], "2 tiles and 60 tokens beside 9 tiles and 90 tokens"


@given(streams(), st.integers(1, 8))
@properties(100)
def test_the_weights_of_a_step_sum_to_one(stream, num_steps):
    per_step = stream.settings.groups_per_step
    batches = list(islice(stream, num_steps * per_step))
    for start in range(0, len(batches), per_step):
        step = batches[start : start + per_step]
        shares = [stream.row_weights(list(batch.rows)).sum() / batch.step_weight for batch in step]
        assert sum(shares) == pytest.approx(1)
        assert len({batch.after for batch in step}) == 1


@given(streams())
@properties(100)
def test_packs_keep_the_budget(stream):
    assume_packing = replace(stream.settings, packing=True, micro_batch=1)
    for batch in islice(BatchStream(stream.index, assume_packing), 30):
        rows = list(batch.rows)
        trees = trees_of(rows, stream.index, assume_packing.share_prefix)
        repeated = [row for tree in trees for row in tree[1:]]  # what they share with the first stands once
        tokens = stream.index.tokens[rows].sum() - stream.index.head_tokens[repeated].sum()
        tiles = stream.index.tiles[rows].sum() - stream.index.tiles[repeated].sum()
        assert len(rows) == 1 or (tokens <= assume_packing.budget[0] and tiles <= assume_packing.budget[1])


@given(streams())
@properties(60)
def test_the_groups_of_an_epoch_are_counted(stream):
    groups = takewhile(lambda batch: batch.epoch == 0, BatchStream(stream.index, stream.settings))
    assert stream.groups_per_epoch() == len(list(groups))


@pytest.mark.parametrize("packing", [True, False])
def test_the_groups_of_a_long_epoch_are_estimated_closely(monkeypatch, packing):
    stream = BatchStream(index_of(900), replace(SETTINGS, packing=packing, micro_batch=4))
    exact = stream.groups_per_epoch()
    monkeypatch.setattr(stream_module, "COUNTED_WINDOWS", 20)
    assert stream.groups_per_epoch() == pytest.approx(exact, rel=0.05)


def test_epochs_and_seeds_have_orders_of_their_own():
    index = index_of(40)
    orders = {
        (seed, epoch): tuple(row for batch in stream if batch.epoch == epoch for row in batch.rows)
        for seed in (0, 1)
        for stream in [list(islice(BatchStream(index, replace(SETTINGS, seed=seed)), 60))]
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(40)) for order in orders.values())


def test_the_order_of_one_file_is_that_of_earlier_versions():
    # recorded: a change of it would be a change of every run that is resumed
    batches = list(islice(BatchStream(index_of(12), replace(SETTINGS, seed=5)), 4))
    assert [batch.rows for batch in batches] == [(9, 2), (11, 3, 6, 7), (1, 10, 5), (4, 0, 8)]


def test_a_draw_takes_whole_rounds_and_the_first_part():
    drawn = Draw((0, 10, 14), (35, 2))
    assert len(drawn) == 37
    entries = drawn.entries(seed=0, epoch=3)
    assert np.bincount(entries).tolist() == [4] * 5 + [3] * 5 + [1, 1]


def test_a_rotating_draw_takes_another_part_each_epoch():
    drawn = Draw((0, 100), (130,), rotates=True)
    often = [np.bincount(drawn.entries(0, epoch), minlength=100) for epoch in range(40)]
    assert all(sorted(set(counts.tolist())) == [1, 2] for counts in often)
    assert not np.array_equal(often[0], often[1])
    assert np.array_equal(often[0], np.bincount(drawn.entries(0, 0)))
    assert np.sum(often, axis=0).min() > 40, "over the epochs every entry gets its turn"


def test_a_million_rows_cost_no_time(monkeypatch):
    for module in ("stream", "packing"):
        monkeypatch.setattr(f"vlm_tune.data.{module}.WINDOW", WINDOW)
    planned = []
    monkeypatch.setattr(stream_module, "plan_packs", lambda order, *rest: planned.append(len(order)) or [[0]])
    BatchStream(index_of(1_000_000), SETTINGS).groups_per_epoch()
    assert sum(planned) <= 50 * WINDOW
