"""On a GPU, features are kept where a disk brings them sooner than the encoder makes them."""

import pytest
import torch

from vlm_tune.config.parse import load_config
from vlm_tune.model import fill_cache
from vlm_tune.model.fill_cache import plan_cache, slower_to_read
from vlm_tune.model.flops import Flops

H100, A100, L4 = "NVIDIA H100", "NVIDIA A100", "NVIDIA L4"
SMALL = (1024 * 1024 * 2, 0.73e12)  # InternViT-300M at 448 pixels: bytes and operations of a tile
LARGE = (1024 * 3200 * 2, 12.0e12)  # InternViT-6B


@pytest.fixture
def on_card(monkeypatch):
    """Let torch see a card, and an encoder take so many operations."""

    def see(card, flops):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
        monkeypatch.setattr(fill_cache, "count_flops", lambda vlm: Flops(0, 0, 0, flops, 0))

    return see


@pytest.mark.parametrize(
    ("card", "devices", "tile", "is_slower"),
    [
        (H100, 1, SMALL, False),
        (H100, 8, SMALL, True),
        (H100, 8, LARGE, False),
        (A100, 1, SMALL, False),
        (L4, 8, SMALL, False),
        ("a card that is not listed", 8, SMALL, False),
        (None, 8, SMALL, False),
    ],
)
def test_it_hangs_on_card_encoder_and_number_of_gpus(on_card, card, devices, tile, is_slower):
    on_card(card, tile[1])
    config = load_config([f"trainer.devices={devices}", "trainer.global_batch=8"])
    assert (slower_to_read(None, tile[0], config) > 1) is is_slower


@pytest.mark.parametrize(("wanted", "fits"), [("auto", False), ("on", True)])
def test_auto_decides_by_it_and_on_does_not(toys, on_card, wanted, fits):
    staged = toys.staged("stage=finetune", f"data.feature_cache={wanted}")
    on_card(H100, 1.0)
    plan = plan_cache(staged.model.vlm, staged.data, staged.config)
    assert plan.fits is fits
    assert ("times as fast as a disk brings it: off" in plan.summary) is not fits
