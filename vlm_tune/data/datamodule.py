"""Lightning's view of the data: a training stream that continues from a checkpoint, and a fixed validation pass."""

import gc
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from vlm_tune.config.schema import BadSample, Config, LossWeight, SharePrefix
from vlm_tune.data.batch import Batch
from vlm_tune.data.encode import Encoder
from vlm_tune.data.packing import cost, fits_tree, shares_head, side_by_side
from vlm_tune.data.progress import STILL, Follow, Patience, unseen
from vlm_tune.data.sets.dataset import Conversations
from vlm_tune.data.sets.index import Findings, refuse_faults, write_faults
from vlm_tune.data.sets.micro_batches import Handed, MicroBatches
from vlm_tune.data.sets.mixture import Mixture, is_augmented, open_data, open_sizes
from vlm_tune.data.sets.paths import find_file, num_put_aside, sibling
from vlm_tune.data.sizes import Index
from vlm_tune.data.stream import BatchStream, Cursor, MicroBatch, StreamSettings
from vlm_tune.errors import CheckpointError, ConfigError, DataError, TrainingError, VlmTuneError

VALIDATION_KEYS = (
    "data.val",
    "data.val_share",
    "trainer.max_val_rows",
    "data.path",
)  # they may change them
PART_KEYS = (("data.path",), VALIDATION_KEYS)


@dataclass
class Part:
    """An opened data file, or several as a mixture, with their sizes."""

    data: Conversations | Mixture
    index: Index
    findings: Findings
    reference: npt.NDArray[np.float32] | None = None  # of pairs (rows, 2), once the reference has read them

    def batches(self, settings: StreamSettings, is_training: bool) -> MicroBatches:
        """Make batches of these rows."""
        return MicroBatches(self.data, self.index, settings, is_training, self.reference)

    def contents(self) -> dict[str, str]:
        """Return a hash of the rows of each file (in a mixture: of each set, including its degradation)."""
        data, index = self.data, self.index
        if not isinstance(data, Mixture):
            return {str(data.path): index.content_fingerprint()}
        bounds = np.searchsorted(index.rows, data.starts).tolist()
        found = {}
        for entry, start, end in zip(data.entries, bounds[:-1], bounds[1:], strict=True):
            content = f"{index.content_fingerprint(start, end)} {entry.data_augment}"
            found[f"{data.path}: {entry.name} ({entry.annotation})"] = content
        return found


