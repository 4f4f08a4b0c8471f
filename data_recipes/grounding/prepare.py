"""Make pictures with things to find: coloured shapes drawn from a seed, and emoji placed on the demo's photos."""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlm_tune.recipes.fetch import cache_folder, fetch_npm, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser, run_recipe, write_rows

FONT = ("noto-color-emoji", "1.0.1", "noto-color-emoji-1.0.1.tgz")
FONT_SHA256 = "1eb9d65e50be8d7fe3235f48c24c9a4d63aeeaca65d0ed5dd51f956537543a76"
FONT_SIZE = 109  # the one size that the font holds pictures for

SEED = 0
NUM_SHAPES = {"train": 1600, "val": 40, "test": 80}  # pictures of several shapes
NUM_ALONE = {"train": 1600, "val": 40}  # pictures of one shape
PHOTOS = {"train": "pretrain_train", "val": "pretrain_val", "test": "test"}  # the demo's own split, by food
THINGS = {"train": (2, 4), "val": (2, 3), "test": (2, 3)}  # in a picture of several
ASKED = {"train": 1, "val": 3, "test": 3}  # things of a picture that are asked for
COPIES = {"train": 3, "val": 1, "test": 1}  # pictures made of one photo, each with other emoji; as many with one alone
SIDE = 240  # pixels of a picture's width and height
CELLS = 20  # of a picture's width and height: boxes end where cells do
CELL = SIDE // CELLS  # pixels
LINES, STEP = 4, 5  # things stand in four rows and columns, each 5 cells wide
LONGER = (4, 5)  # cells of a thing's longer side
SMOOTH = 4  # a shape is drawn so much larger, and made smaller
NOISE = 6.0  # of the grounds, in grey levels
QUALITY = 88  # as JPEG

