"""What the model sees of one row: its pictures as tiles, its tokens and labels, and the pack that it is in."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_tune.config.schema import BadSample, Config, TileRule, TilesConfig
from vlm_tune.data.datamodule import DataModule, Part, validation_packs
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import NO_LOSS, Example, common_prefix
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.packing import trees_of
from vlm_tune.data.pictures.anyres import NEWLINE, token_order
from vlm_tune.data.sample import Sample
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.data.sets.mixture import Mixture, open_data
from vlm_tune.data.sets.paths import find_file, sibling
from vlm_tune.data.tiles import choose_grid, make_tiles
from vlm_tune.errors import ConfigError
from vlm_tune.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE, SUPERVISED, CONTEXT = "image", "supervised", "context"  # what a token is; only supervised ones carry a loss
HIDDEN_PART = "\ufffd"  # how a tokenizer writes a token that holds only part of a character

Box = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True)
class Token:
    """One token of the sequence."""

    id: int
    text: str  # "" where the character continues in the next token
    kind: str
    tile: int = 0  # which tile of the row it belongs to, from 1; 0 = none


@dataclass(frozen=True)
class SeenPicture:
    """A picture of the row, and how it is cut."""

    name: str
    image: Image.Image  # as it is read: RGB, whole
    canvas: Box  # what the grid covers, in pixels of the picture; more than the picture where it is padded
    grid: tuple[int, int]  # columns, rows
    tiles: npt.NDArray[np.uint8]  # (T, H, W, 3)
    first: int  # number of its first tile in the row, from 1
    overview: int | None  # which of its tiles shows the whole picture, from 0; None where there is only the grid


@dataclass(frozen=True)
class PackedRow:
    """The sizes of one row of a pack."""

    where: str
    tokens: int  # of its own: without those that it shares
    supervised: int
    tiles: int
    is_this: bool  # the row that is looked at
    shared: int = 0  # tokens with which the rows above it begin too; they stand in the pack once


@dataclass(frozen=True)
class Pack:
    """The forward pass that the row takes part in."""

    rows: list[PackedRow]
    budget: tuple[int, int]  # tokens and tiles
    is_packed: bool  # else padded to the longest
    step: int  # optimizer step of the first epoch, from 1; 0 = validation

    @property
    def is_shared(self) -> bool:
        """Whether rows share tokens."""
        return any(row.shared for row in self.rows)


@dataclass(frozen=True)
class Seen:
    """Everything that is shown about one row."""

    row: int
    sample: Sample
    example: Example
    tokens: list[Token]
    rejected: list[Token]  # of a pair: the rejected answer, behind the tokens with which both begin
    markup: dict[str, int]  # tokens of the tokenizer that the texts contain (<box>), and how often
    pictures: list[SeenPicture]
    pack: Pack | None  # None where the run sees the row neither in training nor in validation
    settings: dict[str, str]


def look(config: Config, encoder: Encoder, tokenizer: "PreTrainedTokenizerBase", row: int | str) -> Seen:
    """Collect what the model sees of one row of data.path: by its number from 0 (across all sets), or by its location.

    Raise ConfigError for a row that is not there, DataError for one that is faulty.
    """
    path = find_file(config.data.path)
    rows = open_data(path, config, encoder)
    if isinstance(row, str):
        places = (number for number in range(len(rows)) if _place(rows, number) == row)
        found = next(places, None)
        if found is None:
            raise ConfigError(
                f"row={row}: no row has that place; the first is {_place(rows, 0)}. Or count from 0: row=0"
            )
        row = found
    if row >= len(rows):
        raise ConfigError(
            f"row={row}: {path.name} has {counted(len(rows), 'row')}, counted from 0: row=0 to row={len(rows) - 1}"
        )
    data, number = rows.locate(row)
    sample = data.sample(number)
    examples = data.encoder.encode_all(sample, data.tiling(sample, data.reader.check_picture))
    example = examples[0]
    return Seen(
        row=row,
        sample=sample,
        example=example,
        tokens=list(read_tokens(example, data.encoder, tokenizer)),
        rejected=read_rejected(examples, data.encoder, tokenizer),
        markup=count_markup(example, data.encoder),
        pictures=list(cut_pictures(data, sample, example)),
        pack=find_pack(config, encoder, row),
        settings={
            "model": config.model.name,
            "template": config.model.template,
            "tokens_per_tile": tokens_each(data.encoder.settings),
            "limit": data.encoder.settings.limit.name,
            "max_tokens": str(data.encoder.settings.limit.tokens),
        },
    )


def _place(rows: Conversations | Mixture, row: int) -> str:
    data, number = rows.locate(row)
    return data.rows.where(number)


def read_tokens(example: Example, encoder: Encoder, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Token]:
    """Yield each token with its text and its kind."""
    settings = encoder.settings
    names = (settings.image_start, settings.image_context, settings.image_end)
    start, context, end = (tokenizer.convert_tokens_to_ids(name) if name else None for name in names)
    ids = example.input_ids.tolist()
    tiles = iter(tile_numbers(example, settings.tokens_per_tile))
    for token_id, text, label in zip(ids, texts_of(ids, tokenizer), example.labels.tolist(), strict=True):
        if token_id == context:
            yield Token(token_id, text, IMAGE, next(tiles))
        elif label != NO_LOSS:
            yield Token(token_id, text, SUPERVISED)
        else:
            yield Token(token_id, text, IMAGE if token_id in (start, end) else CONTEXT)


def read_rejected(examples: list[Example], encoder: Encoder, tokenizer: "PreTrainedTokenizerBase") -> list[Token]:
    """List the tokens of a pair's rejected answer, behind those with which both begin; none of a conversation."""
    num_shared = common_prefix([example.input_ids for example in examples])
    return [token for worse in examples[1:] for token in list(read_tokens(worse, encoder, tokenizer))[num_shared:]]


