"""The model -> transformers' LLaVA 1.5 and LLaVA-NeXT folders (llava-hf).

A CLIP or SigLIP encoder, two linear layers and any causal LM make such a folder. The names of its weights are those of
the hub's folders: transformers' own classes would write others, which other tools do not know.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import LlavaConfig, LlavaNextConfig

from vlm_tune.config.schema import TilesConfig
from vlm_tune.data.tiles import anyres_grids
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.found import CLASS_TOKENS
from vlm_tune.model.layouts.keys import Names, all_weights
from vlm_tune.model.parts.vision import VisionEncoder
from vlm_tune.model.vlm import VisionLanguageModel

NAMES = (
    Names("vision.tower.", "vision_tower.vision_model."),
    Names("projector.newline", "image_newline"),
    Names("projector.", "multi_modal_projector."),
    Names("llm.", "language_model."),
)


def refuse_misfit(vlm: VisionLanguageModel) -> None:
    """Raise ConfigError for a model whose parts the classes of transformers do not describe."""
    config, projector = vlm.vision.whole_config, vlm.projector.config
    kind = "timm network" if config is None else config.model_type
    reason = ""
    if kind not in CLASS_TOKENS:
        reason = f"an encoder of type {kind}, not {' or '.join(CLASS_TOKENS)}"
    elif projector.kind != "mlp2x_gelu" or projector.shuffle != 1:
        reason = f"a projector of kind={projector.kind}, shuffle={projector.shuffle}, not mlp2x_gelu without shuffle"
    elif kind == "siglip_vision_model" and vlm.vision.select_layer == -1:
        reason = "features behind the final norm of SigLIP (model.vision.select_layer=-1), not those of a layer"
    if reason:
        raise ConfigError(f"layout=llava_hf: the model has {reason}. Use layout=parts")


def native_config(vlm: VisionLanguageModel, tiles: TilesConfig) -> LlavaConfig | LlavaNextConfig:
    """Describe the model as a LLaVA of transformers; raise ConfigError when its parts do not fit that class."""
    refuse_misfit(vlm)
    tower = vlm.vision.whole_config
    assert tower is not None
    text, size = vlm.llm.config, vlm.tile_size
    is_full = vlm.vision.keeps_class or not CLASS_TOKENS[tower.model_type]
    facts: dict[str, Any] = {
        "vision_config": tower.to_dict(),
        "text_config": text.to_dict() | {"vocab_size": vlm.llm.get_input_embeddings().weight.shape[0]},
        "image_token_index": vlm.context_id,
        "image_seq_length": vlm.vision.num_patches(size),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "full" if is_full else "default",
        "vision_feature_layer": feature_layer(vlm.vision),
        "multimodal_projector_bias": vlm.projector.config.bias,
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": vlm.llm.dtype,
    }
    if not vlm.projector.config.newline:
        return LlavaConfig(architectures=["LlavaForConditionalGeneration"], **facts)
    pinpoints = [[rows * size, columns * size] for columns, rows in anyres_grids(tiles)]
    architectures = ["LlavaNextForConditionalGeneration"]
    return LlavaNextConfig(architectures=architectures, image_grid_pinpoints=pinpoints, **facts)


def feature_layer(vision: VisionEncoder) -> int:
    """Return the layer that the projector reads as LLaVA counts it, counted from the end: -2 is the second to last."""
    assert vision.whole_config is not None
    return vision.select_layer - (vision.whole_config.num_hidden_layers + 1) * (vision.select_layer > 0)


def save(vlm: VisionLanguageModel, tiles: TilesConfig, folder: Path, shard: str = "2GB") -> None:
    """Write a merged model as a llava-hf folder, config and weights, in the dtype that it has.

    The encoder's layers after the selected one are written as they came: transformers runs them too.
    """
    config = native_config(vlm, tiles)
    config.save_pretrained(folder)
    vlm.llm.generation_config.save_pretrained(folder)
    save_torch_state_dict(all_weights(vlm, NAMES), folder, max_shard_size=shard)
