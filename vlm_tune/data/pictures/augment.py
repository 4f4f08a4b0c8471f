"""Augment training pictures at random, before they are tiled. Plumbing between images and tiles (2)."""

import io

import numpy as np
from PIL import Image

from vlm_tune.config.schema import AugmentConfig

JPEG_QUALITIES = (75, 100)  # both included; InternVL, internvl/train/dataset.py, `qualities`


def augment(image: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Mirror, crop and JPEG-degrade an RGB picture at random, as `config` says; its size stays the same.

    The number of tiles was computed from the header when the row was indexed; since the size stays, it still holds. The
    crop keeps the aspect ratio: config.crop=0.8 keeps 80 to 100% of both sides, at a random place, and is enlarged
    to the original size. All randomness comes from `rng`, so a resumed run makes the same pictures again. A setting
    that is off draws no random number. Source of the degradation: InternVL, simulate_jpeg_degradation.
    """
    if config.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.crop < 1:
        image = _crop(image, config.crop, rng)
    if config.jpeg:
        low, high = JPEG_QUALITIES
        image = _degrade(image, int(rng.integers(low, high + 1)))
    return image


def _crop(image: Image.Image, smallest: float, rng: np.random.Generator) -> Image.Image:
    """Cut out a random part, its sides `smallest` to 1 times those of the picture, and enlarge it to the full size."""
    width, height = image.size
    kept = rng.uniform(smallest, 1)
    left = rng.uniform(0, (1 - kept) * width)
    top = rng.uniform(0, (1 - kept) * height)
    box = (left, top, left + kept * width, top + kept * height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def _degrade(image: Image.Image, quality: int) -> Image.Image:
    """Encode as JPEG of that quality and decode again."""
    with io.BytesIO() as encoded:
        image.save(encoded, format="JPEG", quality=quality)
        with Image.open(encoded, formats=["JPEG"]) as decoded:
            decoded.load()
            return decoded