COLOURS = {
    "red": "#d62728",
    "orange": "#ff8c1a",
    "yellow": "#f2d21b",
    "green": "#2b9a3e",
    "blue": "#2457d6",
    "purple": "#8a3fc0",
    "white": "#fafafa",
    "black": "#161616",
}
SHAPES = {
    "circle": None,
    "square": [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "diamond": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
    "cross": [
        *((1 / 3, 0.0), (2 / 3, 0.0), (2 / 3, 1 / 3), (1.0, 1 / 3), (1.0, 2 / 3), (2 / 3, 2 / 3)),
        *((2 / 3, 1.0), (1 / 3, 1.0), (1 / 3, 2 / 3), (0.0, 2 / 3), (0.0, 1 / 3), (1 / 3, 1 / 3)),
    ],
    "star": [
        (0.5 + r * math.sin(n * math.pi / 4), 0.5 - r * math.cos(n * math.pi / 4)) for n, r in enumerate([0.5, 0.2] * 4)
    ],
}
EMOJI = {
    "dog": "🐶",
    "cat": "🐱",
    "fox": "🦊",
    "panda": "🐼",
    "frog": "🐸",
    "pig": "🐷",
    "penguin": "🐧",
    "sunflower": "🌻",
    "sun": "🌞",
    "football": "⚽",
    "balloon": "🎈",
    "guitar": "🎸",
    "car": "🚗",
    "rocket": "🚀",
    "heart": "💙",
    "robot": "🤖",
}

LIST, ASK = "<image>\nWhat is in the picture?", "<image>\nWhere is <ref-object>?"

Box = tuple[int, int, int, int]
Found = list[tuple[str, Box]]  # what a picture shows, by the one expression that fits it


def prepare(options: argparse.Namespace) -> None:
    """Write train.jsonl, val.jsonl, test.jsonl and their pictures into `options.out`."""
    print("grounding: npm noto-color-emoji, 6.8 MB (font: OFL-1.1), and the recipe demo")
    font = fetch_npm(*FONT, FONT_SHA256, cache_folder() / "downloads")
    demo = run_recipe("demo")
    (options.out / "images").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        emoji = draw_emoji(unpack(font, Path(unpacked)) / "package" / "ttf" / "NotoColorEmoji.ttf")
    for part in NUM_SHAPES:
        several = [*shape_pictures(part), *emoji_pictures(part, demo, emoji)]
        rows: list[dict[str, Any]] = []
        for name, _, found in several:
            rows += [listing_row(name, found)] if part == "train" else []
            rows += asking_rows(name, found, ASKED[part])
        write_rows(rows, options.out / f"{part}.jsonl")
        alone = []
        if part in NUM_ALONE:
            alone = [*shape_pictures(part, alone=True), *emoji_pictures(part, demo, emoji, alone=True)]
            first = [listing_row(name, found) for name, _, found in alone]
            write_rows(first, options.out / f"pretrain_{part}.jsonl")
        for name, picture, _ in several + alone:
            picture.save(options.out / "images" / f"{name}.jpeg", quality=QUALITY)
        print(f"grounding: {part}: {len(several)} pictures of several things, {len(alone)} of one, {len(rows)} rows")


def listing_row(name: str, found: Found) -> dict[str, Any]:
    """Return a row that asks what a picture shows, and for no box."""
    turns = [{"role": "user", "content": LIST}, {"role": "assistant", "content": "\n".join(listed(found))}]
    return {"id": f"{name}-all", "messages": turns, "images": [f"images/{name}.jpeg"], "task": "list"}


def listed(found: Found) -> list[str]:
    """Say what a picture shows and where its boxes begin, a line for each thing, from left to right."""
    return [f"{name} at {x}, {y}" for x, y, name in sorted((*place(box), name) for name, box in found)]


def place(box: Box) -> tuple[int, int]:
    """Return the upper left corner of the place that a box lies in, in thousandths of the picture."""
    left, top, right, bottom = box
    column, row = (left + right) * LINES // (2 * SIDE), (top + bottom) * LINES // (2 * SIDE)
    return column * 1000 // LINES, row * 1000 // LINES


def asking_rows(name: str, found: Found, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows that ask for the first things of a picture: all of them are looked at, and then a box is given."""
    for number, (expression, box) in enumerate(found[:count]):
        thought = "\n".join([*listed(found), f"So {listed([(expression, box)])[0]}"])
        turns = [
            {"role": "user", "content": ASK},
            {"role": "assistant", "reasoning_content": thought, "content": "<bbox>"},
        ]
        row: dict[str, Any] = {"id": f"{name}-{number}", "messages": turns, "images": [f"images/{name}.jpeg"]}
        yield {**row, "objects": {"ref": [expression], "bbox": [list(box)]}, "task": name.partition("-")[0]}


def shape_pictures(part: str, alone: bool = False) -> Iterator[tuple[str, Image.Image, Found]]:
    """Yield pictures of several shapes, no two of one colour and form, with their names; or of one `alone`."""
    every = [(colour, form) for colour in COLOURS for form in SHAPES]
    for number in range((NUM_ALONE if alone else NUM_SHAPES)[part]):
        name = f"shapes-{part}-{'alone-' * alone}{number:04d}"
        dice = random.Random(f"{SEED} {name}")
        picture = ground(dice, name)
        chosen = dice.sample(every, 1 if alone else dice.randint(*THINGS[part]))
        boxes = places(dice, [(1.0, 1.0)] * len(chosen))
        for (colour, form), box in zip(chosen, boxes, strict=True):
            size = (box[2] - box[0], box[3] - box[1])
            picture.paste(COLOURS[colour], box, draw_shape(form, max(size)).resize(size, Image.Resampling.LANCZOS))
        yield name, picture, [(f"the {colour} {form}", box) for (colour, form), box in zip(chosen, boxes, strict=True)]


def emoji_pictures(
    part: str, demo: Path, emoji: dict[str, Image.Image], alone: bool = False
) -> Iterator[tuple[str, Image.Image, Found]]:
    """Yield photos of one part of the demo with several different emoji on them, or with one `alone`."""
    lines = (demo / f"{PHOTOS[part]}.jsonl").read_text(encoding="utf-8").splitlines()
    for file in dict.fromkeys(json.loads(line)["image"] for line in lines):
        with Image.open(demo / file) as photo:
            plain = ImageOps.fit(photo.convert("RGB"), (SIDE, SIDE), Image.Resampling.LANCZOS)  # its middle
        for number in range(COPIES[part]):
            name = f"emoji-{Path(file).stem}-{'alone-' * alone}{number}"
            dice = random.Random(f"{SEED} {name}")
            chosen, picture = dice.sample(sorted(emoji), 1 if alone else dice.randint(*THINGS[part])), plain.copy()
            forms = [emoji[each].size for each in chosen]
            boxes = places(dice, [(w / max(w, h), h / max(w, h)) for w, h in forms])
            for each, box in zip(chosen, boxes, strict=True):
                drawn = emoji[each].resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
                picture.paste(drawn, box, drawn)
            yield name, picture, [(f"the {each}", box) for each, box in zip(chosen, boxes, strict=True)]


def places(dice: random.Random, forms: list[tuple[float, float]]) -> list[Box]:
    """Return boxes in pixels for things of these relative widths and heights, each in a place of its own."""
    boxes: list[Box] = []
    for number, form in zip(dice.sample(range(LINES**2), len(forms)), forms, strict=True):
        longer = dice.choice(LONGER)
        width, height = (round(longer * side) for side in form)
        left = number % LINES * STEP + dice.randint(0, STEP - width)
        top = number // LINES * STEP + dice.randint(0, STEP - height)
        boxes.append((left * CELL, top * CELL, (left + width) * CELL, (top + height) * CELL))
    return boxes


def ground(dice: random.Random, name: str) -> Image.Image:
    """Return a ground: from one pale or dark colour to another, turned by quarters, with a little noise."""
    low, high = (tuple(dice.randint(70, 190) for _ in "rgb") for _ in range(2))
    slope = Image.linear_gradient("L").rotate(dice.choice((0, 90, 180, 270))).resize((SIDE, SIDE))
    plain = np.asarray(ImageOps.colorize(slope, low, high), np.float32)  # (H, W, 3)
    noise = np.random.default_rng(list(name.encode())).normal(0, NOISE, plain.shape)
    return Image.fromarray((plain + noise).clip(0, 255).astype(np.uint8))


def draw_shape(form: str, side: int) -> Image.Image:
    """Return a form that touches all four sides of a square, as a mask."""
    mask = Image.new("L", (side * SMOOTH, side * SMOOTH))
    pen, last = ImageDraw.Draw(mask), side * SMOOTH - 1
    corners = SHAPES[form]
    if corners is None:
        pen.ellipse((0, 0, last, last), fill=255)
    else:
        pen.polygon([(x * last, y * last) for x, y in corners], fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)


def draw_emoji(path: Path) -> dict[str, Image.Image]:
    """Return the emoji by name, each cut to what is not transparent of it."""
    font, drawn = ImageFont.truetype(path, FONT_SIZE), {}
    for name, character in EMOJI.items():
        canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
        ImageDraw.Draw(canvas).text((FONT_SIZE // 4, FONT_SIZE // 4), character, font=font, embedded_color=True)
        drawn[name] = canvas.crop(canvas.getchannel("A").getbbox())
    return drawn


if __name__ == "__main__":
    sys.exit(recipe_main(prepare, recipe_parser(str(__doc__))))
