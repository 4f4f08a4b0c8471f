"""`cache` keeps the frozen encoder's features of a run's pictures, so that the run itself encodes none."""

import pytest

from vlm_tune.cli import main
from vlm_tune.model.parts.vision import VisionEncoder


@pytest.fixture
def seen(monkeypatch):
    """Count the tiles that the vision encoder is shown."""
    tiles = []
    forward = VisionEncoder.forward

    def watched(self, pixels):
        tiles.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(VisionEncoder, "forward", watched)
    return tiles


def test_a_run_after_it_encodes_no_picture(toys, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    arguments = toys.arguments("stage=pretrain", "stage.evaluate=false", "trainer.num_chats=0", runs=tmp_path / "runs")
    assert main(["cache", *arguments]) == 0
    assert seen
    seen.clear()
    assert main(arguments) == 0
    assert not seen


def test_the_encoder_is_the_one_that_an_earlier_stage_trained(toys, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    quiet = ("stage.evaluate=false", "trainer.num_chats=0")
    assert main(toys.arguments("stage=pretrain", "stage.train.vision=full", *quiet, runs=tmp_path / "runs")) == 0
    arguments = toys.arguments("stage=finetune", *quiet, runs=tmp_path / "runs")
    assert main(["cache", *arguments]) == 0
    seen.clear()
    assert main(arguments) == 0
    assert not seen


def test_before_the_earlier_stage_it_takes_the_base_weights_and_says_so(toys, seen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "cache"))
    assert main(["cache", *toys.arguments("stage=finetune", runs=tmp_path / "runs")]) == 0
    assert seen
    assert "the encoder of the base weights" in capsys.readouterr().out


def test_an_encoder_that_is_trained_is_refused_with_the_key(toys, capsys):
    assert main(["cache", *toys.arguments("stage=pretrain", "stage.train.vision=full")]) == 2
    assert "stage.train.vision=full" in capsys.readouterr().err
