"""The exported processor makes the pixels of training where Pillow is its backend."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from vlm_tune.data.tiles import make_tiles, normalize
from vlm_tune.model.layouts.internvl.processor import save_processor

SIZES = [(56, 56), (60, 41), (112, 56), (60, 130), (200, 37)]


@pytest.fixture(scope="module")
def exported(toys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    config, model = toys.staged("stage=finetune").config, toys.model()
    save_processor(model.tokenizer, model.encoder, config.model, folder)
    return folder, config.model


def picture(size):
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", SIZES)
def test_pillows_pixels_are_those_of_training(exported, size):
    folder, model = exported
    theirs = AutoImageProcessor.from_pretrained(folder, backend="pil")(picture(size), return_tensors="pt")
    ours = normalize(torch.from_numpy(make_tiles(picture(size), model.tiles)), "imagenet", torch.float32)
    assert theirs["pixel_values"].shape == ours.shape
    torch.testing.assert_close(theirs["pixel_values"], ours, atol=1e-6, rtol=0)


def test_the_default_backend_is_transformers_own_choice(exported):
    # no key of a folder names a backend: with torchvision installed AutoProcessor takes it, and the export says so
    processor = AutoProcessor.from_pretrained(exported[0])
    assert type(processor.image_processor).__name__ == "GotOcr2ImageProcessor"
    processor.image_processor = AutoImageProcessor.from_pretrained(exported[0], backend="pil")
    assert type(processor.image_processor).__name__ == "GotOcr2ImageProcessorPil"
