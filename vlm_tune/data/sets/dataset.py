"""One data file as examples: a row is parsed, measured, encoded and cut into tiles on demand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vlm_tune.config.schema import AugmentConfig, DataConfig, TileRule, TilesConfig
from vlm_tune.data.dialects.boxes import write_boxes
from vlm_tune.data.dialects.dialects import parse_record, recognise_rows
from vlm_tune.data.encode import Encoder
from vlm_tune.data.example import Example
from vlm_tune.data.pictures.anyres import Spread
from vlm_tune.data.pictures.augment import augment
from vlm_tune.data.pictures.feature_cache import FeatureCache
from vlm_tune.data.pictures.images import ImageReader
from vlm_tune.data.rows.rows import Rows, open_rows
from vlm_tune.data.sample import Picture, Sample
from vlm_tune.data.tiles import make_tiles, picture_spreads, picture_tiles, tile_limits

Measure = Callable[[Picture, str, str | None], tuple[int, int]]
"""Returns the (width, height) of a picture: ImageReader.read_size, or a method that checks more."""


@dataclass(frozen=True)
class PictureSettings:
    """How pictures become tiles."""

    tiles: TilesConfig
    normalization: str
    augment: AugmentConfig


class Conversations:
    """Read the rows of one data file as Samples and Examples.

    Workers share only the file: an object holds the offsets of the rows, not the rows.
    """

    def __init__(
        self, path: Path, config: DataConfig, encoder: Encoder, pictures: PictureSettings, rows: Rows | None = None
    ) -> None:
        self.path = path
        self.rows = rows or open_rows(path)
        self.encoder = encoder
        self.pictures = pictures
        self.root = Path(config.image.root) if config.image.root else path if path.is_dir() else path.parent
        self.reader = ImageReader(config.image, self.root)
        self.cache: FeatureCache | None = None  # set if the features of a frozen vision tower are cached
        self.ignored = frozenset(config.ignore_fields)
        self.format = config.format if config.format != "auto" else recognise_rows(self.rows, self.ignored)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sets(self) -> list["Conversations"]:
        """Return itself, as a mixture of one set would (see mixture.py)."""
        return [self]

    def locate(self, row: int) -> tuple["Conversations", int]:
        """Return the set of a row and its number there, as a mixture of one set would."""
        return self, row

    def sample(self, row: int) -> Sample:
        """Read one row."""
        return self.parse(self.rows[row], row)

    def parse(self, record: object, row: int) -> Sample:
        """Turn the record of a row into a Sample."""
        where = self.rows.where(row)
        sample = parse_record(record, self.format, where, row, self.root, self.ignored)
        return write_boxes(sample, lambda picture: self.reader.read_size(picture, where, sample.id))

    def encode(self, row: int) -> Example:
        """Encode one row; only the headers of its pictures are read."""
        sample = self.sample(row)
        return self.encoder.encode(sample, self.tiling(sample))

    def tiling(self, sample: Sample, measure: Measure | None = None) -> "Tiling":
        """Measure a sample's pictures once, by default from their headers, to count their tiles under any limit."""
        measure = measure or self.reader.read_size
        sizes = [measure(picture, sample.where, sample.id) for picture in sample.pictures]
        return Tiling(sizes, [picture.is_frame for picture in sample.pictures], self.pictures.tiles)

    def make_tiles(
        self, sample: Sample, example: Example, generator: np.random.Generator | None = None
    ) -> npt.NDArray[np.uint8]:
        """Cut all pictures of a sample into tiles (T, H, W, 3); with a generator, pictures are augmented."""
        size = self.pictures.tiles.size
        limited = self.limited_pictures(sample, example)
        images = self.reader.open_pictures([picture for picture, _ in limited], sample.where, sample.id)
        changes = self.pictures.augment
        if sample.is_located:
            changes = replace(changes, flip=False, crop=1.0)
        made = []
        for image, (_, limit) in zip(images, limited, strict=True):
            shown = image if generator is None else augment(image, changes, generator)
            made.append(self._cut(shown, limit))
        return np.concatenate([np.zeros((0, size, size, 3), dtype=np.uint8), *made])

    def cut(self, picture: Picture, limit: int, sample: Sample) -> npt.NDArray[np.uint8]:
        """Cut one picture into at most `limit` tiles and its thumbnail: (T, H, W, 3)."""
        return self._cut(self.reader.open_picture(picture, sample.where, sample.id), limit)

    def _cut(self, image: Image.Image, limit: int) -> npt.NDArray[np.uint8]:
        return make_tiles(image, self.pictures.tiles, limit, self.pictures.normalization)

    def read_features(self, sample: Sample, example: Example) -> Tensor:
        """Read the cached features of a sample's pictures: (T, P, C)."""
        assert self.cache is not None
        features = [
            self.cache.read(self.cache.key(self.reader.read_content(picture, sample.where, sample.id), limit))
            for picture, limit in self.limited_pictures(sample, example)
        ]
        return torch.cat(features)

    def limited_pictures(self, sample: Sample, example: Example) -> list[tuple[Picture, int]]:
        """Pair the pictures that an example kept with the most tiles that each may have."""
        limits = tile_limits([picture.is_frame for picture in sample.pictures], self.pictures.tiles, example.max_tiles)
        kept = len(example.num_tiles)  # trimming a long row may leave out its last turns, pictures and all
        return list(zip(sample.pictures, limits, strict=True))[:kept]


@dataclass(frozen=True)
class Tiling:
    """The tiles of each picture of a sample as a function of their limit."""

    sizes: list[tuple[int, int]]
    is_frame: list[bool]
    tiles: TilesConfig

    def __call__(self, max_tiles: int) -> tuple[int, ...] | tuple[Spread, ...]:
        """Count the tiles of each picture if the sample may have `max_tiles` in all; with anyres, return Spreads."""
        if self.tiles.rule is TileRule.anyres:
            return picture_spreads(self.sizes, self.is_frame, self.tiles, max_tiles)
        return picture_tiles(self.sizes, self.is_frame, self.tiles, max_tiles)
