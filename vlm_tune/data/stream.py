"""The order of training: an endless stream of micro-batches that can start at any optimizer step.

Everything here is a function of (seed, epoch, window), so a stream needs no state but its cursor: where the next
group of rows stands. A step may begin in one epoch and end in the next; no row is dropped and none comes twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from vlm_tune.config.schema import LossWeight
from vlm_tune.data.batch import token_weight
from vlm_tune.data.index import Index
from vlm_tune.data.packing import WINDOW, plan_batches, plan_packs

PLANNED_WINDOWS = 50  # windows that are planned to count the groups of an epoch; the rest is extrapolated

Cursor = tuple[int, int, int]  # epoch, window, group in the window


@dataclass(frozen=True)
class MicroBatch:
    """Name the rows of one forward pass of one device."""

    rows: tuple[int, ...]
    epoch: int
    step_weight: float  # sum of the weights of all supervised tokens of the optimizer step, over all devices
    after: Cursor  # the cursor behind the step that this belongs to


@dataclass(frozen=True)
class StreamSettings:
    """What decides the order of training."""

    packing: bool
    budget: tuple[int, int]  # tokens and tiles of a pack
    micro_batch: int  # packs (or samples) in one forward pass of one device
    groups_per_step: int  # forward passes in an optimizer step, over all devices
    loss: LossWeight
    seed: int


class BatchStream(Sampler[MicroBatch]):
    """Yield the micro-batches of one rank, from a cursor on, without end."""

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
            for rows, epoch, _ in step[self.rank :: self.world]:
                yield MicroBatch(tuple(rows), epoch, weight, after)

    def row_weights(self, rows: list[int]) -> npt.NDArray[np.float64]:
        """Sum of a row's token weights: x, 1 or sqrt(x) for x supervised tokens."""
        counts = self.index.supervised[rows]
        return counts * token_weight(counts, self.settings.loss)

    def groups_per_epoch(self) -> int:
        """Count the groups of the first epoch; of more than PLANNED_WINDOWS windows, estimate them from the first."""
        num_windows = self._num_windows()
        planned = min(num_windows, PLANNED_WINDOWS)
        count = sum(len(self._plan(0, window)) for window in range(planned))
        rows = min(len(self.index), planned * WINDOW)
        return count if planned == num_windows else round(count * len(self.index) / rows)

    def fill(self) -> float:
        """Share of the token budget that the first windows' packs fill."""
        groups = [group for window in range(min(3, self._num_windows())) for group in self._plan(0, window)]
        tokens = sum(int(self.index.tokens[group].sum()) for group in groups)
        return tokens / (len(groups) * self.settings.budget[0] * self.settings.micro_batch)

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
        return -(-len(self.index) // WINDOW)

    def _plan(self, epoch: int, window: int) -> list[list[int]]:
        order = self._order(epoch)[window * WINDOW : (window + 1) * WINDOW]
        index, settings = self.index, self.settings
        if settings.packing:
            packs = list(plan_packs(order, index.tokens, index.tiles, settings.budget))
            merged = range(0, len(packs), settings.micro_batch)
            return [[row for pack in packs[i : i + settings.micro_batch] for row in pack] for i in merged]
        seed = int(np.random.SeedSequence((settings.seed, epoch, window)).generate_state(1)[0])
        return list(plan_batches(order, index.tokens, settings.micro_batch, seed))

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if getattr(self, "_shuffled", (None, None))[0] != epoch:
            order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.index))
            self._shuffled = (epoch, order)
        return self._shuffled[1]
