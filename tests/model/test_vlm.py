"""The model looks: pictures reach the places that were kept for them, and nothing else."""

from dataclasses import replace

import pytest
import torch

from vlm_tune.data.batch import add_pictures
from vlm_tune.model.vlm import merge_features

PICTURE, SMALL, TEXT = 0, 1, 6  # training rows: three tiles, one tile or three, no picture


@pytest.fixture(scope="module")
def staged(toys):
    staged = toys.staged("stage=finetune", "stage.lora.dropout=0")
    staged.model.vlm.eval()
    return staged


@pytest.fixture
def vlm(staged):
    return staged.model.vlm


def test_the_rows_are_what_these_tests_take_them_for(staged):
    tiles = staged.data.train.index.tiles
    assert tiles[PICTURE] > 0
    assert tiles[SMALL] > 0
    assert tiles[TEXT] == 0


@torch.no_grad()
def test_another_picture_gives_another_loss(vlm, staged):
    batch = staged.batch([PICTURE])
    other = replace(batch, tiles=255 - batch.tiles)
    assert abs(float(vlm(batch)) - float(vlm(other))) > 1e-3


@torch.no_grad()
def test_one_changed_tile_is_seen(vlm, staged):
    batch = staged.batch([PICTURE])
    tiles = batch.tiles.clone()
    tiles[-1] = 255 - tiles[-1]
    assert abs(float(vlm(batch)) - float(vlm(replace(batch, tiles=tiles)))) > 1e-4


@torch.no_grad()
def test_a_blind_model_sees_no_difference(vlm, staged, monkeypatch):
    monkeypatch.setattr(vlm, "is_blind", True)
    batch = staged.batch([PICTURE])
    assert torch.equal(vlm(batch), vlm(replace(batch, tiles=255 - batch.tiles)))


@torch.no_grad()
def test_kept_features_stand_for_tiles(vlm, staged):
    batch = staged.batch([PICTURE, TEXT])
    kept = replace(batch, tiles=None, features=vlm.see(batch.tiles))
    assert torch.equal(vlm(batch), vlm(kept))


@torch.no_grad()
def test_a_batch_without_pictures_runs(vlm, staged):
    batch = staged.batch([TEXT])
    assert batch.tiles is None
    assert torch.isfinite(vlm(batch))


def test_features_take_the_places_of_the_context_tokens_in_order():
    embeddings = torch.zeros(1, 7, 2)
    places = torch.tensor([1, 2, 4, 5])
    features = torch.arange(1.0, 9.0).view(2, 2, 2)
    merged = merge_features(embeddings, places, features)
    assert merged[0].tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [5, 6], [7, 8], [0, 0]]


def test_the_embeddings_given_stay_as_they_were():
    embeddings = torch.zeros(1, 2, 2)
    merge_features(embeddings, torch.tensor([0]), torch.ones(1, 1, 2))
    assert not embeddings.any()


@pytest.mark.parametrize("num_tiles", [1, 2, 4])
def test_a_wrong_number_of_features_is_refused(vlm, staged, num_tiles):
    batch = staged.batch([PICTURE])
    wrong = torch.zeros(num_tiles, *batch.tiles.shape[1:], dtype=torch.uint8)
    with pytest.raises((AssertionError, RuntimeError), match=r"image features|shape"):
        vlm(replace(batch, tiles=wrong))


def test_a_tile_too_many_beside_one_too_few_is_refused(staged):
    # the sum over the batch fits: only the count of each sample shows that one would get its neighbour's picture
    rows = [PICTURE, SMALL]
    data = staged.data.train.data
    samples = [data.sample(row) for row in rows]
    examples = [data.encoder.encode(sample, data.tiling(sample)) for sample in samples]
    tiles = [data.make_tiles(sample, example) for sample, example in zip(samples, examples, strict=True)]
    swapped = [torch.cat([torch.from_numpy(tiles[0]), torch.from_numpy(tiles[1][:1])]).numpy(), tiles[1][1:]]
    with pytest.raises(AssertionError, match="tiles were counted"):
        add_pictures(staged.batch(rows), examples, swapped, [], staged.model.vlm.context_id)


def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass(vlm, staged):
    assert vlm.see(staged.batch([PICTURE]).tiles).grad_fn is None


def test_gradients_reach_the_projector_through_the_pictures(vlm, staged):
    loss = vlm(staged.batch([PICTURE]))
    (gradient,) = torch.autograd.grad(loss, [vlm.projector.linear_1.weight])
    assert gradient.abs().sum() > 0


def test_a_trained_encoder_gets_gradients(toys):
    staged = toys.staged("stage=finetune", "stage.train.vision=full")
    loss = staged.model.vlm(staged.batch([PICTURE]))
    gradients = torch.autograd.grad(loss, [staged.model.vlm.vision.tower.embeddings.cls_token])
    assert gradients[0].abs().sum() > 0


def test_a_step_without_pictures_gives_the_projector_a_gradient_of_zero(toys):
    # none at all would let the optimizer stand still on one rank, where with two ranks it moves on by its momentum
    staged = toys.staged("stage=finetune")
    staged.model.vlm(staged.batch([TEXT])).backward()
    for weight in staged.model.vlm.projector.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_a_stage_that_does_not_train_sight_runs_no_blank_tile(toys, monkeypatch):
    staged = toys.staged("stage=sft")
    monkeypatch.setattr(staged.model.vlm, "see", None)
    staged.model.vlm(staged.batch([TEXT])).backward()
