"""`cache` keeps the frozen encoder's features of a run's pictures, so that the run itself encodes none."""

import pytest

from vlm_tune.cli import main
from vlm_tune.model.vision import VisionEncoder


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


def test_an_encoder_that_is_trained_is_refused_with_the_key(toys, capsys):
    assert main(["cache", *toys.arguments("stage=pretrain", "stage.train.vision=full")]) == 2
    assert "stage.train.vision=full" in capsys.readouterr().err
