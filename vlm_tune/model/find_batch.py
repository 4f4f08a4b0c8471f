"""Find the largest packs that a device can hold: forward and backward passes are tried before a run, and measured."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path

import numpy as np
import torch
import torch.distributed

from vlm_tune.config.schema import Config, Optimizer, Precision, StageConfig
from vlm_tune.data.batch import Batch
from vlm_tune.data.datamodule import DataModule
from vlm_tune.data.packing import rows_behind
from vlm_tune.data.sizes import Index
from vlm_tune.data.stream import LOOKED_AT, BatchStream, MicroBatch
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import DTYPES, resolve_precision
from vlm_tune.model.fill_cache import GIB, plan_cache
from vlm_tune.model.kernels.freed import hand_back_freed_memory
from vlm_tune.model.parts.stage import set_modes, trained_parameters
from vlm_tune.model.vlm import VisionLanguageModel

USED = 0.9  # share of the free memory that may be used: blocks of other sizes leave gaps, and libraries take some
MOMENTS = {Optimizer.adamw: 8, Optimizer.adamw8bit: 2}  # bytes of a trained weight; paged ones leave the device


def regroup(config: Config, passes: int) -> Config:
    """Divide the tokens and tiles of an optimizer step anew, into so many forward passes on each device.

    16 packs of 4,096 tokens, on 2 devices in 2 passes: 4 packs of 16,384.
    """
    stage, trainer = config.stage, config.trainer
    packs = trainer.devices * trainer.nodes * trainer.micro_batch * passes
    length, tiles = (each * trainer.global_batch // packs for each in (stage.pack_length, stage.pack_tiles))
    stage = replace(stage, pack_length=length, pack_tiles=tiles)
    return replace(config, stage=stage, trainer=replace(trainer, global_batch=packs))


def find_passes(
    vlm: VisionLanguageModel, data: DataModule, config: Config, device: torch.device, limit: float | None = None
) -> int:
    """Return the fewest forward passes of a step on a device that fit its memory; trying them changes nothing else.

    limit   bytes that this process may use; None = what is free

    Raise ConfigError if not even packs of about the largest row fit.
    """
    assert data.train is not None
    vlm.to(device)
    memory = Memory(device)
    allowed = USED * (memory.free(config) if limit is None else limit)
    weights = [weight for _, weight in trained_parameters(vlm)]
    gradients = sum(weight.nbytes for weight in weights)
    kept = sum(weight.numel() for weight in weights) * MOMENTS.get(config.stage.optimizer, 0)
    if config.trainer.devices * config.trainer.nodes > 1:
        kept += gradients  # the buckets in which they are exchanged
    base = memory.used() + gradients + kept
    plan = plan_cache(vlm, data, config)
    is_seen = plan is None or not plan.fits

    def needs(passes: int) -> float:
        return max(map(need_of, largest_batches(data, regroup(config, passes))))

    def need_of(batch: Batch) -> float:
        if batch.tiles is not None and plan is not None and not is_seen:
            shape = (len(batch.tiles), plan.num_patches, vlm.vision.width)
            batch.tiles, batch.features = None, torch.zeros(shape, dtype=vlm.vision.dtype)
        return kept + memory.peak(lambda: run_twice(vlm, batch.to(device), config))

    fails, fits = 0, most_passes(config, data.train.index)
    with undisturbed(vlm, config.stage, device):
        need = needs(fits)
        if need > allowed:
            raise too_large(regroup(config, fits).stage, need, allowed)
        while fits - fails > 1:
            passes = (fits + fails) // 2
            expected = base + (need - base) * fits / passes  # a CPU without memory raises nothing: it ends the process
            if expected <= allowed:
                expected = needs(passes)
            if expected <= allowed:
                fits, need = passes, expected
            else:
                fails = passes
    return fits


def too_large(stage: StageConfig, need: float, allowed: float) -> ConfigError:
    """Return the error for a device that cannot hold the smallest packs."""
    most = f"need {need / GIB:.2f} GiB" if need < inf else "need more than there is"
    return ConfigError(
        f"trainer.find_batch=true: packs of {stage.pack_length:,} tokens and {stage.pack_tiles:,} tiles, about the "
        f"largest row, {most}; {allowed / GIB:.2f} GiB may be used. Lower model.tiles.max or data.max_length, set "
        "stage.gradient_checkpointing.llm=true, or train less of the model"
    )


def most_passes(config: Config, index: Index) -> int:
    """Return the number of passes whose packs just hold the longest row, and the one of most tiles."""
    step = regroup(config, 1).stage
    most_tiles = max(int(index.tiles.max()), config.model.tiles.max + 1)
    return max(1, min(step.pack_length // int(index.tokens.max()), step.pack_tiles // most_tiles))


def largest_batches(data: DataModule, config: Config) -> Iterator[Batch]:
    """Join rows to a batch as large as the settings allow; of shared heads, also that whose rows see most of them."""
    assert data.train is not None
    micro_batch, stage, index = config.trainer.micro_batch, config.stage, data.train.index
    rows = fill(index, (micro_batch * stage.pack_length, micro_batch * stage.pack_tiles))
    settings = replace(data.settings(1), micro_batch=micro_batch, budget=(stage.pack_length, stage.pack_tiles))
    alone = data.train.batches(replace(settings, share_prefix=False), is_training=False)
    yield alone[MicroBatch(rows, 0, 1.0, (0, 0, 0))]
    if settings.share_prefix:
        stream = BatchStream(index, settings)
        groups = islice(stream, min(stream.groups_per_epoch(), LOOKED_AT))
        most = max(groups, key=lambda group: num_seen_again(index, group.rows))
        yield data.train.batches(settings, is_training=False)[replace(most, step_weight=1.0)]


def num_seen_again(index: Index, rows: Sequence[int]) -> int:
    """Count the tokens of heads that the rows of a pack see besides the first of each: their keys are kept for each."""
    return int(index.head_tokens[rows_behind(rows, index, share_prefix=True)].sum())


def fill(index: Index, budget: tuple[int, int]) -> tuple[int, ...]:
    """Fill a budget of tokens and tiles with rows, those of most tiles first; a row may come several times."""
    max_tokens, max_tiles = budget
    rows: list[int] = []
    for row in np.lexsort((-index.tokens, -index.tiles)).tolist():
        tokens, tiles = int(index.tokens[row]), int(index.tiles[row])
        count = max_tokens // tokens if not tiles else min(max_tokens // tokens, max_tiles // tiles)
        count = max(count, int(not rows))  # one that is larger than the budget has a pack of its own
        rows += [row] * count
        max_tokens, max_tiles = max_tokens - count * tokens, max_tiles - count * tiles
    return tuple(rows)


def run_twice(vlm: VisionLanguageModel, batch: Batch, config: Config) -> None:
    """Run two forward and backward passes, the second beside the gradients of the first."""
    precision = resolve_precision(config.trainer.precision)
    try:
        for _ in range(2):
            with torch.autocast(vlm.device.type, DTYPES[precision], enabled=precision is not Precision.fp32):
                loss = vlm(batch)
            loss.sum().backward()  # of pairs, their log-probabilities
    finally:
        vlm.zero_grad()


@contextmanager
def undisturbed(vlm: VisionLanguageModel, stage: StageConfig, device: torch.device) -> Iterator[None]:
    """Train without a trace: modes, statistics of layers and generators are then as before."""
    modes = {layer: layer.training for layer in vlm.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in vlm.buffers()]
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        set_modes(vlm, stage)
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
            for layer, mode in modes.items():
                layer.training = mode


class Memory:
    """The memory of a GPU, or of this process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"

    def free(self, config: Config) -> float:
        """Return the bytes that this process may use, those that it uses included.

        On a CPU the processes of a machine share it; Lightning starts the others later.
        """
        if self.is_gpu:
            return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        used, num = self.used(), config.trainer.devices
        return (
            used + available_bytes() / num if torch.distributed.is_initialized() else (used + available_bytes()) / num
        )

    def used(self) -> int:
        """Return the bytes that this process uses now."""
        if self.is_gpu:
            return torch.cuda.memory_allocated(self.device)
        hand_back_freed_memory()
        return in_kilobytes("self/status", "RssAnon")

    def peak(self, run: Callable[[], None]) -> float:
        """Run a function; return the most bytes that were used meanwhile, infinity if that was more than there is."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            hand_back_freed_memory()
            with suppress(OSError):  # the highest mark of the process then counts, which is no lower
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        try:
            run()
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            return inf
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        return in_kilobytes("self/status", "VmHWM") - in_kilobytes("self/status", "RssFile")


def available_bytes() -> int:
    """Ask the system for the memory that a new process can have."""
    return in_kilobytes("meminfo", "MemAvailable")


def in_kilobytes(file: str, name: str) -> int:
    """Read an entry of a file of Linux's /proc, in bytes."""
    lines = Path("/proc", file).read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def is_full(error: BaseException) -> bool:
    """Return whether an error means that the memory of a GPU or of the machine is full."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
