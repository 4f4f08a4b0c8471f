"""The optimizer: AdamW with a learning rate for each part, linear warmup, then a cosine, by optimizer step."""

import math
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vlm_tune.config.schema import Optimizer, StageConfig
from vlm_tune.model.parts.stage import PARTS, trained_parameters
from vlm_tune.model.parts.vision import layer_list
from vlm_tune.model.vlm import VisionLanguageModel

BETA1 = 0.9
FUSED = ("cpu", "cuda", "mps", "xpu")  # where torch has a fused AdamW kernel
BITSANDBYTES = {
    Optimizer.adamw8bit: "AdamW8bit",
    Optimizer.paged_adamw32bit: "PagedAdamW32bit",
    Optimizer.paged_adamw8bit: "PagedAdamW8bit",
}


def make_optimizer(model: VisionLanguageModel, stage: StageConfig, may_fuse: bool = True) -> torch.optim.Optimizer:
    """Make the stage's optimizer.

    Without `may_fuse` gradients can be clipped under fp16's loss scale, which the fused kernel removes itself.
    """
    groups, betas = make_groups(model, stage), (BETA1, stage.beta2)
    if stage.optimizer is Optimizer.adamw:
        adamw = AdamW(groups, betas=betas, fused=may_fuse and model.device.type in FUSED)
        # outside fp16 there is no loss scale to remove, because of which Lightning refuses to clip a fused optimizer
        adamw._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        return adamw
    import bitsandbytes  # late: it takes seconds to import

    kind = getattr(bitsandbytes.optim, BITSANDBYTES[stage.optimizer])
    optimizer: torch.optim.Optimizer = kind(groups, betas=betas)
    return optimizer


def make_groups(model: VisionLanguageModel, stage: StageConfig) -> list[dict[str, Any]]:
    """Group trained parameters by part, by whether they decay, and the encoder's by layer if its rates differ.

    Norms, biases and other vectors do not decay.
    """
    shares = layer_shares(model, stage.layer_decay) if stage.layer_decay != 1 else {}
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for part in PARTS:
        decay = getattr(stage.part_weight_decay, part)
        decay = stage.weight_decay if decay is None else decay
        for _, parameter in trained_parameters(getattr(model, part)):
            share, decays = shares.get(id(parameter), 1.0), parameter.ndim > 1
            settings = {"lr": getattr(stage.lr, part) * share, "weight_decay": decay if decays else 0.0, "name": part}
            groups.setdefault((part, share, not decays), {"params": [], **settings})["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (PARTS.index(key[0]), *key[1:]))]


def layer_shares(model: VisionLanguageModel, decay: float) -> dict[int, float]:
    """Map the id of each of the encoder's n layers' weights to decay**(n-i), i = 1 for the first layer.

    The embeddings have decay**n, weights after the layers 1. Source: Clark et al. 2020 (ELECTRA); BEiT's fine-tuning.
    """
    layers = layer_list(model.vision.tower, "stage.layer_decay")
    numbers = {id(weight): number for number, layer in enumerate(layers, 1) for weight in layer.parameters()}
    shares, last = {}, 0
    for weight in model.vision.parameters():  # in order: embeddings, layers, the norm after them
        last = numbers.get(id(weight), len(layers) + 1 if last else 0)
        shares[id(weight)] = decay ** max(0, len(layers) - last)
    return shares


def settings_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group: learning rate, decay, name."""
    return {key: value for key, value in group.items() if key != "params"}


def give_settings(schedule: LambdaLR, groups: list[dict[str, Any]]) -> None:
    """Give a restored optimizer the rates, decays and betas that the configuration names now; they may have changed."""
    for group, wanted, factor in zip(schedule.optimizer.param_groups, groups, schedule.lr_lambdas, strict=True):
        rate = wanted["initial_lr"]
        group.update(settings_of(wanted) | {"lr": rate * factor(schedule.last_epoch)})
    schedule.base_lrs = [wanted["initial_lr"] for wanted in groups]
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def make_schedule(optimizer: torch.optim.Optimizer, stage: StageConfig, max_steps: int) -> LambdaLR:
    """Warm up linearly over a share of the steps, then follow a cosine down to `stage.min_lr` times the peak rate."""
    warmup = round(stage.warmup * max_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        return stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
