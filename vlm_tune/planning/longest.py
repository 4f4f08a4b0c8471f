"""The longest pack that fits a device, with each way of `stage.gradient_checkpointing.llm`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise

from vlm_tune.config.checks import find_problems
from vlm_tune.config.schema import Config
from vlm_tune.planning.batches import supposed_work
from vlm_tune.planning.fit import WAYS
from vlm_tune.planning.plan import Run
from vlm_tune.planning.rehearsal import Needs, rehearse

STEP = 256  # tokens; a length is a multiple of it
COUNTED = (1024, 4096, 8192, 16384, 32768)  # tokens of the packs that are rehearsed, as far as they are needed
MOST = 2**20  # tokens: nobody asks for more


def longest_packs(run: Run, gib: float, total: Callable[[Needs], float]) -> Iterator[tuple[bool | str, int]]:
    """Yield each way that these settings allow, and the tokens of the longest pack with it; 0 where none fits.

    `total` is the GiB of what is counted. The packs are supposed: full, with tiles in the settings' share.
    """
    for way in WAYS:
        if not find_problems(with_pack(run.config, way, STEP)) and (run.on_gpu or way != "offload"):
            yield way, longest(lambda length, way=way: total(needs_of(run, way, length)), gib)  # type: ignore[misc]


def longest(peak: Callable[[int], float], gib: float) -> int:
    """Find the longest pack of which `peak`, in GiB, is no more than that: on the line through two that are counted.

    Beyond the tokens of a chunk, and on a CPU of a part, memory grows by the same for each token.
    """
    counted = cache(peak)
    for low, high in reversed(list(pairwise(COUNTED))):
        if counted(low) <= gib:
            growth = max(counted(high) - counted(low), 1e-9) / (high - low)
            return int(min(MOST, low + (gib - counted(low)) / growth)) // STEP * STEP
    return 0


def needs_of(run: Run, way: bool | str, length: int) -> Needs:
    """Rehearse a step on one full pack."""
    config = with_pack(run.config, way, length)
    work = supposed_work(config, run.picture, run.vocabulary.context_id)
    return rehearse(config, work.usual, run.vocabulary, run.on_gpu)


def with_pack(config: Config, way: bool | str, length: int) -> Config:
    """Set the length of a pack, one a forward pass, with tiles in the share that the settings give it."""
    stage = config.stage
    tiles = max(config.model.tiles.max + 1, stage.pack_tiles * length // stage.pack_length)
    checkpointing = replace(stage.gradient_checkpointing, llm=way)
    stage = replace(stage, pack_length=length, pack_tiles=tiles, gradient_checkpointing=checkpointing)
    trainer = config.trainer
    batch = max(1, trainer.global_batch // trainer.micro_batch)
    return replace(config, stage=stage, trainer=replace(trainer, micro_batch=1, global_batch=batch))
