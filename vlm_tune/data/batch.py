"""(4) Examples -> Batch: packed without padding, or padded to the longest; counts are checked for each sample."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm_tune.config.schema import LossWeight
from vlm_tune.data.example import NO_LOSS, Example
from vlm_tune.data.pictures.anyres import Spread


@dataclass
class Batch:
    """What one forward pass needs. N is the number of supervised tokens, T that of the tiles of all samples."""

    input_ids: Tensor  # (B, L)
    position_ids: Tensor  # (B, L), restarting at 0 with each sample
    segments: list[int] | None  # lengths of the samples in a pack (B = 1); None: each row is one sample, padded right
    predicting: Tensor  # (N,) flat positions whose next token is supervised
    targets: Tensor  # (N,) that next token
    weights: Tensor  # (N,) its share of the loss of the optimizer step
    sample_ids: list[str]
    num_tokens: int  # without padding
    tiles: Tensor | None = None  # (T, H, W, 3) uint8
    features: Tensor | None = None  # (T, P, C) in place of tiles, if a frozen vision tower's output is cached
    spreads: list[Spread] = field(default_factory=list)  # of each picture, if its tokens depend on that
    cursor: tuple[int, int, int] = (0, 0, 0)  # where the stream continues after this batch's optimizer step

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Pin the tensors, so that the copy to the device overlaps with the step."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(each) for name, each in vars(self).items() if isinstance(each, Tensor)}
        return replace(self, **changed)


def token_weight(num_supervised: npt.NDArray[np.int32], weight: LossWeight) -> npt.NDArray[np.float64]:
    """Return the weight of each supervised token of a sample that has x of them: 1, 1/x or 1/sqrt(x).

    Source: InternVL `internvl_chat_finetune.py` (loss_reduction token | sample | square).
    """
    powers = {LossWeight.token: 0.0, LossWeight.sample: -1.0, LossWeight.square: -0.5}
    return num_supervised.astype(np.float64) ** powers[weight]


def add_pictures(
    batch: Batch, examples: list[Example], tiles: list[npt.NDArray[np.uint8]], features: list[Tensor]
) -> None:
    """Put the tiles (or cached features) of all examples into a batch.

    Each example must have as many as it was encoded with, or its neighbour would get its pictures.
    """
    counts = [sum(example.num_tiles) for example in examples if example.num_tiles]
    made = [len(pixels) for pixels in tiles if len(pixels)] or [len(seen) for seen in features]
    assert counts == made, f"{batch.sample_ids}: {counts} tiles were counted, {made} made"
    batch.spreads = [spread for example in examples for spread in example.spreads]
    if features:
        batch.features = torch.cat(features)
    elif made:
        batch.tiles = torch.from_numpy(np.concatenate(tiles))


def collate(examples: list[Example], weights: list[float], packing: bool) -> Batch:
    """Join the texts of examples; `weights` are the weights of each one's supervised tokens."""
    lengths = [len(example.input_ids) for example in examples]
    width = sum(lengths) if packing else max(lengths)
    starts = np.cumsum([0, *lengths[:-1]]) if packing else np.arange(len(lengths)) * width
    ids = np.zeros(width if packing else width * len(lengths), dtype=np.int64)  # any pad id: no loss, no attention
    positions = np.zeros_like(ids)
    predicting, targets, token_weights = [], [], []
    for example, start, length, weight in zip(examples, starts, lengths, weights, strict=True):
        ids[start : start + length] = example.input_ids
        positions[start : start + length] = np.arange(length)
        supervised = np.flatnonzero(example.labels[1:] != NO_LOSS)
        predicting.append(start + supervised)
        targets.append(example.labels[1:][supervised])
        token_weights.append(np.full(len(supervised), weight, dtype=np.float32))
    shape = (1, -1) if packing else (len(examples), -1)
    return Batch(
        input_ids=torch.from_numpy(ids).view(shape),
        position_ids=torch.from_numpy(positions).view(shape),
        segments=lengths if packing else None,
        predicting=torch.from_numpy(np.concatenate(predicting)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        weights=torch.from_numpy(np.concatenate(token_weights)),
        sample_ids=[example.id for example in examples],
        num_tokens=sum(lengths),
    )
