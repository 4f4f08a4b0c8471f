"""Which settings make a run fit a device, cheapest first: those that leave its result alone come before others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vlm_tune.config.checks import SPLITS_WEIGHTS
from vlm_tune.config.schema import Config, Optimizer, Quantize, Strategy, Train
from vlm_tune.errors import ConfigError

WAYS: tuple[bool | str, ...] = (False, "mlp", True, "offload")  # of stage.gradient_checkpointing.llm, cheapest first
COSTS = {
    "mlp": "a quarter more time: MLPs are computed twice",
    True: "a third more time: layers are computed twice",
    "offload": "a third more time, and that of copies into main memory and back",
}
WORTH = 0.98  # a setting that leaves more than this share of the memory is not worth it
SHORTEST = 1024  # tokens of a pack

Peak = Callable[[list[str]], float]  # overrides -> GiB


@dataclass(frozen=True)
class Remedy:
    """Settings, what they cost, and the peak with them and all that stand before them."""

    overrides: list[str]
    cost: str
    gib: float


def remedies(config: Config) -> Iterator[tuple[list[str], str]]:
    """Yield settings and their cost, cheapest first, as far as they concern this run."""
    stage, trainer = config.stage, config.trainer
    parts = stage.train
    if trainer.micro_batch > 1:
        yield ["trainer.micro_batch=1"], "none: the same steps in more passes"
    if trainer.devices * trainer.nodes > 1 and config.strategy.name in (Strategy.auto, Strategy.ddp):
        yield ["strategy=zero2"], "little time: gradients and moments are spread over the devices"
    ways = list(WAYS)
    for way in ways[ways.index(stage.gradient_checkpointing.llm) + 1 :]:
        yield [f"stage.gradient_checkpointing.llm={str(way).lower()}"], COSTS[way]
    if parts.vision is not Train.frozen and not stage.gradient_checkpointing.vision:
        yield ["stage.gradient_checkpointing.vision=true"], "time: the encoder's layers are computed twice"
    length, batch = stage.pack_length, trainer.global_batch
    while stage.packing and length >= 2 * SHORTEST:
        length, batch = length // 2, batch * 2
        tiles = max(1, stage.pack_tiles * length // stage.pack_length)
        settings = [f"stage.pack_length={length}", f"stage.pack_tiles={tiles}", f"trainer.global_batch={batch}"]
        yield settings, "little time: the same rows a step, in more passes"
    if stage.optimizer is Optimizer.adamw and Train.full in (parts.llm, parts.vision):
        yield ["stage.optimizer=paged_adamw8bit"], "moments of 8 bits, which may leave the GPU"
    if trainer.devices * trainer.nodes > 1 and config.strategy.name not in SPLITS_WEIGHTS:
        yield ["strategy=zero3"], "time: weights travel between the devices"
    if parts.llm is not Train.full and stage.quantize is Quantize.none:
        yield ["stage.quantize=nf4"], "time, and a base that is rounded to 4 bits"
    if parts.llm is Train.full:
        yield ["stage.train.llm=lora"], "adapters are trained in place of all weights"
        yield ["stage.train.llm=lora", "stage.quantize=nf4"], "adapters, on a base that is rounded to 4 bits"


def make_fit(config: Config, gib: float, peak: Peak, start: float) -> list[Remedy]:
    """Add settings until the run fits, then leave out those that it fits without; the last may still be too large.

    Of several values of one key the last stands. `start` is the peak without any.
    """
    chosen: list[Remedy] = []
    last = start
    for overrides, cost in remedies(config):
        if last <= gib:
            break
        try:
            found = peak(joined([*chosen, Remedy(overrides, cost, 0)]))
        except ConfigError:  # the model refuses this setting, as a mixture of experts does 4 bits
            continue
        if found < WORTH * last:
            chosen = [*(each for each in chosen if not replaces(overrides, each)), Remedy(overrides, cost, found)]
            last = found
    for each in chosen[:-1] if last <= gib else []:
        without = [other for other in chosen if other is not each]
        found = peak(joined(without))
        if found <= gib:
            chosen = [*without[:-1], Remedy(without[-1].overrides, without[-1].cost, found)]
    return chosen


def replaces(overrides: list[str], earlier: Remedy) -> bool:
    """Tell whether overrides set all keys that an earlier remedy sets."""
    keys = {each.partition("=")[0] for each in overrides}
    return {each.partition("=")[0] for each in earlier.overrides} <= keys


def joined(chosen: list[Remedy]) -> list[str]:
    """List the overrides of several remedies; of one key the last."""
    settings = {each.partition("=")[0]: each for remedy in chosen for each in remedy.overrides}
    return list(settings.values())
