"""(4) Examples -> Batch: packed without padding, or padded to the longest; counts are checked for each sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm_tune.config.schema import LossWeight
from vlm_tune.data.example import NO_LOSS, Example, common_prefix
from vlm_tune.data.pictures.anyres import Spread


@dataclass(frozen=True)
class Cut:
    """What else a rank knows of the pack that it holds a share of.

    parts      how many ranks share it
    num_tiles  of the whole pack; shares are of one size, so the last ones may end in blank tiles
    seen       (first, last): which of the pack's image tokens stand in this rank's stretch
    """

    parts: int
    num_tiles: int
    seen: tuple[int, int]


@dataclass
class Batch:
    """What one forward pass needs. N is the number of supervised tokens, T that of the tiles of all samples."""

    input_ids: Tensor  # (B, L)
    position_ids: Tensor  # (B, L), restarting at 0 with each sample, or at its prefix's length behind a shared one
    segments: list[int] | None  # lengths of the stretches of a pack (B = 1); None: each row is one sample, padded right
    parents: list[int] | None  # of each stretch the one that holds its prefix, or -1; None: each is a whole sample
    predicting: Tensor  # (N,) flat positions whose next token is supervised
    targets: Tensor  # (N,) that next token
    weights: Tensor  # (N,) its share of the loss of the optimizer step; of pairs (pairs,) that of each
    sample_ids: list[str]
    num_tokens: int  # without padding
    image_places: Tensor | None = None  # flat positions of the context tokens, in the order of the pictures' features
    tiles: Tensor | None = None  # (T, H, W, 3) uint8
    features: Tensor | None = None  # (T, P, C) in place of tiles, if a frozen vision tower's output is cached
    spreads: list[Spread] = field(default_factory=list)  # of each picture, if its tokens depend on that
    answers: list[int] | None = None  # of pairs, the supervised tokens of each answer, the chosen before the rejected
    reference: Tensor | None = None  # (pairs, 2) log-probabilities under the reference, once they are known
    cut: Cut | None = None  # of a share of a pack: `segments`, `parents` and `spreads` are then those of the whole pack
    place: int = 0  # in the optimizer step, counted over all devices
    cursor: tuple[int, int, int] = (0, 0, 0)  # where the stream continues after this batch's optimizer step

    @property
    def num_tiles(self) -> int:
        """Return the number of tiles, whether they come as pixels or as features."""
        pictures = self.tiles if self.tiles is not None else self.features
        return 0 if pictures is None else len(pictures)

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
    batch: Batch,
    examples: list[Example],
    tiles: list[npt.NDArray[np.uint8]],
    features: list[Tensor],
    context_id: int | None,
) -> None:
    """Put the tiles (or cached features) of all examples into a batch, and the places where their tokens go.

    Each example must have as many as it was encoded with, or its neighbour would get its pictures. The places are
    looked up here, before the batch is on a device: looking there, the CPU would wait for it.
    """
    counts = [sum(example.num_tiles) for example in examples if example.num_tiles]
    made = [len(pixels) for pixels in tiles if len(pixels)] or [len(seen) for seen in features]
    assert counts == made, f"{batch.sample_ids}: {counts} tiles were counted, {made} made"
    batch.spreads = [spread for example in examples for spread in example.spreads]
    if features:
        batch.features = torch.cat(features)
    elif made:
        batch.tiles = torch.from_numpy(np.concatenate(tiles))
    if made:
        batch.image_places = torch.from_numpy(np.flatnonzero(batch.input_ids.numpy() == context_id))


def collate(examples: list[Example], weights: list[float], packing: bool, trees: Sequence[int] | None = None) -> Batch:
    """Join the texts of examples; `weights` are the weights of each one's supervised tokens.

    `trees` (of a pack): how many examples in a row begin alike, for each tree. The tokens that they share come once.
    A token that is supervised there has the weights of all that supervise it.
    """
    layout = lay_out(examples, packing, trees)
    ids = np.zeros(layout.size, dtype=np.int64)  # any pad id: no loss, no attention
    positions = np.zeros_like(ids)
    predicting, targets, token_weights = [], [], []
    for example, places, weight in zip(examples, layout.places, weights, strict=True):
        ids[places] = example.input_ids
        positions[places] = np.arange(len(places))
        supervised = np.flatnonzero(example.labels[1:] != NO_LOSS)
        predicting.append(places[supervised])
        targets.append(example.labels[1:][supervised])
        token_weights.append(np.full(len(supervised), weight, dtype=np.float32))
    shape = (1, -1) if packing else (len(examples), -1)
    return Batch(
        input_ids=torch.from_numpy(ids).view(shape),
        position_ids=torch.from_numpy(positions).view(shape),
        segments=layout.segments,
        parents=layout.parents,
        predicting=torch.from_numpy(np.concatenate(predicting)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        weights=torch.from_numpy(np.concatenate(token_weights)),
        sample_ids=[example.id for example in examples],
        num_tokens=sum(layout.segments) if layout.segments else sum(len(example.input_ids) for example in examples),
    )


def as_pairs(batch: Batch, answers: list[int], weight: float, reference: npt.NDArray[np.float32] | None) -> Batch:
    """Mark a batch whose trees are pairs, the chosen answer before the rejected one.

    `answers` are their supervised tokens, `weight` is that of each pair in the loss of the optimizer step.
    """
    ids = batch.sample_ids[::2]
    known = None if reference is None else torch.from_numpy(reference)
    return replace(batch, weights=torch.full((len(ids),), weight), sample_ids=ids, answers=answers, reference=known)


def cut(batch: Batch, number: int, parts: int) -> Batch:
    """Return the share of one of `parts` ranks in a pack: a stretch of its tokens, and as many of its tiles.

    Positions stay those of the pack. Where its tokens do not divide, some follow that nothing sees and nothing learns
    from, as a sample of their own; blank tiles follow in the same way.
    """
    assert batch.segments is not None, "padded rows are not cut"
    length, places = batch.input_ids.shape[1], batch.image_places
    size = -(-length // parts)
    start, missing = number * size, size * parts - length
    if places is None:
        places = batch.predicting.new_zeros(0)
    seen = tuple(int((places < bound).sum()) for bound in (start, start + size))
    learns = (batch.predicting >= start) & (batch.predicting < start + size)
    num_share = -(-batch.num_tiles // parts)
    return replace(
        batch,
        input_ids=_part(batch.input_ids[0], number, size).unsqueeze(0),
        position_ids=_part(batch.position_ids[0], number, size).unsqueeze(0),
        segments=[*batch.segments, missing] if missing else batch.segments,
        parents=[*batch.parents, -1] if missing and batch.parents else batch.parents,
        predicting=batch.predicting[learns] - start,
        targets=batch.targets[learns],
        weights=batch.weights[learns],
        num_tokens=max(0, min(size, length - start)),
        image_places=places[slice(*seen)] - start,
        tiles=None if batch.tiles is None else _part(batch.tiles, number, num_share),
        features=None if batch.features is None else _part(batch.features, number, num_share),
        cut=Cut(parts, batch.num_tiles, (seen[0], seen[1])),
    )


def _part(whole: Tensor, number: int, size: int) -> Tensor:
    """Take the part of `size` rows, zeros where there are none: (W, ...) -> (size, ...)."""
    own = whole[number * size : (number + 1) * size]
    missing = size - len(own)
    return torch.cat([own, own.new_zeros(missing, *own.shape[1:])]) if missing else own  # a view stays pinned


@dataclass
class Layout:
    """Where the tokens of each example stand in a batch."""

    size: int
    places: list[npt.NDArray[np.int64]]  # (L,) of each example, flat
    segments: list[int] | None = None  # as in Batch
    parents: list[int] | None = None


def lay_out(examples: list[Example], packing: bool, trees: Sequence[int] | None) -> Layout:
    """Place examples in padded rows, or in one packed row, where those of a tree stand behind their common tokens."""
    if not packing:
        width = max(len(example.input_ids) for example in examples)
        starts = range(0, width * len(examples), width)
        padded = [start + np.arange(len(each.input_ids)) for start, each in zip(starts, examples, strict=True)]
        return Layout(width * len(examples), padded)
    places: list[npt.NDArray[np.int64]] = []
    segments: list[int] = []
    parents: list[int] = []
    remaining = iter(examples)
    for count in trees or [1] * len(examples):
        tree = [example.input_ids for example in islice(remaining, count)]
        num_shared = common_prefix(tree) if count > 1 else 0
        start, parent = sum(segments), len(segments) if num_shared else -1
        segments += [num_shared] if num_shared else []
        parents += [-1] if num_shared else []
        for ids in tree:
            own = np.arange(len(ids) - num_shared) + sum(segments)
            places.append(np.concatenate([np.arange(num_shared) + start, own]))
            segments.append(len(own))
            parents.append(parent)
    return Layout(sum(segments), places, segments, parents if max(parents) >= 0 else None)
