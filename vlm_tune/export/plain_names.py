"""Map weight names in older adapters, and in those of LLaVA's trainer, to those of current transformers classes."""

from typing import Any

from vlm_tune.model.layouts.llava.original import PROJECTORS

KINDS = ("internvl", "llava", "llava_next")  # whose text part once was a whole model of its own inside
RENAMED = (  # theirs -> ours; the first that fits
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
    *((f"{theirs}.", f"model.multi_modal_projector.{ours}.") for ours, theirs in PROJECTORS["mlp2x_gelu"].items()),
    *((f"model.{part}.", f"model.language_model.{part}.") for part in ("layers", "embed_tokens", "norm")),
)
PATTERNS = ("rank_pattern", "alpha_pattern")


def today(name: str) -> str:
    """Return the current name of a weight or a module of a vision-language model."""
    for theirs, ours in RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def rename(config: Any, weights: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Rename an adapter's weights, and the modules that its settings name, if any name is an old one.

    The modules to adapt are then listed one by one, as in the weights: a pattern of old names would match nothing.
    """
    renamed = {today(name): weight for name, weight in weights.items()}
    if renamed.keys() == weights.keys():
        return config, weights
    config.target_modules = sorted({name.partition(".lora_")[0] for name in renamed if ".lora_" in name})
    for key in PATTERNS:
        found = {today(pattern): value for pattern, value in getattr(config, key).items()}
        setattr(config, key, found)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None  # the list covers them
    return config, renamed
