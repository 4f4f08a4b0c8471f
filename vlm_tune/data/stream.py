"""The order of training: an endless stream of micro-batches that can start at any optimizer step.

Everything here is a function of (seed, epoch, window), so the only state of a stream is its cursor: the place of the
next group of rows. A step may begin in one epoch and end in the next; no row is dropped or repeated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from vlm_tune.config.schema import LossWeight
from vlm_tune.data.batch import token_weight
from vlm_tune.data.packing import (
    WINDOW,
    plan_batches,
    plan_packs,
    plan_trees,
    rows_behind,
    side_by_side,
)
from vlm_tune.data.sizes import Index

COUNTED_WINDOWS = 50  # in an epoch of more windows, the number of groups is not counted
SAMPLED_WINDOWS = 10  # but estimated from this many
LOOKED_AT = 20_000  # micro-batches of an epoch in which the largest is looked for

Cursor = tuple[int, int, int]  # epoch, window, group in the window


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass on one device."""

    rows: tuple[int, ...]
    epoch: int
    step_weight: float  # sum of the weights of all supervised tokens of the optimizer step, over all devices
    after: Cursor  # the cursor after the step that this belongs to
    place: int = 0  # in the step, counted over all devices


@dataclass(frozen=True)
class Draw:
    """How often the entries of an index occur in one epoch of a mixture.

    The entries of set s are bounds[s] to bounds[s + 1]; an epoch has counts[s] of them: with 10 entries and a count of
    35, all occur three times and 5 once more. Those are the first 5, as in InternVL, or with `rotates` others each
    epoch.
    """

    bounds: tuple[int, ...]
    counts: tuple[int, ...]
    rotates: bool = False

    def __len__(self) -> int:
        return sum(self.counts)

    def entries(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return the entries of an epoch, set after set: (R,)."""
        drawn = []
        for number, count in enumerate(self.counts):
            every = np.arange(self.bounds[number], self.bounds[number + 1])
            whole, rest = divmod(count, max(1, len(every)))
            once_more = every
            if self.rotates:
                once_more = np.random.default_rng((seed, epoch, number)).permutation(every)
            drawn += [np.tile(every, whole), once_more[:rest]]
        return np.concatenate(drawn)


@dataclass(frozen=True)
class StreamSettings:
    """What decides the order of training."""

    packing: bool
    budget: tuple[int, int]  # tokens and tiles of a pack
    micro_batch: int  # packs (or samples) in one forward pass of one device
    groups_per_step: int  # forward passes in an optimizer step, over all devices
    loss: LossWeight
    seed: int
    draw: Draw | None = None  # of a mixture; None = every entry once an epoch
    share_prefix: bool = False  # rows of one head stand side by side, and share its tokens


class BatchStream(Sampler[MicroBatch]):
    """Yield the micro-batches of one rank endlessly, starting at a cursor."""

    def __init__(
        self, index: Index, settings: StreamSettings, start: Cursor = (0, 0, 0), rank: tuple[int, int] = (0, 1)
    ) -> None:
        self.index = index
        self.settings = settings
        self.start = start
        self.rank, self.world = rank

    def __iter__(self) -> Iterator[MicroBatch]:
        groups = self._groups(self.start)
        while True:
            step = list(islice(groups, self.settings.groups_per_step))
            weight = sum(float(self.row_weights(rows).sum()) for rows, _, _ in step)
            after = step[-1][2]
            for place in self._share([rows for rows, _, _ in step]):
                rows, epoch, _ = step[place]
                yield MicroBatch(tuple(rows), epoch, weight, after, place)

    def _share(self, groups: list[list[int]]) -> list[int]:
        """Choose this rank's groups of a step.

        Sorted by tiles and tokens they are dealt there and back: 0 1 2 2 1 0. Ranks then run groups of like size side
        by side, and have like sums. Which groups make up the step does not depend on that.
        """
        order = list(range(len(groups)))
        if self.world > 1:
            sizes = [self.size(group) for group in groups]
            order.sort(key=lambda place: (-sizes[place][1], -sizes[place][0]))
        rounds = [order[start : start + self.world] for start in range(0, len(order), self.world)]
        return [dealt[self.world - 1 - self.rank if number % 2 else self.rank] for number, dealt in enumerate(rounds)]

    def row_weights(self, rows: list[int]) -> npt.NDArray[np.float64]:
        """Return the sum of each row's token weights: x, 1 or sqrt(x) for x supervised tokens."""
        counts = self.index.supervised[rows]
        return counts * token_weight(counts, self.settings.loss)

    def groups_per_epoch(self) -> int:
        """Count the groups of the first epoch, or estimate them from the first windows if there are many."""
        num_windows = self._num_windows()
        if num_windows <= COUNTED_WINDOWS:
            return sum(len(self._plan(0, window)) for window in range(num_windows))
        sampled = sum(len(self._plan(0, window)) for window in range(SAMPLED_WINDOWS))
        return round(sampled * self._epoch_length() / (SAMPLED_WINDOWS * WINDOW))

    def fill(self) -> float:
        """Return the share of the token budget that the packs of the first windows fill."""
        groups = [group for window in range(min(3, self._num_windows())) for group in self._plan(0, window)]
        tokens = sum(self.size(group)[0] for group in groups)
        return tokens / (len(groups) * self.settings.budget[0] * self.settings.micro_batch)

    def size(self, group: list[int]) -> tuple[int, int]:
        """Count the tokens and tiles of a group: what its rows share comes once."""
        index, behind = self.index, rows_behind(group, self.index, self.settings.share_prefix)
        tokens = index.tokens[group].sum() - index.head_tokens[behind].sum()
        return int(tokens), int(index.tiles[group].sum() - index.tiles[behind].sum())

    def _groups(self, start: Cursor) -> Iterator[tuple[list[int], int, Cursor]]:
        epoch, window, group = start
        while True:
            plan = self._plan(epoch, window)
            following = (epoch, window + 1, 0) if window + 1 < self._num_windows() else (epoch + 1, 0, 0)
            for position in range(group, len(plan)):
                after = (epoch, window, position + 1) if position + 1 < len(plan) else following
                yield plan[position], epoch, after
            epoch, window, group = following

    def _num_windows(self) -> int:
        return -(-self._epoch_length() // WINDOW)

    def _epoch_length(self) -> int:
        return len(self.index) if self.settings.draw is None else len(self.settings.draw)

    def _plan(self, epoch: int, window: int) -> list[list[int]]:
        order = self._order(epoch)[window * WINDOW : (window + 1) * WINDOW]
        index, settings = self.index, self.settings
        if settings.packing:
            if settings.share_prefix:
                packs = plan_trees(order, index, settings.budget)
            else:
                packs = list(plan_packs(order, index.tokens, index.tiles, settings.budget))
            merged = range(0, len(packs), settings.micro_batch)
            return [[row for pack in packs[i : i + settings.micro_batch] for row in pack] for i in merged]
        seed = int(np.random.SeedSequence((settings.seed, epoch, window)).generate_state(1)[0])
        return list(plan_batches(order, index.tokens, settings.micro_batch, seed))

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if getattr(self, "_shuffled", (None, None))[0] != epoch:
            seed, draw = self.settings.seed, self.settings.draw
            order = np.random.default_rng((seed, epoch)).permutation(self._epoch_length())
            order = order if draw is None else draw.entries(seed, epoch)[order]
            if self.settings.share_prefix:
                order = side_by_side(order, self.index.head)
            self._shuffled = (epoch, order)
        return self._shuffled[1]