def count_markup(example: Example, encoder: Encoder) -> dict[str, int]:
    """Count the markup tokens that occur in the texts."""
    counts = {name: int(np.count_nonzero(example.input_ids == token)) for name, token in encoder.markup.items()}
    return {name: count for name, count in counts.items() if count}


def tokens_each(settings: EncoderSettings) -> str:
    """Describe how many tokens a tile has; an any-resolution picture drops some and adds newlines."""
    return f"about {settings.tokens_per_tile}" if settings.newline else str(settings.tokens_per_tile)


def tile_numbers(example: Example, per_tile: int) -> Iterator[int]:
    """Yield the tile of each image token, counted from 1; a newline belongs to the tile before it."""
    if not example.spreads:
        yield from (number // per_tile + 1 for number in range(per_tile * sum(example.num_tiles)))
    before = 0
    for spread in example.spreads:
        number = before + 1
        for place in token_order(spread, per_tile).tolist():
            number = number if place == NEWLINE else before + place // per_tile + 1
            yield number
        before += spread.num_tiles


def texts_of(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Yield the text of each token; a character that takes several tokens is given to the last of them."""
    waiting: list[int] = []
    for token_id in ids:
        waiting.append(token_id)
        text = str(tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text.endswith(HIDDEN_PART) and len(waiting) < 4:  # no character of UTF-8 has more bytes
            yield ""
            continue
        raw = str(tokenizer.convert_ids_to_tokens(waiting[0]))
        yield f" {text}" if raw.startswith("▁") and not text.startswith(" ") else text  # decode drops the first one
        waiting = []


def runs_of(tokens: list[Token]) -> Iterator[tuple[str, int, list[Token]]]:
    """Split the sequence where the kind of token or the tile changes: (kind, tile, tokens)."""
    for (kind, tile), run in groupby(tokens, key=lambda token: (token.kind, token.tile)):
        yield kind, tile, list(run)


def cut_pictures(data: Conversations, sample: Sample, example: Example) -> Iterator[SeenPicture]:
    """Cut the pictures of a row as training does, without augmentation."""
    tiles, first = data.pictures.tiles, 1
    for number, (picture, limit) in enumerate(data.limited_pictures(sample, example), 1):
        image = data.reader.open_picture(picture, sample.where, sample.id)
        made = make_tiles(image, tiles, limit, data.pictures.normalization)
        grid = choose_grid(*image.size, tiles, limit)
        overview = None
        if len(made) > grid[0] * grid[1]:
            overview = 0 if tiles.rule is TileRule.anyres else len(made) - 1
        name = picture.path or f"picture {number}, inside the row"
        name += "" if picture.frame is None else f", frame {picture.frame}"
        yield SeenPicture(name, image, canvas_of(image.size, grid, tiles), grid, made, first, overview)
        first += len(made)


def canvas_of(size: tuple[int, int], grid: tuple[int, int], tiles: TilesConfig) -> Box:
    """Return what the grid of tiles covers, in pixels of the picture: the picture is stretched to it, or padded."""
    width, height = size
    if tiles.rule not in (TileRule.pad, TileRule.anyres) or (tiles.rule is TileRule.anyres and grid == (1, 1)):
        return 0.0, 0.0, float(width), float(height)
    pixels_a_pixel = min(grid[0] * tiles.size / width, grid[1] * tiles.size / height)
    wide, high = grid[0] * tiles.size / pixels_a_pixel, grid[1] * tiles.size / pixels_a_pixel
    return (width - wide) / 2, (height - high) / 2, wide, high


def find_pack(config: Config, encoder: Encoder, row: int) -> Pack | None:
    """Find which rows share a forward pass with a row, in the first epoch, or in validation.

    This measures all rows, or reads their sizes from the index if that exists.
    """
    has_own_val = config.data.val != "auto" or sibling(config.data.path, "val") is not None
    # Other rows may be faulty, and another file for validation need not be measured.
    data = replace(config.data, on_bad_sample=BadSample.skip, val="none" if has_own_val else "auto")
    module = DataModule(replace(config, data=data), encoder)
    module.setup()
    assert module.train is not None
    entry = entry_of(module.train, row)
    if entry is not None:
        stream = module.stream()
        drawn = stream.settings.draw
        if drawn is not None and entry not in drawn.entries(config.seed, 0):
            return None
        for number, batch in enumerate(stream):
            if entry in batch.rows:
                trees = trees_of(batch.rows, module.train.index, stream.settings.share_prefix)
                return pack_of(config, module.train, trees, (row, number // stream.settings.groups_per_step + 1))
    entry = entry_of(module.val, row) if module.val is not None else None
    if entry is None or module.val is None:
        return None
    settings = module.settings(1)
    batch = next(batch for batch in validation_packs(module.val.index, settings) if entry in batch.rows)
    return pack_of(config, module.val, trees_of(batch.rows, module.val.index, settings.share_prefix), (row, 0))


def entry_of(part: Part, row: int) -> int | None:
    """Return the position of a row in an index; None where it is not there."""
    places = np.flatnonzero(part.index.rows == row)
    return int(places[0]) if len(places) else None


def pack_of(config: Config, part: Part, trees: list[list[int]], this: tuple[int, int]) -> Pack:
    """Describe a pack of rows, by the trees that share what they begin with.

    `this` is the row that is looked at, and its optimizer step.
    """
    rows = []
    for tree in trees:
        found = [part.data.locate(int(part.index.rows[entry])) for entry in tree]
        ids = [data.encode(number).input_ids for data, number in found] if len(tree) > 1 else []
        shared = common_prefix(ids) if ids else 0
        for place, (entry, (data, number)) in enumerate(zip(tree, found, strict=True)):
            before = shared if place else 0
            tokens, tiles = int(part.index.tokens[entry]) - before, int(part.index.tiles[entry])
            supervised, is_this = int(part.index.supervised[entry]), int(part.index.rows[entry]) == this[0]
            where = data.rows.where(number)
            rows.append(PackedRow(where, tokens, supervised, 0 if before else tiles, is_this, before))
    stage = config.stage
    budget = (stage.pack_length * config.trainer.micro_batch, stage.pack_tiles * config.trainer.micro_batch)
    return Pack(rows, budget, stage.packing, this[1])
