"""Contradictions between fields: each check names the keys, their values, and a way out."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from urllib.parse import quote, urlencode

from vlm_tune.config.schema import (
    AugmentConfig,
    Config,
    LossWeight,
    Optimizer,
    Precision,
    Quantize,
    SharePrefix,
    Strategy,
    TileRule,
    Train,
    flatten,
)

PARTS = ("vision", "projector", "llm")
SPLITS_WEIGHTS = (Strategy.fsdp, Strategy.zero3, Strategy.zero3_offload)
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


def find_problems(config: Config) -> list[str]:
    """List all contradictions of a configuration; an empty list means it can run."""
    return [
        *_finite(config),
        *_stage(config),
        *_recomputed(config),
        *_router(config),
        *_prefixes(config),
        *_preference(config),
        *_tiles(config),
        *_numbers(config),
        *_recipe(config),
        *_colour(config),
        *_lengths(config),
        *_devices(config),
        *_groups(config),
    ]


def _finite(config: Config) -> list[str]:
    return [
        f"{key}={value}: not a number to compute with; give a finite one"
        for key, value in flatten(asdict(config)).items()
        if isinstance(value, float) and not isfinite(value)
    ]


def _stage(config: Config) -> list[str]:
    stage = config.stage
    trained = {part: getattr(stage.train, part) for part in PARTS}
    problems = []
    if all(how is Train.frozen for how in trained.values()):
        problems.append(f"stage.train: stage {stage.name} trains nothing: set vision, projector or llm to full or lora")
    for part, how in trained.items():
        if how is Train.lora and stage.lora.rank < 1:
            problems.append(
                f"stage.train.{part}=lora but stage.lora.rank={stage.lora.rank}: set a rank of 1 or more, "
                f"or stage.train.{part}=frozen"
            )
        if how is not Train.frozen and getattr(stage.lr, part) <= 0:
            problems.append(f"stage.lr.{part}={getattr(stage.lr, part)} but the part is trained: set a rate above 0")
    if stage.train.vision is Train.frozen:
        for key, value, off in (("drop_path", stage.drop_path, 0), ("layer_decay", stage.layer_decay, 1)):
            if value != off:
                problems.append(
                    f"stage.{key}={value} concerns a trained encoder but stage.train.vision=frozen: set it to {off}, "
                    "or stage.train.vision to lora or full"
                )
    if stage.train.projector is Train.lora:
        problems.append("stage.train.projector=lora: the projector is small and new; set it to full or frozen")
    if stage.quantize is not Quantize.none and stage.train.llm is Train.full:
        problems.append(
            f"stage.quantize={stage.quantize.value} stores a frozen base but stage.train.llm=full: "
            "set stage.train.llm=lora or stage.quantize=none"
        )
    return problems


def _recomputed(config: Config) -> list[str]:
    way, name = config.stage.gradient_checkpointing.llm, config.strategy.name
    if isinstance(way, bool):
        return []
    key = f"stage.gradient_checkpointing.llm={way}"
    if way not in ("mlp", "offload"):
        return [f"{key}: there are false, mlp, true and offload"]
    problems = []
    if name in (Strategy.zero3, Strategy.zero3_offload):
        problems.append(f"{key}, but strategy={name.value} empties weights after each call: set true, or strategy=fsdp")
    if way == "offload" and config.trainer.accelerator == "cpu":
        problems.append(
            f"{key} is for a GPU's memory, but trainer.accelerator=cpu: set true, which does the same there"
        )
    return problems


def _router(config: Config) -> list[str]:
    stage = config.stage
    if not stage.router_loss or stage.train.llm is not Train.frozen:
        return []
    return [
        f"stage.router_loss={stage.router_loss} concerns a trained language model but stage.train.llm=frozen: set it "
        "to 0, or stage.train.llm to lora or full"
    ]


def _prefixes(config: Config) -> list[str]:
    stage = config.stage
    alone = {
        "stage.packing=false pads each row by itself": not stage.packing,
        f"stage.neftune={stage.neftune} draws noise for each row": stage.neftune > 0,
        "data.augment changes the picture of each row": config.data.augment != AugmentConfig(),
    }
    if stage.share_prefix is not SharePrefix.on:
        return []
    return [f"stage.share_prefix=on, but {reason}: set it to auto" for reason, holds in alone.items() if holds]


def _preference(config: Config) -> list[str]:
    stage, preference = config.stage, config.stage.preference
    problems = [
        f"stage.preference.{name}={weight}: set a weight of 0 or more"
        for name, weight in (("sigmoid", preference.sigmoid), ("bco", preference.bco), ("nll", preference.nll))
        if weight < 0
    ]
    if not 0 <= preference.label_smoothing < 0.5:
        problems.append(f"stage.preference.label_smoothing={preference.label_smoothing}: set 0 or more, but below 0.5")
    if preference.beta <= 0:
        problems.append(f"stage.preference.beta={preference.beta}: set it above 0")
    if not preference.is_on:
        return problems
    name, weighs = config.strategy.name, stage.loss is not LossWeight.token
    is_apart, is_tied = not stage.packing, stage.share_prefix is SharePrefix.on
    is_changed = config.data.augment != AugmentConfig()
    obstacles = {
        "stage.packing=false pads each answer alone: set it to true, a pair is one prompt with two branches": is_apart,
        f"stage.loss={stage.loss.value} weighs tokens: leave it out, pairs count alike": weighs,
        "stage.share_prefix=on lets rows share tokens: set it to off, the answers of a pair share theirs": is_tied,
        f"stage.neftune={stage.neftune} draws noise that the reference did not see: set it to 0": stage.neftune > 0,
        "data.augment shows pictures that the reference did not see: leave it out": is_changed,
        f"stage.router_loss={stage.router_loss} is about tokens: set it to 0": stage.router_loss > 0,
        f"strategy={name.value} splits weights: use ddp or zero2, the reference reads them whole": (
            name in SPLITS_WEIGHTS
        ),
    }
    return problems + [f"stage.preference trains on pairs, but {text}" for text, holds in obstacles.items() if holds]


def _tiles(config: Config) -> list[str]:
    problems = []
    tiles = config.model.tiles
    if config.model.projector.newline and tiles.rule is not TileRule.anyres:
        problems.append(
            f"model.projector.newline=true but model.tiles.rule={tiles.rule.value}: only any-resolution pictures have "
            "rows to end; set model.tiles.rule=anyres or model.projector.newline=false"
        )
    if tiles.min > tiles.max:
        problems.append(f"model.tiles.min={tiles.min} is above model.tiles.max={tiles.max}: lower it")
    return problems


def _numbers(config: Config) -> list[str]:
    stage, trainer, tiles = config.stage, config.trainer, config.model.tiles
    ranges = {
        "stage.warmup": (stage.warmup, 0, 1),
        "stage.min_lr": (stage.min_lr, 0, 1),
        "stage.beta2": (stage.beta2, 0, 0.99999),
        "stage.lora.dropout": (stage.lora.dropout, 0, 0.99),
        "stage.drop_path": (stage.drop_path, 0, 0.9),
        "stage.layer_decay": (stage.layer_decay, 0.01, 1),
        "stage.neftune": (stage.neftune, 0, 100),
        "stage.router_loss": (stage.router_loss, 0, 100),
        "data.val_share": (config.data.val_share, 0, 0.9),
        "trainer.save_minutes": (1 if trainer.save_minutes is None else trainer.save_minutes, 0.001, 10_000),
        "data.augment.crop": (config.data.augment.crop, 0.1, 1),
    }
    problems = [
        f"{key}={value} is out of range: choose a value from {low} to {high}"
        for key, (value, low, high) in ranges.items()
        if not low <= value <= high
    ]
    positive = {
        "trainer.global_batch": trainer.global_batch,
        "trainer.micro_batch": trainer.micro_batch,
        "trainer.devices": trainer.devices,
        "trainer.nodes": trainer.nodes,
        "trainer.sequence_parallel": trainer.sequence_parallel,
        "trainer.log_every": trainer.log_every,
        "trainer.val_every": 1 if trainer.val_every is None else trainer.val_every,
        "trainer.save_every": 1 if trainer.save_every is None else trainer.save_every,
        "trainer.patience": 1 if trainer.patience is None else trainer.patience,
        "trainer.max_bad_steps": trainer.max_bad_steps,
        "trainer.keep": trainer.keep,
        "trainer.max_val_rows": trainer.max_val_rows,
        "data.image.max_pixels": config.data.image.max_pixels,
        "model.tiles.size": tiles.size,
        "model.tiles.min": tiles.min,
        "model.projector.shuffle": config.model.projector.shuffle,
        "model.projector.num_queries": config.model.projector.num_queries,
        "model.projector.qformer_layers": config.model.projector.qformer_layers,
        "data.max_length": config.data.max_length,
        "stage.pack_length": stage.pack_length,
        "stage.pack_tiles": stage.pack_tiles,
    }
    problems += [f"{key}={value}: set it to 1 or more" for key, value in positive.items() if value < 1]
    if stage.epochs <= 0 and stage.max_steps < 1:
        problems.append(f"stage.epochs={stage.epochs} and stage.max_steps={stage.max_steps}: set one of them above 0")
    if stage.max_steps < 1 and stage.max_steps != -1:
        problems.append(f"stage.max_steps={stage.max_steps}: set 1 or more, or -1 to train stage.epochs")
    if not 0 <= config.seed < 2**32:
        problems.append(f"seed={config.seed}: set 0 to {2**32 - 1}")
    not_negative = {
        "data.workers": config.data.workers,
        "trainer.chat_every": trainer.chat_every or 0,
        "trainer.num_chats": trainer.num_chats,
        "trainer.max_test_rows": trainer.max_test_rows,
    }
    return problems + [f"{key}={value}: set 0 or more" for key, value in not_negative.items() if value < 0]


def as_query(options: Mapping[str, str]) -> str:
    """Write the settings of a recipe as the part of its path behind the `?`, whatever characters they hold."""
    return urlencode(sorted(options.items()), quote_via=quote)


def _recipe(config: Config) -> list[str]:
    options, path = config.data.recipe, config.data.path
    if not options or (path.startswith("recipe:") and as_query(options) in path):
        return []
    return [
        f"data.recipe={options}, but data.path={path} is made without these settings: leave one of the two out; a run "
        "keeps the rows that it was trained on"
    ]


def _colour(config: Config) -> list[str]:
    alpha = config.data.image.alpha
    if re.fullmatch("drop|white|black|#[0-9A-Fa-f]{6}", alpha):
        return []
    remedy = """set drop, white, black, or a colour in two pairs of quotes, as in data.image.alpha='"#80ff00"'"""
    return [f"data.image.alpha={alpha}: {remedy}"]


def _lengths(config: Config) -> list[str]:
    stage, tiles = config.stage, config.model.tiles
    if not stage.packing:
        return []
    problems = []
    most = tiles.max + (tiles.thumbnail and tiles.max > 1)
    if most > stage.pack_tiles:
        problems.append(
            f"model.tiles.max={tiles.max} makes up to {most} tiles of one picture, stage.pack_tiles is "
            f"{stage.pack_tiles}: raise it or lower model.tiles.max"
        )
    return problems


def _devices(config: Config) -> list[str]:
    trainer = config.trainer
    problems = []
    if trainer.accelerator not in ACCELERATORS:
        problems.append(f"trainer.accelerator={trainer.accelerator}: there are {', '.join(ACCELERATORS)}")
    slots = trainer.groups * trainer.micro_batch
    if slots > 0 and trainer.global_batch % slots:
        together = "devices*nodes" + ("/sequence_parallel" if trainer.sequence_parallel > 1 else "")
        problems.append(
            f"trainer.global_batch={trainer.global_batch} does not divide by {together}*micro_batch={slots}: "
            f"choose a multiple of {slots}"
        )
    name, optimizer = config.strategy.name, config.stage.optimizer
    if config.stage.quantize is not Quantize.none and name in SPLITS_WEIGHTS:
        problems.append(
            f"strategy={name.value} splits weights, stage.quantize={config.stage.quantize.value} "
            "packs them: use strategy=ddp or strategy=zero2 with a quantized base"
        )
    if trainer.find_batch and not config.stage.packing:
        problems.append(
            "trainer.find_batch=true finds the size of packs, but stage.packing=false: set one of them otherwise"
        )
    if trainer.find_batch and name in SPLITS_WEIGHTS:
        problems.append(
            f"trainer.find_batch=true tries a device that holds the whole model, strategy={name.value} splits it: "
            "use strategy=ddp or zero2, or choose stage.pack_length (python -m vlm_tune plan)"
        )
    if optimizer is not Optimizer.adamw and name not in (Strategy.auto, Strategy.ddp):
        problems.append(
            f"strategy={name.value} splits the optimizer's state, stage.optimizer={optimizer.value} packs it: "
            "use stage.optimizer=adamw, or strategy=ddp"
        )
    if trainer.precision is Precision.fp16 and trainer.accelerator == "cpu":
        problems.append("trainer.precision=fp16 needs a GPU: set trainer.precision=bf16 or fp32 on a CPU")
    return problems


def _groups(config: Config) -> list[str]:
    stage, trainer, name = config.stage, config.trainer, config.strategy.name
    size, devices = trainer.sequence_parallel, trainer.devices * trainer.nodes
    if size <= 1:
        return []
    is_deepspeed = name not in (Strategy.auto, Strategy.ddp, Strategy.fsdp)
    obstacles = {
        f"trainer.devices*trainer.nodes={devices} does not divide by it: choose a multiple of {size}": devices % size,
        "stage.packing=false pads each row: set it to true": not stage.packing,
        "stage.preference trains on pairs, whose answers it would part: leave it out": stage.preference.is_on,
        f"stage.neftune={stage.neftune} draws noise for a whole pack: set it to 0": stage.neftune > 0,
        f"stage.router_loss={stage.router_loss} is about the tokens of whole packs: set it to 0": stage.router_loss > 0,
        f"strategy={name.value} was never tried with it: use ddp or fsdp": is_deepspeed,
        "trainer.find_batch=true tries packs on one device: choose stage.pack_length": trainer.find_batch,
    }
    return [f"trainer.sequence_parallel={size} cuts packs, but {text}" for text, holds in obstacles.items() if holds]
