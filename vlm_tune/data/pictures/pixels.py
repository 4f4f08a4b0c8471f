"""Pixels of any mode become RGB: transparency is dropped, or laid over a colour. Plumbing before tiles (2)."""

import numpy as np
from PIL import Image, ImageColor

Key = int | tuple[int, ...] | None

# What Pillow multiplies grey of fewer bits by; the colour that a PNG calls transparent it leaves as it is written.
_STRETCHED = {"L;2": 85, "L;4": 17}


def decode_rgb(image: Image.Image, alpha: str = "drop") -> Image.Image:
    """Decode an opened picture to RGB; what Pillow raises on damaged bytes is raised.

    Modes become RGB as in the references, by convert("RGB"). Only 16-bit grey keeps its high byte instead, as Pillow
    does with 16-bit colour, since convert("RGB") would make white of everything above 255 of 65535.

    `alpha` is data.image.alpha. drop: the colours below transparent pixels count, whatever they are. A colour: the
    picture is laid over it by Image.alpha_composite, c = round((a * c + (255 - a) * colour) / 255) for each channel c
    under alpha a, halves up: black of alpha 128 over white is 127. A picture without transparency is the same under
    all settings.
    """
    if alpha == "drop" or not image.has_transparency_data:
        image.load()
        return _convert(image)
    over = Image.new("RGBA", image.size, (*ImageColor.getrgb(alpha)[:3], 255))
    over.alpha_composite(_decode_rgba(image))
    return over.convert("RGB")


def shows_through(image: Image.Image) -> bool:
    """Decode an opened picture; tell whether any pixel is not opaque, so that data.image.alpha changes it."""
    return image.has_transparency_data and bool(np.asarray(_decode_rgba(image))[..., 3].min() < 255)


def _decode_rgba(image: Image.Image) -> Image.Image:
    key = _colour_key(image)
    image.load()
    if image.mode.startswith("I;16"):
        opaque = np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)
        rgba = _convert(image)
        rgba.putalpha(Image.fromarray(opaque))
        return rgba
    if key is not None:
        image.info["transparency"] = key
    return image.convert("RGBA")


def _colour_key(image: Image.Image) -> Key:
    """Return the one colour that a PNG without alpha calls transparent, in the numbers that decoding will give.

    Of 16-bit colour the high bytes are compared, the only ones that Pillow keeps. None for every other picture.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", [])
    if image.format != "PNG" or image.mode == "P" or key is None or not tiles:
        return None
    raw_mode = tiles[0].args
    if raw_mode == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return tuple(key) if isinstance(key, tuple) else int(key) * _STRETCHED.get(str(raw_mode), 1)


def _convert(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        high_byte = np.asarray(image) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the same colours, without Pillow's advice to do this
    return image.convert("RGB")
