"""The optimizer: AdamW with a learning rate for each part, linear warmup, then a cosine, by optimizer step."""

import math

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from vlm_tune.config.schema import StageConfig
from vlm_tune.model.parts import PARTS, trained_parameters
from vlm_tune.model.vlm import VisionLanguageModel


def make_optimizer(model: VisionLanguageModel, stage: StageConfig) -> AdamW:
    """Group trained parameters by part, and by whether they decay: norms, biases and other vectors do not."""
    groups = []
    for part in PARTS:
        parameters = [parameter for _, parameter in trained_parameters(getattr(model, part))]
        for decays in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decays]
            if chosen:
                decay = stage.weight_decay if decays else 0.0
                groups.append({"params": chosen, "lr": getattr(stage.lr, part), "weight_decay": decay, "name": part})
    optimizer = AdamW(groups, betas=(0.9, 0.999), fused=True)
    # the loop unscales and clips gradients; Lightning refuses to clip where the optimizer claims to unscale them
    optimizer._step_supports_amp_scaling = False
    return optimizer


def make_schedule(optimizer: AdamW, stage: StageConfig, max_steps: int) -> LambdaLR:
    """Warm up linearly over a share of the steps, then follow a cosine down to `stage.min_lr` of the rate."""
    warmup = round(stage.warmup * max_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
        return stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
