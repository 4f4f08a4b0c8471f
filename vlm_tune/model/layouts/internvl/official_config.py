"""config.json of InternVL's original layout <-> transformers' configurations.

The file was written by the repository's own classes: what is missing in it has their defaults, not transformers'.
Sources: InternVL `configuration_internvl_chat.py`, `configuration_intern_vit.py`, `configuration_internlm2.py`.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import (
    InternVLVisionConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from vlm_tune.config.schema import ModelConfig, ProjectorConfig, TileRule
from vlm_tune.data.text.templates import Template, load_template
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.layouts.folders import read_json
from vlm_tune.model.vlm import VisionLanguageModel

KIND = "internvl_chat"
TEXT_CONFIGS: dict[str, Any] = {
    "internlm2": LlamaConfig,  # the same arithmetic, its weights stored otherwise
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "phi3": Phi3Config,
}
TEMPLATES = ("internvl2_5", "Hermes-2", "internlm2-chat", "phi3-chat")  # of InternVL's conversation.py
UNDECLARED = {"rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim"}  # some classes take these all the same
VISION_KEYS = {  # ours: theirs, their default
    "hidden_size": ("hidden_size", 3200),
    "intermediate_size": ("intermediate_size", 12800),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "num_attention_heads": ("num_attention_heads", 25),
    "num_channels": ("num_channels", 3),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "attention_bias": ("qkv_bias", False),
    "use_qk_norm": ("qk_normalization", True),
    "attention_dropout": ("attention_dropout", 0.0),
    "hidden_dropout_prob": ("dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "layer_scale_init_value": ("initializer_factor", 0.1),
}


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is; no configuration class of the folder is asked.

    Raises CheckpointError where it is not of this layout, or its adapters were never merged.
    """
    config = read_json(folder)
    for key in ("vision_config", "llm_config"):
        if not isinstance(config.get(key), dict):
            raise CheckpointError(f"{folder}/config.json: {key} is missing: it is no whole InternVLChatModel folder")
    for key in ("use_backbone_lora", "use_llm_lora"):
        if config.get(key):
            raise CheckpointError(
                f"{folder}/config.json: {key}={config[key]}, its weights hold adapters beside the base. Merge them "
                "first with tools/merge_lora.py of the InternVL repository"
            )
    return config


def vision_config(config: dict[str, Any]) -> InternVLVisionConfig:
    """Describe the encoder: InternViT-300M (LayerNorm, biases) or 6B (RMSNorm, normalised queries and keys)."""
    theirs = config["vision_config"]
    found = InternVLVisionConfig(**{ours: theirs.get(key, default) for ours, (key, default) in VISION_KEYS.items()})
    if found.use_qk_norm and found.layer_norm_eps != 1e-6:
        raise CheckpointError(
            f"vision_config: layer_norm_eps={found.layer_norm_eps} with qk_normalization: transformers' InternViT "
            "normalises queries and keys with 1e-6 only"
        )
    return found


