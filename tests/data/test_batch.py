"""A batch holds its samples whole, each apart from its neighbours, and weighs their tokens as the step asks."""

from collections import Counter
from dataclasses import fields, replace
from itertools import islice, takewhile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import turns, write_jsonl

from vlm_tune.config.parse import load_config
from vlm_tune.config.schema import LossWeight
from vlm_tune.data.batch import add_pictures, collate, token_weight
from vlm_tune.data.datamodule import DataModule, validation_packs
from vlm_tune.data.example import NO_LOSS, Example
from vlm_tune.data.sets.micro_batches import MicroBatches
from vlm_tune.data.stream import MicroBatch
from vlm_tune.errors import DataError
from vlm_tune.model.encoder import build_encoder


@st.composite
def example_lists(draw):
    """Any examples: some tokens supervised, never the first alone."""
    made = []
    for number in range(draw(st.integers(1, 6))):
        ids = np.array(draw(st.lists(st.integers(10, 99), min_size=2, max_size=12)), np.int32)
        is_supervised = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
        is_supervised[-1] = True
        made.append(Example(f"row_{number}", "train.jsonl:1", ids, np.where(is_supervised, ids, NO_LOSS)))
    return made


@given(example_lists(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_batch_holds_each_sample_whole(examples, packing):
    weights = [0.1 * (number + 1) for number in range(len(examples))]
    batch = collate(examples, weights, packing)
    lengths = [len(example.input_ids) for example in examples]
    assert batch.num_tokens == sum(lengths)
    assert batch.segments == (lengths if packing else None)
    assert batch.input_ids.shape == ((1, sum(lengths)) if packing else (len(examples), max(lengths)))
    starts = np.cumsum([0, *lengths[:-1]]) if packing else np.arange(len(examples)) * max(lengths)
    expected = []
    for example, start, length, weight in zip(examples, starts, lengths, weights, strict=True):
        place = slice(int(start), int(start) + length)
        assert batch.input_ids.flatten()[place].tolist() == example.input_ids.tolist()
        assert batch.position_ids.flatten()[place].tolist() == list(range(length))
        found = np.flatnonzero(example.labels[1:] != NO_LOSS)
        expected += [(start + at, example.labels[at + 1], np.float32(weight)) for at in found]
    assert list(zip(batch.predicting.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True)) == expected


@given(example_lists())
@settings(max_examples=100, deadline=None)
def test_packed_and_padded_batches_ask_for_the_same(examples):
    packed, padded = (collate(examples, [1.0] * len(examples), packing) for packing in (True, False))
    for batch in (packed, padded):
        before = batch.input_ids.flatten()[batch.predicting], batch.position_ids.flatten()[batch.predicting]
        following = batch.input_ids.flatten()[batch.predicting + 1]
        assert torch.equal(following, batch.targets)
        assert [tensor.tolist() for tensor in before] == [
            tensor.flatten()[packed.predicting].tolist() for tensor in (packed.input_ids, packed.position_ids)
        ]


@pytest.mark.parametrize(
    ("weight", "of_four"), [(LossWeight.token, 1.0), (LossWeight.sample, 0.25), (LossWeight.square, 0.5)]
)
def test_the_weight_of_a_token(weight, of_four):
    assert token_weight(np.array([1, 4], np.int32), weight).tolist() == [1.0, of_four]


def test_a_batch_moves_as_a_whole():
    batch = collate([Example("a", "", np.array([1, 2], np.int32), np.array([NO_LOSS, 2], np.int32))], [1.0], True)
    moved = batch.to(torch.device("cpu"))
    for each in fields(batch):
        before, after = getattr(batch, each.name), getattr(moved, each.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after


def test_a_picture_cannot_reach_its_neighbour():
    ids = np.array([1, 2], np.int32)
    examples = [Example(name, "", ids, ids, num_tiles=(count,)) for name, count in (("a", 1), ("b", 2))]
    batch = collate(examples, [1.0, 1.0], True)
    tiles = [np.zeros((count, 4, 4, 3), np.uint8) for count in (2, 1)]  # three in all, as counted
    with pytest.raises(AssertionError, match=r"\['a', 'b'\]: \[1, 2\] tiles were counted, \[2, 1\] made"):
        add_pictures(batch, examples, tiles, [], 0)


# ------------------------------------------------------------------------------------------------- from rows to batches


@pytest.fixture
def start(parts, tmp_path, monkeypatch):
    """Give a function that sets up a data module over 20 rows, each third without a picture."""
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    rows = []
    for number in range(20):
        pixels = rng.integers(0, 255, (56, 56 * (1 + number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        shown = {"image": f"{number}.png"} if number % 3 else {}
        asked = ("<image>\n" if shown else "") + "What is it? " * (1 + number % 4)
        rows.append({"id": f"row_{number}", **shown, "conversations": turns((asked, "A dish."))})
    write_jsonl(tmp_path / "train.jsonl", rows)

    def setup(*overrides):
        ours = [f"data.path={tmp_path}/train.jsonl", "model.tiles.size=56", "model.tiles.max=2", "data.format=llava"]
        more = ["data.val=none", "stage.pack_length=120", "trainer.global_batch=2"]
        config = load_config(["data=own", *parts, *ours, *more, *overrides])
        data = DataModule(config, build_encoder(config)[0])
        data.setup()
        return data

    return setup


@pytest.mark.parametrize("mode", [["stage.packing=true"], ["stage.packing=false", "trainer.micro_batch=2"]])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_batches_holds_each_row_once(start, mode, workers):
    data = start(*mode, f"data.workers={workers}")
    names = takewhile(lambda item: item.epoch == 0, data.stream())
    count = len(list(names))
    batches = list(islice(data.train_dataloader(), count))
    assert Counter(name for batch in batches for name in batch.sample_ids) == {f"row_{n}": 1 for n in range(20)}
    for batch in batches:
        is_image = batch.input_ids == data.encoder.context_id
        assert int(is_image.sum()) == 4 * (0 if batch.tiles is None else len(batch.tiles))


@pytest.mark.parametrize("loss", ["token", "sample", "square"])
def test_the_weights_of_a_steps_tokens_sum_to_one(start, loss):
    data = start(f"stage.loss={loss}")
    batches = list(islice(data.train_dataloader(), 6))
    for step in range(3):
        assert sum(float(batch.weights.sum()) for batch in batches[2 * step : 2 * step + 2]) == pytest.approx(1)


def test_validation_batches_hold_each_row_once_in_order(start):
    data = start()
    settings = data.settings(1)
    packs = validation_packs(data.train.index, settings)
    assert [row for pack in packs for row in pack.rows] == list(range(20))
    for pack in packs:
        rows = list(pack.rows)
        assert len(rows) == 1 or data.train.index.tokens[rows].sum() <= settings.budget[0]


def test_random_changes_depend_on_seed_epoch_and_row_alone(start):
    data = start("data.augment.flip=true", "data.augment.crop=0.5")
    batches = MicroBatches(data.train.data, data.train.index, data.settings(1), is_training=True)

    def tiles(*rows, epoch=0):
        return batches[MicroBatch(rows, epoch, 1.0, (0, 0, 0))].tiles

    assert torch.equal(tiles(2, 4), torch.cat([tiles(2), tiles(4)]))
    assert torch.equal(tiles(4), tiles(4))
    assert not torch.equal(tiles(4), tiles(4, epoch=1))
    plain = replace(batches.settings, seed=9)
    assert not torch.equal(
        tiles(4),
        MicroBatches(data.train.data, data.train.index, plain, True)[MicroBatch((4,), 0, 1.0, (0, 0, 0))].tiles,
    )


def test_a_picture_that_was_replaced_stops_the_run(start, tmp_path):
    data = start()
    Image.new("RGB", (112, 56)).save(tmp_path / "2.png")  # was one tile wide
    batches = MicroBatches(data.train.data, data.train.index, data.settings(1), is_training=True)
    with pytest.raises(DataError, match=r"train.jsonl:3 \(id \"row_2\"\): has \d+ tokens, .* a picture was replaced"):
        batches[MicroBatch((2,), 0, 1.0, (0, 0, 0))]
