"""What the config.json of a LLaVA folder says, of either layout; its weights are not read."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from vlm_tune.config.schema import ModelConfig, ProjectorConfig, TileRule
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, find_folder, model_kind, read_json
from vlm_tune.model.layouts.pretrained import read_settings
from vlm_tune.model.vlm import ImageTokens

LLAVA_KINDS = ("llava", "llava_next", LLAVA_ORIGINAL)  # transformers' own classes, and haotian-liu/LLaVA's
TOKENS = ImageTokens(context="<image>", start="", end="", video="")  # the token itself, repeated
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # in front of the patches


def image_tokens(projector: ProjectorConfig) -> ImageTokens:
    """Choose how pictures stand in the text: as in LLaVA behind LLaVA's projectors, else as in InternVL."""
    return TOKENS if projector.kind in ("linear", "mlp2x_gelu") else ImageTokens()


def read_llava(folder: Path, model: ModelConfig) -> "VisionFacts":
    """Read a LLaVA folder of either layout."""
    return (read_original if model_kind(folder) == LLAVA_ORIGINAL else read_hub)(folder, model)


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
    config: Any = read_settings(AutoConfig, folder)
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


def read_original(folder: Path, model: ModelConfig) -> VisionFacts:
    """Read the config.json of haotian-liu/LLaVA's own layout, and set the model's projector and layer by it.

    Raise ConfigError for what that project knows and this one does not build.
    """
    config = read_json(folder)
    kind = config.get("mm_projector_type", "linear")
    if kind not in ("linear", "mlp2x_gelu"):
        raise ConfigError(f"{folder}: mm_projector_type={kind}; linear and mlp2x_gelu are built")
    if config.get("mm_use_im_start_end"):
        raise ConfigError(f"{folder}: mm_use_im_start_end=true puts tokens around pictures, which is not built")
    aspect, merge = config.get("image_aspect_ratio", "square"), config.get("mm_patch_merge_type", "flat")
    if merge not in ("flat", "spatial_unpad") or aspect not in ("square", "pad", "anyres"):
        raise ConfigError(
            f"{folder}: image_aspect_ratio={aspect}, mm_patch_merge_type={merge}; square, pad and anyres with flat or "
            "spatial_unpad are built"
        )
    newline = merge == "spatial_unpad" and aspect == "anyres"
    model.projector = ProjectorConfig(kind=kind, shuffle=1, newline=newline)
    require_anyres(model, folder)
    model.vision.select_layer = int(config.get("mm_vision_select_layer", -2))
    keeps_class = config.get("mm_vision_select_feature", "patch") == "cls_patch"
    tower = tower_config(vision_folder(folder, config, model, with_weights=False))
    if tower.model_type != "clip_vision_model":
        raise ConfigError(f"{folder}: mm_vision_tower is a {tower.model_type}; LLaVA's own layout has CLIP")
    if model.vision.select_layer == -1:
        model.vision.select_layer = tower.num_hidden_layers
    return VisionFacts(model.vision.select_layer, keeps_class, tower.patch_size)


def vision_folder(folder: Path, config: dict[str, Any], model: ModelConfig, with_weights: bool = True) -> Path:
    """Find the encoder that an original folder names: model.vision.path, a folder inside or beside it, a hub id."""
    if model.vision.path is not None:
        return find_folder(model.vision.path, "model.vision.path", with_weights)
    name = str(config.get("mm_vision_tower"))
    if (folder / name / "config.json").is_file():
        return folder / name
    return find_folder(name, f"{folder}/config.json: mm_vision_tower", with_weights)


def tower_config(folder: Path) -> Any:
    """Read the configuration of an encoder, which may stand beside a text tower."""
    config: Any = read_settings(AutoConfig, folder)
    return getattr(config, "vision_config", config)


def require_anyres(model: ModelConfig, folder: Path) -> None:
    """Raise ConfigError where pictures are cut in another way than the rows of their tokens need."""
    if model.projector.newline and model.tiles.rule is not TileRule.anyres:
        raise ConfigError(
            f"{folder} is a LLaVA-NeXT, whose pictures are cut by model.tiles.rule=anyres, but it is "
            f"{model.tiles.rule.value}: take model=llava_next_7b, or set model.tiles.rule=anyres"
        )