class TimedLoader(DataLoader[Batch | VlmTuneError]):
    """Count the seconds that the training loop waits for batches, including the start of worker processes.

    Raise the fault of a row that kept a batch from being loaded, and TrainingError if the worker processes are frozen.
    """

    seconds_waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield the batches."""
        batches = super().__iter__()
        patience = Patience(getattr(batches, "_workers", []))
        if patience.processes:
            patience.start()
        try:
            while (batch := self._await(batches, patience)) is not None:
                yield batch
        finally:
            patience.is_over.set()

    def _await(self, batches: Any, patience: Patience) -> Batch | None:
        start, patience.is_waiting = time.perf_counter(), True
        try:
            batch: Batch | VlmTuneError | None = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not patience.lost:
                if isinstance(error, RuntimeError) or str(error).startswith("Caught "):
                    raise
                # a batch lies in the memory of its worker, which cannot be reached any more
                raise RuntimeError("DataLoader worker ended before a batch was fetched from it") from error
            raise TrainingError(
                f"process {patience.lost} should read data, and has neither computed nor read for {STILL:.0f} s: it is "
                "ended. Go on with resume=last; data.workers=0 reads in the main process"
            ) from error
        patience.is_waiting = False
        self.seconds_waited += time.perf_counter() - start
        if isinstance(batch, VlmTuneError):
            raise batch
        return batch


def start_reader(number: int) -> None:
    """Leave a stop to the main process, and what a worker inherited out of its garbage collections.

    A terminal and SLURM send a stop to the workers too, and the step needs them. A collection writes into every object
    that it looks at: after hours, the first full one would copy the whole heap of the main process into each worker.
    """
    for each in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    gc.freeze()


class DataModule(L.LightningDataModule):
    """Open, measure and serve the training and validation rows of a run; `follow` shows how far measuring is."""

    def __init__(self, config: Config, encoder: Encoder, follow: Follow = unseen) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.follow = follow
        self.cursor: Cursor = (0, 0, 0)
        self.train: Part | None = None
        self.val: Part | None = None

    def setup(self, stage: str = "fit") -> None:
        """Open the files, find every faulty row, and split off a validation part if there is no file for it."""
        if self.train is not None:
            return
        config = self.config.data
        self.train = self._open(find_file(config.path))
        if len(self.train.index) == 0:
            raise DataError("no usable rows are left. Run `python -m vlm_tune check` on it", str(self.train.data.path))
        if self.config.stage.share_prefix is SharePrefix.on and is_augmented(self.train.data):
            raise ConfigError(
                f"stage.share_prefix=on, but {config.path} augments pictures, each row its own: set it to auto"
            )
        if config.val == "none":
            return
        val = sibling(config.path, "val") if config.val == "auto" else find_file(config.val, "data.val")
        if val is not None:
            self.val = self._open(val)
            if len(self.val.index) == 0:
                raise DataError(
                    "no usable rows are left. Run `python -m vlm_tune check` on it, or set data.val=none",
                    str(self.val.data.path),
                )
            limit = min(len(self.val.index), self.config.trainer.max_val_rows)
            self.val.index = self.val.index.take(np.arange(limit))
        else:
            self._split()

    def _open(self, path: Path) -> Part:
        data = open_data(path, self.config, self.encoder)
        index, findings = open_sizes(data, self.config.data.workers, self.follow)
        if self.config.data.on_bad_sample is BadSample.error:
            refuse_faults(findings, path)
        return Part(data, index, findings)

    @property
    def parts(self) -> list[Part]:
        """The training rows, and those for validation where there are any."""
        return [part for part in (self.train, self.val) if part is not None]

    def write_quarantine(self, path: Path) -> None:
        """Write the rows that were left out, each with its reason."""
        parts = {id(part.findings): part for part in self.parts}
        faults = [fault for part in parts.values() for fault in (*part.findings.faults, *part.findings.skipped)]
        if faults:
            write_faults(faults, path)

    def _split(self) -> None:
        assert self.train is not None
        total = len(self.train.index)
        num_val = num_put_aside(total, self.config)
        if num_val == 0:
            return
        order = np.random.default_rng(0).permutation(total)  # the split belongs to the data, not to the run's seed
        self.val = Part(self.train.data, self.train.index.take(np.sort(order[:num_val])), self.train.findings)
        self.train = Part(self.train.data, self.train.index.take(np.sort(order[num_val:])), self.train.findings)

    def settings(self, groups_per_step: int) -> StreamSettings:
        """Return what decides the order of training."""
        stage, trainer, train = self.config.stage, self.config.trainer, self.train
        share_prefix = stage.share_prefix is not SharePrefix.off and self._may_share()
        return StreamSettings(
            packing=stage.packing,
            budget=(stage.pack_length, stage.pack_tiles),
            micro_batch=trainer.micro_batch,
            groups_per_step=groups_per_step,
            loss=LossWeight.sample if stage.preference.is_on else stage.loss,  # each pair counts alike
            seed=self.config.seed,
            draw=train.data.draw(train.index) if train is not None and isinstance(train.data, Mixture) else None,
            share_prefix=share_prefix,
        )

    def _may_share(self) -> bool:
        """Whether rows that begin alike may share their tokens: nothing random makes those of each row its own."""
        stage = self.config.stage
        data = self.train.data if self.train is not None else None
        if stage.preference.is_on:  # the answers of a pair share their prompt: a tree has one fork
            return False
        return stage.packing and not stage.neftune and not (data is not None and is_augmented(data))

    def group(self) -> tuple[int, int]:
        """Return the number of this process's group, all of whose ranks read the same packs, and how many there are."""
        if self.trainer is None:
            return 0, 1
        size = self.config.trainer.sequence_parallel
        return self.trainer.global_rank // size, self.trainer.world_size // size

    def stream(self, rank: int = 0, world: int = 1) -> BatchStream:
        """Return the training stream of one rank, or group of ranks, starting at the cursor."""
        assert self.train is not None
        groups = self.config.trainer.global_batch // self.config.trainer.micro_batch
        return BatchStream(self.train.index, self.settings(groups), self.cursor, (rank, world))

    def max_steps(self) -> int:
        """Return the number of optimizer steps of the run."""
        if self.config.stage.max_steps > 0:
            return self.config.stage.max_steps
        stream = self.stream()
        groups = stream.groups_per_epoch() * self.config.stage.epochs
        return max(1, round(groups / stream.settings.groups_per_step))

    def train_dataloader(self) -> TimedLoader:
        """Return a loader of the endless stream, which the trainer stops after its number of steps."""
        assert self.train is not None
        stream = self.stream(*self.group())
        return self._loader(self.train.batches(stream.settings, True), stream)

    def val_dataloader(self) -> list[TimedLoader]:
        """Return a loader of the validation rows in packs, in their order."""
        if self.val is None:
            return []
        packs = share(validation_packs(self.val.index, self.settings(1)), *self.group())
        return [self.reading(self.val, packs)]

    def reading(self, part: Part, packs: list[MicroBatch]) -> TimedLoader:
        """Return a loader of given packs of a part's rows, without anything random."""
        return self._loader(part.batches(self.settings(1), False), packs)

    def _loader(self, dataset: MicroBatches, sampler: Any) -> TimedLoader:
        workers = self.config.data.workers
        return TimedLoader(
            Handed(dataset),
            batch_size=None,  # the sampler names whole batches
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=start_reader,
            prefetch_factor=4 if workers else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream continues, and on which data."""
        state: dict[str, Any] = {"cursor": list(self.cursor), "num_rows": 0}
        if self.train is not None:
            state |= {"num_rows": len(self.train.index), "rows": self._name_rows()}
            state["pictures"] = [part.index.picture_fingerprint() for part in self.parts]
            state["content"] = list(self.train.contents().values())
            state["val_content"] = list(self.val.contents().values()) if self.val is not None else None
        return state

    def _name_rows(self) -> str:
        """Return what decides the order of training besides the configuration."""
        assert self.train is not None
        return f"{self.train.index.fingerprint()} {self.settings(1).draw}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's place in the stream."""
        rows = len(self.train.index) if self.train else 0
        if rows and state_dict["num_rows"] != rows:
            raise CheckpointError(
                f"the interrupted run had {state_dict['num_rows']} training rows, data.path now has {rows}: its order "
                "cannot be continued. Restore the data, or start a new run with stage.init_from=RUN"
            )
        if rows and state_dict.get("rows", self._name_rows()) != self._name_rows():
            raise CheckpointError(
                "data.path has as many rows as in the interrupted run, but not the same sizes or mixture: its order "
                "cannot be continued. Restore the data, or start a new run with stage.init_from=RUN"
            )
        self._check_content(self.train, state_dict.get("content"), PART_KEYS[0])
        self._check_content(self.val, state_dict.get("val_content"), PART_KEYS[1])
        for part, before, keys in zip(self.parts, state_dict.get("pictures", []), PART_KEYS, strict=False):
            if before != part.index.picture_fingerprint() and not set(keys) & set(self.config.resume_allow):
                raise CheckpointError(
                    f"{part.data.path}: pictures were changed since the run was interrupted, at equal sizes. Restore "
                    f"them, go on with them as they are by resume_allow=[{keys[0]}], or start a new run with "
                    "stage.init_from=RUN"
                )
        epoch, window, group = state_dict["cursor"]
        self.cursor = (epoch, window, group)

    def _check_content(self, part: Part | None, before: list[str] | None, keys: tuple[str, ...]) -> None:
        """Refuse rows whose content changed since the interrupted run (older checkpoints do not know it)."""
        if part is None or before is None or set(keys) & set(self.config.resume_allow):
            return
        now = part.contents()
        changed = [name for name, then in zip_longest(now, before) if name is None or now[name] != then]
        if changed:
            raise CheckpointError(
                f"{', '.join(map(str, changed))}: rows were changed since the run was interrupted, at equal sizes. "
                f"Restore them, go on with them as they are by resume_allow=[{keys[0]}], or start a new run with "
                "stage.init_from=RUN"
            )


def validation_packs(index: Index, settings: StreamSettings) -> list[MicroBatch]:
    """Cut the rows, in their order, into batches within the budget; weights stay unnormalised (step_weight = 1)."""
    order = np.arange(len(index))
    if settings.share_prefix:
        order = side_by_side(order, index.head)
    packs: list[list[int]] = [[]]
    tokens = tiles = in_tree = tree_tokens = 0  # of the last pack, and rows and tokens of its last tree
    for row in order.tolist():
        is_shared = settings.share_prefix and bool(packs[-1]) and shares_head(index, row, packs[-1][-1])
        more_tokens, more_tiles = cost(index, row, is_shared)
        is_full = tokens + more_tokens > settings.budget[0] or tiles + more_tiles > settings.budget[1]
        if packs[-1] and (is_full or (is_shared and not fits_tree(index, row, in_tree, tree_tokens + more_tokens))):
            packs.append([])
            tokens = tiles = 0
            is_shared = False
            more_tokens, more_tiles = cost(index, row, is_shared)
        in_tree, tree_tokens = (in_tree + 1, tree_tokens + more_tokens) if is_shared else (1, more_tokens)
        packs[-1].append(row)
        tokens, tiles = tokens + more_tokens, tiles + more_tiles
    return [MicroBatch(tuple(pack), 0, 1.0, (0, 0, 0)) for pack in packs if pack]


def share(packs: list[MicroBatch], rank: int, world: int) -> list[MicroBatch]:
    """Take every n-th pack; at the end some devices run one again, without weight, so that all run equally many."""
    missing = -len(packs) % world
    return [*packs, *(replace(pack, step_weight=inf) for pack in packs[:1] * missing)][rank::world]