def text_config(config: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """Describe the language model by transformers' own class."""
    theirs: dict[str, Any] = config["llm_config"]
    kind = theirs.get("model_type")
    if kind not in TEXT_CONFIGS:
        raise CheckpointError(
            f"{folder}/config.json: llm_config.model_type={kind} is not read. There are: {', '.join(TEXT_CONFIGS)}"
        )
    known = {*TEXT_CONFIGS[kind].__annotations__, *UNDECLARED}
    chosen = {key: deepcopy(value) for key, value in theirs.items() if key in known}  # transformers writes into some
    if kind == "internlm2":
        chosen |= {"attention_bias": theirs.get("bias", True), "mlp_bias": False}
    return TEXT_CONFIGS[kind](**chosen)  # type: ignore[no-any-return]


def projector_config(config: dict[str, Any]) -> ProjectorConfig:
    """Describe pixel shuffle and MLP; a config.json that names no version is of the first InternVL 1.5."""
    shuffle = round(1 / config.get("downsample_ratio", 0.5))
    return ProjectorConfig(kind="mlp", shuffle=shuffle, shuffle_version=config.get("ps_version", "v1"))


def written_config(
    vlm: VisionLanguageModel, template: Template, model: ModelConfig, base: dict[str, Any] | None
) -> dict[str, Any]:
    """Describe a model as an InternVLChatModel: what it started from, brought up to date, or all of it again."""
    side = model.tiles.size
    config: dict[str, Any] = deepcopy(base) if base is not None else _new_config(vlm)
    config["vision_config"]["image_size"] = side  # the table of positions was resized to it when it was loaded
    config["llm_config"]["vocab_size"] = vlm.llm.get_input_embeddings().weight.shape[0]
    dtype = str(vlm.llm.dtype).removeprefix("torch.")
    config["torch_dtype"] = config["llm_config"]["torch_dtype"] = dtype
    config |= {
        "force_image_size": side,
        "template": official_template(template),
        "ps_version": vlm.projector.config.shuffle_version,
        "downsample_ratio": 1 / vlm.projector.config.shuffle,
        **_tile_settings(model),
    }
    if model.system is not None:
        config["system_message"] = model.system
    return config


def official_template(template: Template) -> str:
    """Name the template of InternVL's own that writes the same text; the system prompt is written next to it.

    Raises ConfigError where there is none.
    """

    def text(each: Template) -> tuple[str, ...]:
        return each.system, each.no_system, each.user, each.first_user, each.assistant, each.end, each.after

    names = [template.name, *TEMPLATES]
    same = [name for name in names if name in TEMPLATES and text(load_template(name)) == text(template)]
    if not same:
        raise ConfigError(
            f"layout=official: InternVL has no template like model.template={template.name}. Its own are "
            f"{', '.join(TEMPLATES)}: use layout=hf, which carries any template"
        )
    return same[0]


def _tile_settings(model: ModelConfig) -> dict[str, Any]:
    tiles = model.tiles
    if model.vision.normalize != "imagenet":
        raise ConfigError(
            f"layout=official: InternVL shows pictures as model.vision.normalize=imagenet, this model was trained with "
            f"{model.vision.normalize}: use layout=hf or parts"
        )
    if tiles.rule in (TileRule.area, TileRule.anyres) and tiles.max > 1:
        raise ConfigError(f"layout=official: InternVL has no tile rule {tiles.rule.value}: use layout=parts")
    return {
        "dynamic_image_size": tiles.rule is TileRule.dynamic and tiles.max > 1,
        "use_thumbnail": tiles.thumbnail,
        "min_dynamic_patch": tiles.min,
        "max_dynamic_patch": tiles.max,
        "pad2square": tiles.rule is TileRule.pad,
    }


def _new_config(vlm: VisionLanguageModel) -> dict[str, Any]:
    tower: Any = vlm.vision.tower
    if getattr(getattr(tower, "config", None), "model_type", None) != "internvl_vision":
        raise ConfigError(
            f"layout=official stores an InternViT; this model's encoder is a {type(tower).__name__}. Use layout=parts"
        )
    vision = {theirs: getattr(tower.config, ours) for ours, (theirs, _) in VISION_KEYS.items()}
    vision |= {key: vision[key][0] for key in ("image_size", "patch_size")}
    return {
        "model_type": KIND,
        "architectures": ["InternVLChatModel"],
        "vision_config": vision | {"model_type": "intern_vit_6b", "drop_path_rate": 0.0, "use_flash_attn": True},
        "llm_config": _new_text_config(vlm.llm),
        "select_layer": -1,
        "tie_word_embeddings": vlm.llm.config.tie_word_embeddings,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
    }


def _new_text_config(llm: PreTrainedModel) -> dict[str, Any]:
    """Write a text configuration as transformers 4 reads it: rope_theta and rope_scaling in place of one table."""
    kind = llm.config.model_type
    if kind not in TEXT_CONFIGS:
        raise ConfigError(
            f"layout=official: InternVL has no {kind} language model. It has {', '.join(TEXT_CONFIGS)}: use layout=hf"
        )
    config = {key: value for key, value in llm.config.to_diff_dict().items() if not key.startswith("_")}
    config |= {key: getattr(llm.config, key) for key in TEXT_CONFIGS[kind].__annotations__}
    rope = dict(config.pop("rope_parameters", None) or {})
    config.pop("layer_types", None)
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind_of_rope = rope.pop("rope_type", "default")
    config["rope_scaling"] = None if kind_of_rope == "default" else {"type": kind_of_rope, **rope}
    config.pop("dtype", None)
    return config | {"model_type": kind, "architectures": [type(llm).__name__]}
