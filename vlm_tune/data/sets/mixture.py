"""Several data sets as one: a file names them (see meta.py), their rows are numbered consecutively, set after set."""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_tune.config.schema import AugmentConfig, Config
from vlm_tune.data.encode import Encoder
from vlm_tune.data.progress import Follow, unseen
from vlm_tune.data.sets.dataset import Conversations, PictureSettings
from vlm_tune.data.sets.index import Findings, open_index
from vlm_tune.data.sets.meta import MetaEntry, is_meta, read_meta
from vlm_tune.data.sizes import Index
from vlm_tune.data.stream import Draw
from vlm_tune.errors import DataError


class Mixture:
    """Read the rows of several data sets, numbered consecutively."""

    def __init__(self, path: Path, entries: list[MetaEntry], sets: list[Conversations]) -> None:
        self.path = path
        self.entries = entries
        self.sets = sets
        self.starts = np.cumsum([0, *map(len, sets)])  # the first row of each set, and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[Conversations, int]:
        """Return the set of a row, and its number there."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.sets[number], row - int(self.starts[number])

    def draw(self, index: Index) -> Draw:
        """Return how often the entries of an index occur in an epoch.

        repeat_time is a number of passes over a set. weight is a set's share of an epoch, which is as long as all sets
        together; if that is less than the whole set, every epoch draws other rows of it.
        """
        bounds = np.searchsorted(index.rows, self.starts)
        sizes = np.diff(bounds)
        is_weighted = self.entries[0].weight is not None
        if is_weighted:
            weights = np.array([entry.weight for entry in self.entries], np.float64) * (sizes > 0)
            exact = weights / weights.sum() * sizes.sum()
        else:
            exact = sizes * np.array([entry.repeat_time for entry in self.entries])
        # 0.29 * 100 is 28.999... in binary; no set is ever left out altogether
        counts = np.maximum(np.floor(exact + (0.5 if is_weighted else 1e-6)), sizes > 0).astype(np.int64)
        return Draw(tuple(bounds.tolist()), tuple(counts.tolist()), rotates=is_weighted)


def open_data(path: Path, config: Config, encoder: Encoder) -> Conversations | Mixture:
    """Open a file of rows, or all sets of a meta file."""
    if is_meta(path):
        entries = read_meta(path)
        return Mixture(path, entries, [open_set(path, entry, config, encoder) for entry in entries])
    pictures = PictureSettings(config.model.tiles, config.model.vision.normalize, config.data.augment)
    return Conversations(path, config.data, encoder, pictures)


def open_set(path: Path, entry: MetaEntry, config: Config, encoder: Encoder) -> Conversations:
    """Open one set with its own image root, tile limit, dialect and degradation.

    Raise DataError if the set's pictures may not fit into a pack, and whatever opening a file raises.
    """
    tiles, stage = config.model.tiles, config.stage
    if entry.max_dynamic_patch is not None:
        tiles = replace(tiles, max=entry.max_dynamic_patch)
        encoder = with_settings(encoder, max_tiles=tiles.max)
        most = tiles.max + (tiles.thumbnail and tiles.max > 1)
        if stage.packing and most > stage.pack_tiles:
            reason = f'"max_dynamic_patch" makes up to {most} tiles of one picture, stage.pack_tiles is'
            raise DataError(f"{reason} {stage.pack_tiles}: raise it or lower the limit.", f"{path.name}: {entry.name}")
    if tiles.max < tiles.min:
        reason = f'"max_dynamic_patch" is {tiles.max}, below model.tiles.min={tiles.min}: raise it.'
        raise DataError(reason, f"{path.name}: {entry.name}")
    augment = replace(config.data.augment, jpeg=True) if entry.data_augment else config.data.augment
    image = replace(config.data.image, root=str(entry.root))
    data = replace(config.data, image=image, format=entry.format or config.data.format)
    return Conversations(
        entry.annotation, data, encoder, PictureSettings(tiles, config.model.vision.normalize, augment)
    )


def with_settings(encoder: Encoder, **changes: Any) -> Encoder:
    """Return the encoder with other limits; tokenizer and template stay shared."""
    changed = copy(encoder)
    changed.settings = replace(encoder.settings, **changes)
    return changed


def open_sizes(data: Conversations | Mixture, workers: int, follow: Follow = unseen) -> tuple[Index, Findings]:
    """Return the sizes and the faults of all rows, numbered consecutively."""
    indexes, findings, start = [], Findings(), 0
    for each in data.sets:
        table, found = open_index(each, workers, follow)
        indexes.append(Index.of(table, start))
        found.fault_rows = [row + start for row in found.fault_rows]
        findings.merge(found)
        start += len(each)
    return Index.join(indexes), findings


def is_augmented(data: Conversations | Mixture) -> bool:
    """Return whether the pictures of any set are augmented at random."""
    return any(each.pictures.augment != AugmentConfig() for each in data.sets)
