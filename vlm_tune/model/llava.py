"""What the config.json of a LLaVA folder says, of either layout; its weights are not read."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from vlm_tune.config.schema import ModelConfig, ProjectorConfig, TileRule
from vlm_tune.errors import ConfigError
from vlm_tune.model.vlm import ImageTokens

HUB_KINDS = ("llava", "llava_next")  # transformers' own classes
ORIGINAL = "llava_original"  # haotian-liu/LLaVA: mm_projector, mm_vision_tower
TOKENS = ImageTokens(context="<image>", start="", end="", video="")  # the token itself, repeated
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # in front of the patches


def image_tokens(projector: ProjectorConfig) -> ImageTokens:
    """Choose how pictures stand in the text: as in LLaVA behind LLaVA's projectors, else as in InternVL."""
    return TOKENS if projector.kind in ("linear", "mlp2x_gelu") else ImageTokens()


class VisionFacts(NamedTuple):
    """Which of a tower's outputs the projector reads."""

    select_layer: int
    keeps_class: bool
    patch_size: int

    def num_patches(self, tile_size: int) -> int:
        """Count the features of a tile."""
        return (tile_size // self.patch_size) ** 2 + self.keeps_class


def read_hub(folder: Path, model: ModelConfig) -> VisionFacts:
    """Read a llava-hf folder's config.json, and set the model's projector and layer by it.

    Raise ConfigError for what the classes of transformers could do and no known LLaVA does.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    layer, kind = config.vision_feature_layer, config.vision_config.model_type
    if not isinstance(layer, int):
        raise ConfigError(f"{folder}: vision_feature_layer={layer} joins several layers, which is not built")
    if config.projector_hidden_act != "gelu":
        raise ConfigError(f"{folder}: projector_hidden_act={config.projector_hidden_act}; only gelu is built")
    if kind not in CLASS_TOKENS:
        raise ConfigError(f"{folder}: a {kind} as encoder; a LLaVA folder has one of {', '.join(CLASS_TOKENS)}")
    is_full = config.vision_feature_select_strategy == "full"
    if not is_full and not CLASS_TOKENS[kind]:
        raise ConfigError(
            f"{folder}: vision_feature_select_strategy=default would drop the first patch of a {kind}, which has no "
            'class token. Set it to "full" in config.json, and train anew if it was trained that way'
        )
    keeps_class = is_full and bool(CLASS_TOKENS[kind])
    is_next = config.model_type == "llava_next"
    if is_next and keeps_class:
        raise ConfigError(f"{folder}: any-resolution pictures with class tokens between their tiles cannot be laid out")
    model.projector = ProjectorConfig(
        kind="mlp2x_gelu", shuffle=1, bias=config.multimodal_projector_bias, newline=is_next
    )
    require_anyres(model, folder)
    # hidden states are counted from the last layer's own output: -1 is not yet normed
    layer = config.vision_config.num_hidden_layers if layer == -1 else layer
    model.vision.select_layer = layer
    return VisionFacts(layer, keeps_class, config.vision_config.patch_size)


def require_anyres(model: ModelConfig, folder: Path) -> None:
    """Raise ConfigError where pictures are cut in another way than the rows of their tokens need."""
    if model.projector.newline and model.tiles.rule is not TileRule.anyres:
        raise ConfigError(
            f"{folder} is a LLaVA-NeXT, whose pictures are cut by model.tiles.rule=anyres, but it is "
            f"{model.tiles.rule.value}: take model=llava_next_7b, or set model.tiles.rule=anyres"
        )


def is_original(config: dict[str, Any]) -> bool:
    """Tell the layout of haotian-liu/LLaVA from transformers' own, which has the same model_type."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def read_json(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
