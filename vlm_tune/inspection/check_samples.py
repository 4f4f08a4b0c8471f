"""A few good rows of a data set as the model sees them, for the page of `check`: small pictures, and text by kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlm_tune.data.example import Example
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.errors import DataError
from vlm_tune.inspection.inspect_row import CONTEXT, Token, read_rejected, read_tokens
from vlm_tune.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_ROWS = 6
NUM_PICTURES = 4  # of one row
MAX_SIDE = 240  # pixels of a picture as it is stored
MAX_TEXT = 800  # characters of one stretch of text
TRIES = 50  # how many faulty rows may be replaced by the next one


@dataclass(frozen=True)
class Look:
    """One row as the model sees it."""

    where: str
    row: int  # from 0, as `inspect row=` takes it
    id: str
    tokens: int
    supervised: int
    num_pictures: int
    pictures: list[tuple[str, Image.Image]]  # the first ones: name, small picture
    runs: list[tuple[str, str]]  # kind, text; neighbouring tiles are one run


def look_at_some(sets: Sequence[Conversations], tokenizer: "PreTrainedTokenizerBase") -> list[Look]:
    """Look at evenly spaced rows from the first to the last; a faulty one is replaced by a good one nearby."""
    ends = np.cumsum([len(data) for data in sets])
    total = int(ends[-1]) if len(ends) else 0
    looks: dict[int, Look] = {}
    for place in np.linspace(0, max(total - 1, 0), NUM_ROWS).astype(int).tolist():
        near = [*range(place, min(place + TRIES, total)), *range(place - 1, max(place - TRIES, -1), -1)]
        for row in [row for row in near if row not in looks]:
            number = int(np.searchsorted(ends, row, side="right"))
            data, first = sets[number], int(ends[number]) - len(sets[number])
            try:
                looks[row] = look(data, row - first, row, tokenizer)
                break
            except DataError:
                continue
    return [looks[row] for row in sorted(looks)]


def look(data: Conversations, number: int, row: int, tokenizer: "PreTrainedTokenizerBase") -> Look:
    """Encode one row of a set as training does; `row` is its number through all sets. Raise DataError."""
    sample = data.sample(number)
    examples = data.encoder.encode_all(sample, data.tiling(sample, data.reader.check_picture))
    example = examples[0]
    shown = list(small_pictures(data, sample, example))
    runs = list(joined(list(read_tokens(example, data.encoder, tokenizer))))
    if rejected := read_rejected(examples, data.encoder, tokenizer):
        runs += [(CONTEXT, "\nor, rejected: "), *joined(rejected)]
    sizes = len(example.input_ids), example.num_supervised
    return Look(sample.where, row, sample.id, *sizes, len(example.num_tiles), shown, runs)


def small_pictures(data: Conversations, sample: Sample, example: Example) -> Iterator[tuple[str, Image.Image]]:
    """Open the first pictures of a row as training does."""
    for picture, num_tiles in zip(sample.pictures[:NUM_PICTURES], example.num_tiles, strict=False):
        image = data.reader.open_picture(picture, sample.where, sample.id)
        width, height = image.size
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        yield f"{width} x {height}, {counted(num_tiles, 'tile')}", image


def joined(tokens: list[Token]) -> Iterator[tuple[str, str]]:
    """Join neighbouring tokens of one kind; tiles are counted."""
    for (kind, is_tile), group in groupby(tokens, key=lambda token: (token.kind, token.tile > 0)):
        run = list(group)
        if is_tile:
            yield kind, f"{counted(len({token.tile for token in run}), 'tile')}: {len(run):,} tokens"
            continue
        text = "".join(token.text for token in run)
        more = f"… {len(text) - MAX_TEXT:,} characters more" if len(text) > MAX_TEXT else ""
        yield kind, text[:MAX_TEXT] + more
