"""Pictures that were replaced by others of the same size are noticed; a copy with other times is the same."""

import os
import shutil

import pytest
from PIL import Image

from vlm_tune.config.parse import load_config
from vlm_tune.data.datamodule import MicroBatches
from vlm_tune.data.stream import MicroBatch
from vlm_tune.errors import CheckpointError, DataError
from vlm_tune.training.run import train


@pytest.fixture
def data(toys, tmp_path):
    shutil.copytree(toys.data, tmp_path / "data")
    return tmp_path / "data"


def replaced(data, name="train_0"):
    """Mirror a picture's pixels, and keep its size in pixels."""
    path = data / "pictures" / f"{name}.png"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(1).save(path)


def aged(data):
    for path in (data / "pictures").iterdir():
        os.utime(path, (1e9, 1e9))


def test_a_row_shows_it_when_it_is_read(toys, data):
    staged = toys.staged(f"data.path={data}/train.jsonl")
    train = staged.data.train
    batches = MicroBatches(train.data, train.index, staged.data.settings(1), is_training=True)
    aged(data)
    assert batches[MicroBatch((0,), 0, 1.0, (0, 0, 0))].tiles is not None
    replaced(data)
    with pytest.raises(DataError, match=r"train\.jsonl:1 \(id \"train_0\"\): shows another picture than when it was"):
        batches[MicroBatch((0,), 0, 1.0, (0, 0, 0))]


def test_a_run_goes_on_with_a_copy_and_not_with_others(toys, data, tmp_path, monkeypatch):
    all_of_it = ("stage=finetune", "stage.init_from=none", "stage.evaluate=false", "trainer.num_chats=0")

    def settings(steps, *more):
        given = (*all_of_it, f"stage.max_steps={steps}", f"data.path={data}/train.jsonl", *more)
        return load_config(toys.arguments(*given, runs=tmp_path / "runs"))

    run = train(settings(2))
    aged(data)
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "of_another_machine"))
    assert train(settings(3, "resume=last")) == run
    replaced(data)
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "of_a_third"))
    with pytest.raises(CheckpointError, match=r"train\.jsonl: pictures were changed .* resume_allow=\[data\.path\]"):
        train(settings(4, "resume=last"))
    assert train(settings(4, "resume=last", "resume_allow=[data.path]")) == run
