"""What the small files of a model's folder say about it; this overrides the configuration. No weights are read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedTokenizerBase

from vlm_tune.config.schema import ModelConfig, ProjectorConfig, TileRule
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.layouts.folder_files import read_object
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, PARTS_SETTINGS, find_folder, model_kind, read_json
from vlm_tune.model.layouts.internvl.official_config import KIND, projector_config, read_config
from vlm_tune.model.layouts.pretrained import read_settings
from vlm_tune.model.vlm import ImageTokens, VisionLanguageModel

LLAVA_TOKENS = ImageTokens(context="<image>", start="", end="", video="")  # the token itself, repeated
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # in front of the patches


@dataclass(frozen=True)
class Found:
    """What a folder decides: what joins its parts, and which of the encoder's outputs the projector reads."""

    projector: ProjectorConfig
    select_layer: int
    normalize: str
    keeps_class: bool = False
    patch_size: int | None = None  # None: that of the encoder's config.json
    template: str | None = None  # the one it was trained with

    @classmethod
    def given(cls, model: ModelConfig) -> "Found":
        """Take the user's own settings: two separate parts decide nothing."""
        return cls(model.projector, model.vision.select_layer, model.vision.normalize)

    @property
    def tokens(self) -> ImageTokens:
        """How pictures are written in the text: as in LLaVA behind LLaVA's projectors, else as in InternVL."""
        return LLAVA_TOKENS if self.projector.kind in ("linear", "mlp2x_gelu") else ImageTokens()

    def over(self, model: ModelConfig) -> ModelConfig:
        """Override a user's settings with it."""
        vision = replace(model.vision, select_layer=self.select_layer, normalize=self.normalize)
        return replace(model, projector=self.projector, vision=vision)


class Loaded(NamedTuple):
    """What a layout's `load` returns: a model, its tokenizer, what its folder said, and what its user should know."""

    vlm: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    found: Found
    notes: tuple[str, ...] = ()


def read_found(folder: Path, model: ModelConfig) -> Found:
    """Read a whole checkpoint's small files; a user's settings decide what they leave open.

    Raises ConfigError for a kind of folder that is not read, and for what its kind knows and is not built here.
    """
    return READERS[layout_of(folder)](folder, model)


def layout_of(folder: Path) -> str:
    """Read which layout a whole checkpoint has; raise ConfigError for one that is not read."""
    kind = model_kind(folder)
    if kind not in READERS:
        raise ConfigError(
            f"model.path={folder}: a folder of type {kind}, which is not read. There are: {', '.join(READERS)}. "
            "A vision encoder and a language model also join as parts: set model.vision.path and model.llm.path"
        )
    return kind


def _read_parts(folder: Path, model: ModelConfig) -> Found:
    settings = read_object(folder / PARTS_SETTINGS)
    try:
        projector, keeps_class = ProjectorConfig(**settings["projector"]), bool(settings.get("keeps_class", False))
        return Found(projector, settings["select_layer"], settings["normalize"], keeps_class)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / PARTS_SETTINGS}: not what `export` writes ({error}). Copy it anew") from error


def _read_internvl(folder: Path, model: ModelConfig) -> Found:
    config: Any = read_settings(AutoConfig, folder)
    layer = config.vision_feature_layer
    projector = ProjectorConfig(kind="mlp", shuffle=round(1 / config.downsample_ratio), shuffle_version="v2")
    return Found(projector, layer if isinstance(layer, int) else -1, model.vision.normalize)


def _read_internvl_chat(folder: Path, model: ModelConfig) -> Found:
    config = read_config(folder)
    layer, template = config.get("select_layer", -1), config.get("template")
    return Found(projector_config(config), layer, model.vision.normalize, template=template)


def _read_llava(folder: Path, model: ModelConfig) -> Found:
    """Read a llava-hf folder; raise ConfigError for what transformers' classes could do and no known LLaVA does."""
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
    bias = config.multimodal_projector_bias
    projector = ProjectorConfig(kind="mlp2x_gelu", shuffle=1, bias=bias, newline=is_next)
    return _found_llava(folder, model, projector, (layer, keeps_class), config.vision_config)


def _read_llava_original(folder: Path, model: ModelConfig) -> Found:
    """Read haotian-liu/LLaVA's own config.json; raise ConfigError for what that project knows and is not built here."""
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
    layer, features = int(config.get("mm_vision_select_layer", -2)), config.get("mm_vision_select_feature", "patch")
    tower = tower_config(vision_folder(folder, config, model, with_weights=False))
    if tower.model_type != "clip_vision_model":
        raise ConfigError(f"{folder}: mm_vision_tower is a {tower.model_type}; LLaVA's own layout has CLIP")
    projector = ProjectorConfig(kind=kind, shuffle=1, newline=merge == "spatial_unpad" and aspect == "anyres")
    return _found_llava(folder, model, projector, (layer, features == "cls_patch"), tower)


def _found_llava(
    folder: Path, model: ModelConfig, projector: ProjectorConfig, read: tuple[int, bool], tower: Any
) -> Found:
    """Join what both LLaVA layouts say; `read` are the layer of the encoder and whether its class token counts.

    Raises ConfigError where pictures are cut in another way than the rows of their tokens need.
    """
    if projector.newline and model.tiles.rule is not TileRule.anyres:
        raise ConfigError(
            f"{folder} is a LLaVA-NeXT, whose pictures are cut by model.tiles.rule=anyres, but it is "
            f"{model.tiles.rule.value}: take model=llava_next_7b, or set model.tiles.rule=anyres"
        )
    # hidden states are counted from the last layer's own output: -1 is not yet normed
    layer = tower.num_hidden_layers if read[0] == -1 else read[0]
    return Found(projector, layer, model.vision.normalize, read[1], tower.patch_size)


READERS = {  # by what `model_kind` says of a folder
    "parts": _read_parts,
    "internvl": _read_internvl,
    KIND: _read_internvl_chat,
    "llava": _read_llava,
    "llava_next": _read_llava,
    LLAVA_ORIGINAL: _read_llava_original,
}


def vision_folder(folder: Path, config: dict[str, Any], model: ModelConfig, with_weights: bool = True) -> Path:
    """Find the encoder that an original LLaVA names: model.vision.path, a folder inside or next to it, a hub id."""
    if model.vision.path is not None:
        return find_folder(model.vision.path, "model.vision.path", with_weights)
    name = str(config.get("mm_vision_tower"))
    if (folder / name / "config.json").is_file():
        return folder / name
    return find_folder(name, f"{folder}/config.json: mm_vision_tower", with_weights)


def tower_config(folder: Path) -> Any:
    """Read the configuration of an encoder, which may be stored together with a text tower."""
    config: Any = read_settings(AutoConfig, folder)
    return getattr(config, "vision_config", config)
