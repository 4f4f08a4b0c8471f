"""Write checkpoints in a thread: training waits while its state is copied into the host's memory, not for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vlm_tune.config.schema import TrainerConfig
from vlm_tune.errors import CheckpointError, VlmTuneError
from vlm_tune.model.checkpoint import SHARED, part_name, put_in_place, read_checkpoint, write_atomically
from vlm_tune.model.parts.shards import own_rank
from vlm_tune.model.seal import seal

WHOLE_BYTES = 16 * 2**30  # of state, at most, that one process gathers and writes as one file
NUMBER_BYTES = 3 * 4  # of a trained number: itself and AdamW's two moments, in float32


def count_parts(trainer: TrainerConfig, num_trained: int) -> int | None:
    """Return in how many parts the processes of a run write its checkpoints; None if the first one writes a file."""
    processes = trainer.devices * trainer.nodes
    is_large = num_trained * NUMBER_BYTES > WHOLE_BYTES and processes > 1
    is_sharded = is_large if trainer.sharded_checkpoints is None else trainer.sharded_checkpoints
    return processes if is_sharded else None


class CheckpointWriter(TorchCheckpointIO):
    """Writes checkpoints completely or not at all, one at a time, and reads them without running code."""

    def __init__(self, parts: int | None) -> None:
        self.parts = parts
        self.then: Callable[[], None] = lambda: None  # called when a checkpoint has its name, once on each disk
        self.thread = ThreadPoolExecutor(1, "checkpoint-writer")  # no daemon: a process that ends completes its file
        self.pending: Future[None] | None = None
        self.group: Any = None  # of the threads, whose collectives must not meet those of training

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a state that `snapshot` copied, after the one before it: the only wait, besides `finish`."""
        self.finish()
        if self.parts is None and own_rank():
            return
        if self.parts is not None and self.parts > 1:
            self.group = self.group or dist.new_group(backend="gloo")
        write = self._write_file if self.parts is None else self._write_part
        self.pending = self.thread.submit(write, checkpoint, Path(path))

    def finish(self) -> None:
        """Wait until what was handed over is on the disk; raise what went wrong."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def give_time(self, seconds: float) -> None:
        """Wait so long for what was handed over, before the process is ended."""
        if self.pending is not None:
            wait([self.pending], seconds)

    def look(self) -> None:
        """Raise what went wrong in a write that has ended; wait for none."""
        if self.pending is not None and self.pending.done():
            self.finish()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read only weights, numbers and text, and only what is undamaged."""
        return read_checkpoint(Path(path), is_mapped=Path(path).is_dir())

    def _write_file(self, checkpoint: dict[str, Any], path: Path) -> None:
        write_sealed(checkpoint, path)
        self.then()

    def _write_part(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write this process's part; the folder of all gets its name when each of them is sealed."""
        rank, parts = own_rank(), self.parts or 1
        folder, own = (path.with_name(f".{path.name}.{each}.partial") for each in ("parts", rank))

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for stray in folder.glob("*part_*"):
                if f"_of_{parts:02d}." not in stray.name:  # of a run that was killed, with other processes
                    stray.unlink(missing_ok=True)
            kept = checkpoint if rank == 0 else {key: checkpoint[key] for key in (*SHARED, "global_step")}
            write_sealed(kept, folder / part_name(rank, parts))

        def place() -> None:
            rmtree(own, ignore_errors=True)
            try:
                folder.rename(own)
            except FileNotFoundError:
                if rank == 0:
                    raise
                return  # another process on this disk was first
            put_in_place(own, path)
            self.then()

        try:
            self._together(write)
            self._together(place, rank == 0)
            self._together(place, rank > 0)  # machines that share no disk each name their own
        except CheckpointError:
            rmtree(folder, ignore_errors=True)
            raise

    def _together(self, act: Callable[[], None], is_asked: bool = True) -> None:
        """Act in the processes that are asked, and wait for them; raise in all what went wrong in one."""
        errors = [""] * (self.parts or 1)
        try:
            if is_asked:
                act()
        except (VlmTuneError, OSError) as error:
            errors[own_rank()] = str(error)
        if self.group is not None:
            try:
                dist.all_gather_object(errors, errors[own_rank()], group=self.group)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise CheckpointError(
                    f"another process is gone, and its part of a checkpoint is missing ({reason}): older checkpoints "
                    "are untouched. Start all processes again with resume=last"
                ) from error
        if any(errors):
            raise CheckpointError(next(filter(None, errors)))


def write_sealed(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file under a temporary name, seal it, then rename."""

    def write(partial: Path) -> None:
        torch.save(checkpoint, partial)
        seal(partial)

    write_atomically(path, write)
