"""Augmentation varies pictures at random, reproducibly, and never their number of tiles."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm_tune.config.schema import AugmentConfig, TilesConfig
from vlm_tune.data.pictures import augment as module
from vlm_tune.data.pictures.augment import augment
from vlm_tune.data.tiles import count_tiles, make_tiles

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
PHOTO = Image.fromarray(PIXELS)
ALL = AugmentConfig(flip=True, crop=0.5, jpeg=True)


def vary(config: AugmentConfig, seed: int, image: Image.Image = PHOTO) -> np.ndarray:
    return np.asarray(augment(image, config, np.random.default_rng(seed)))


def test_nothing_happens_by_default() -> None:
    generator = np.random.default_rng(1)
    assert augment(PHOTO, AugmentConfig(), generator) is PHOTO
    assert generator.bit_generator.state == np.random.default_rng(1).bit_generator.state


@pytest.mark.parametrize(
    "config", [AugmentConfig(flip=True), AugmentConfig(crop=0.6), AugmentConfig(jpeg=True), ALL], ids=str
)
def test_equal_seeds_make_equal_pictures_and_others_do_not(config: AugmentConfig) -> None:
    np.testing.assert_array_equal(vary(config, 3), vary(config, 3))
    assert any((vary(config, seed) != vary(config, 3)).any() for seed in range(20))
    np.testing.assert_array_equal(np.asarray(PHOTO), PIXELS)  # the input stays


@pytest.mark.parametrize("size", [(64, 48), (31, 97), (1, 1), (200, 3)])
def test_size_and_number_of_tiles_stay(size: tuple[int, int]) -> None:
    tiles = TilesConfig(size=16)
    for seed in range(10):
        image = augment(Image.new("RGB", size), ALL, np.random.default_rng(seed))
        assert (image.mode, image.size) == ("RGB", size)
        assert len(make_tiles(image, tiles)) == count_tiles(*size, tiles)


def test_half_of_the_pictures_are_mirrored() -> None:
    mirrored = [(vary(AugmentConfig(flip=True), seed) == PIXELS[:, ::-1]).all() for seed in range(400)]
    assert 160 < sum(mirrored) < 240
    assert all((vary(AugmentConfig(flip=True), seed) == PIXELS).all() != mirrored[seed] for seed in range(20))


def test_crop_keeps_the_share_and_the_aspect_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = []
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, resample, box: boxes.append(box) or image)
    for seed in range(200):
        augment(PHOTO, AugmentConfig(crop=0.5), np.random.default_rng(seed))
    shares = [((right - left) / 64, (bottom - top) / 48) for left, top, right, bottom in boxes]
    assert all(wide == pytest.approx(high) and 0.5 <= wide <= 1 for wide, high in shares)
    assert all(left >= 0 and top >= 0 and right <= 64 and bottom <= 48 for left, top, right, bottom in boxes)
    assert min(shares)[0] < 0.52
    assert max(shares)[0] > 0.98


def test_jpeg_qualities_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(module, "_degrade", lambda image, quality: drawn.append(quality) or image)
    generator = np.random.default_rng(0)
    for _ in range(2000):
        augment(PHOTO, AugmentConfig(jpeg=True), generator)
    assert sorted(set(drawn)) == list(range(75, 101))


def test_degraded_pixels_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JPEG_QUALITIES", (80, 80))
    with io.BytesIO() as file:
        PHOTO.save(file, format="JPEG", quality=80)
        expected = np.asarray(Image.open(file))
    np.testing.assert_array_equal(vary(AugmentConfig(jpeg=True), 0), expected)
