"""Pixels of any mode become RGB: transparency is dropped, or laid over a colour. Plumbing before tiles (2)."""

import numpy as np
from PIL import Image, ImageColor

Key = int | tuple[int, ...] | None

# Factors by which Pillow scales grey of fewer bits up; the transparent colour of a PNG it leaves as written.
_STRETCHED = {"L;2": 85, "L;4": 17}


def decode_rgb(image: Image.Image, alpha: str = "drop") -> Image.Image:
    """Decode an opened picture to RGB; Pillow's exceptions on damaged bytes pass through.

    As in the references, convert("RGB") converts the mode. Only 16-bit grey keeps its high byte instead, as Pillow does
    with 16-bit colour, since convert("RGB") would turn everything above 255 of 65535 white.

    `alpha` is data.image.alpha. drop: transparent pixels keep whatever colour they have. A colour: the picture is laid
    over it by Image.alpha_composite, c = round((a * c + (255 - a) * colour) / 255) for each channel c with alpha a,
    halves rounded up: black of alpha 128 over white is 127. Pictures without transparency are not affected.
    """
    if alpha == "drop" or not image.has_transparency_data:
        image.load()
        return _convert(image)
    over = Image.new("RGBA", image.size, (*ImageColor.getrgb(alpha)[:3], 255))
    over.alpha_composite(_decode_rgba(image))
    return over.convert("RGB")


def shows_through(image: Image.Image) -> bool:
    """Decode an opened picture; return whether any pixel is not opaque, so that data.image.alpha changes it."""
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
    """Return the transparent colour of a PNG without an alpha channel, as values after decoding, or None.

    For 16-bit colour these are the high bytes, the only ones that Pillow keeps.
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
