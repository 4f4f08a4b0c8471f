"""The batches that a plan is made for: the largest and a usual one of the real rows, or one that the settings allow."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm_tune.config.schema import Config, FeatureCaching
from vlm_tune.data.batch import Batch, as_pairs, collate
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.example import Example
from vlm_tune.data.packing import trees_of
from vlm_tune.data.sets.mixture import is_augmented
from vlm_tune.data.stream import LOOKED_AT, MicroBatch
from vlm_tune.model.fill_cache import GIB, obstacle
from vlm_tune.planning.skeleton import fake_like

SUPERVISED = 0.25  # of the text, where there are no rows to ask
SAMPLE = 1024  # tokens of a sample, where there are no rows to ask


@dataclass(frozen=True)
class Picture:
    """What a tile is to the model: its pixels, and its features where these are kept on disk."""

    size: int
    tokens: int
    features: tuple[int, int] | None = None  # (P, C)


@dataclass(frozen=True)
class Work:
    """A run's batches: the largest by tokens and by tiles, and a usual one; its steps, where rows are there."""

    largest: list[Batch]
    usual: Batch
    num_steps: int | None
    tokens_per_step: float
    said: str


def real_work(config: Config, data: DataModule, picture: Picture) -> Work:
    """Choose among the micro-batches of the first epoch; their text is read, of their pictures only the sizes."""
    assert data.train is not None
    index, stream = data.train.index, data.stream()
    num_groups = stream.groups_per_epoch()
    groups = list(islice(stream, min(num_groups, LOOKED_AT)))
    packing, batch = config.stage.packing, config.trainer.micro_batch
    tokens, tiles = np.zeros(len(groups)), np.zeros(len(groups))
    for place, group in enumerate(groups):
        tokens[place], tiles[place] = stream.size(list(group.rows))
        if not packing:
            tokens[place] = index.tokens[list(group.rows)].max() * len(group.rows)
    supervised = np.array([index.supervised[list(group.rows)].sum() for group in groups])
    far = abs(tokens / max(1, tokens.mean()) - 1) + abs(tiles / max(1, tiles.mean()) - 1)
    chosen = {int(np.argmax(tokens + supervised)), int(np.argmax(tiles * tokens.max() + tokens))}
    largest = [real_batch(data, groups[place], packing, picture) for place in sorted(chosen)]
    usual = real_batch(data, groups[int(np.argmin(far))], packing, picture)
    said = f"{len(index):,} rows in {num_groups:,} {'packs' if packing and batch == 1 else 'batches'}"
    per_step = config.trainer.global_batch // batch
    return Work(largest, usual, data.max_steps(), float(tokens.mean()) * per_step, said)


def real_batch(data: DataModule, group: MicroBatch, packing: bool, picture: Picture) -> Batch:
    """Encode the text of a micro-batch's rows."""
    assert data.train is not None
    trees: list[list[Example]] = []
    for tree in trees_of(group.rows, data.train.index, data.settings(1).share_prefix):
        trees.append([])
        for entry in tree:
            rows, number = data.train.data.locate(int(data.train.index.rows[entry]))
            sample = rows.sample(number)
            trees[-1] += rows.encoder.encode_all(sample, rows.tiling(sample))
    examples = [example for tree in trees for example in tree]
    batch = collate(examples, [1.0] * len(examples), packing, [len(tree) for tree in trees])
    if len(examples) > len(group.rows):
        batch = as_pairs(batch, [example.num_supervised for example in examples], 1.0, None)
    batch.spreads = [spread for tree in trees for spread in tree[0].spreads]
    return show(batch, sum(sum(tree[0].num_tiles) for tree in trees), picture)


def supposed_work(config: Config, picture: Picture, context_id: int) -> Work:
    """Fill a batch as far as the settings allow: where there are no rows, or no tokenizer to measure them by."""
    stage, trainer = config.stage, config.trainer
    if stage.packing:
        count, width, most = 1, stage.pack_length * trainer.micro_batch, stage.pack_tiles * trainer.micro_batch
    else:
        count, width = trainer.micro_batch, config.data.max_length
        most = (config.model.tiles.max + 1) * count
    tiles = min(most // count, int(width * 0.8) // picture.tokens) * count
    ids = torch.zeros(count, width, dtype=torch.int64)
    ids[:, : tiles // count * picture.tokens] = context_id
    lengths = [min(SAMPLE, width - start) for start in range(0, width, SAMPLE)]
    positions = torch.cat([torch.arange(each) for each in lengths]) if stage.packing else torch.arange(width)
    text = count * width - tiles * picture.tokens
    num_supervised = max(1, int(text * SUPERVISED))
    predicting = torch.arange(num_supervised) * (count * width // num_supervised)  # some in each part of a pack
    batch = Batch(
        input_ids=ids,
        position_ids=positions.expand(count, -1).contiguous(),
        segments=lengths if stage.packing else None,
        parents=None,
        predicting=predicting,
        targets=torch.zeros_like(predicting),
        weights=torch.ones(len(predicting)),
        sample_ids=[],
        num_tokens=count * width,
    )
    batch = show(batch, tiles, picture)
    said = f"supposed: {count * width:,} tokens, {tiles} tiles a forward pass, a quarter of the text supervised"
    tokens = count * width * trainer.global_batch / trainer.micro_batch
    return Work([batch], batch, stage.max_steps if stage.max_steps > 0 else None, tokens, said)


def show(batch: Batch, num_tiles: int, picture: Picture) -> Batch:
    """Put tiles of no numbers into a batch, or their features."""
    if num_tiles == 0:
        return batch
    with torch.device("meta"):
        if picture.features is not None:
            shown = torch.empty(num_tiles, *picture.features)
        else:
            shown = torch.empty(num_tiles, picture.size, picture.size, 3, dtype=torch.uint8)
    name = "tiles" if picture.features is None else "features"
    setattr(batch, name, shown)
    return batch


def fake_pictures(batch: Batch, fakes: FakeTensorMode, dtype: torch.dtype) -> None:
    """Turn the pictures of a batch into fake tensors of the run that they are for."""
    if batch.tiles is not None:
        batch.tiles = fake_like(batch.tiles, fakes)
    if batch.features is not None:
        batch.features = fake_like(batch.features.to(dtype), fakes)


def keeps_features(config: Config, data: DataModule | None, tile_bytes: int) -> bool:
    """Tell whether a run keeps the features of its pictures on disk, as `plan_cache` decides on an unknown card."""
    wanted = config.data.feature_cache
    if wanted is FeatureCaching.off or obstacle(config) is not None or data is None:
        return False
    parts = [part for part in (data.train, data.val) if part is not None]
    if any(is_augmented(part.data) for part in parts):
        return False
    need = sum(int(part.index.tiles.sum()) for part in parts) * tile_bytes / GIB
    return need <= config.data.feature_cache_gib
