"""transformers' LLaVA 1.5 and LLaVA-NeXT folders (llava-hf) <-> the model.

A CLIP or SigLIP encoder, two linear layers and any causal LM make such a folder. The names of its weights are those of
the hub's folders: transformers' own classes would write others, which other tools do not know.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from vlm_tune.config.schema import ModelConfig, Quantize, TilesConfig
from vlm_tune.data.tiles import anyres_grids
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.internvl.hf import OTHER_PARTS, as_causal_lm
from vlm_tune.model.layouts.llava.facts import CLASS_TOKENS, TOKENS, read_hub
from vlm_tune.model.layouts.loaded import Loaded
from vlm_tune.model.layouts.pretrained import load_pretrained
from vlm_tune.model.parts.llm import guard_4bit, load_tokenizer, quantization
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions, whole_weights
from vlm_tune.model.vlm import View, VisionLanguageModel


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Take a llava-hf folder apart into vision encoder, projector and language model."""
    facts = read_hub(folder, model)
    native = _load_native(folder, model.projector.newline, dtype, quantize)
    tower = native.model.vision_tower
    resample_positions(tower, model.tiles.size)
    vision = VisionEncoder(tower, facts.select_layer, facts.keeps_class)
    projector = Projector(model.projector, vision.width, native.config.text_config.hidden_size)
    weights = native.model.multi_modal_projector.state_dict()
    if model.projector.newline:
        weights["newline"] = native.model.image_newline
    projector.load_state_dict(weights)
    llm = as_causal_lm(native)
    guard_4bit(llm)
    tokenizer, context_id = load_tokenizer(folder), int(native.config.image_token_index)
    context = tokenizer.convert_ids_to_tokens(context_id)
    if context != TOKENS.context:
        raise CheckpointError(
            f"{folder}: config.json gives {context_id} as the image token, which is {context!r} in its tokenizer, not "
            f"{TOKENS.context}: the folder's files belong to different models"
        )
    view = View(model.tiles.size, model.vision.normalize)
    return Loaded(VisionLanguageModel(vision, projector, llm, context_id, view), tokenizer, TOKENS)


def _load_native(folder: Path, is_next: bool, dtype: torch.dtype, quantize: Quantize) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if quantize is not Quantize.none:
        options["quantization_config"] = quantization(quantize, dtype, OTHER_PARTS)
    kind: Any = LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration
    native, found = load_pretrained(
        kind,
        folder,
        dtype=dtype,
        attn_implementation=attention.NAME,
        output_loading_info=True,
        **options,
    )
    wrong = {name: sorted(found[f"{name}_keys"]) for name in ("missing", "unexpected")}
    if any(wrong.values()):
        listed = "\n  ".join(f"{how}: {name}" for how, names in wrong.items() for name in names[:10])
        raise CheckpointError(f"{folder}: its weights are not those of its config.json\n  {listed}\n  Copy it again")
    assert isinstance(native, PreTrainedModel)
    return native


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
    """Name the layer that the projector reads as LLaVA does, counted from the end: -2 is the last but one."""
    assert vision.whole_config is not None
    return vision.select_layer - (vision.whole_config.num_hidden_layers + 1) * (vision.select_layer > 0)


def save(vlm: VisionLanguageModel, tiles: TilesConfig, folder: Path, shard: str = "2GB") -> None:
    """Write a merged model as a llava-hf folder, config and weights, in the dtype that it has.

    The encoder's layers after the selected one are written as they came: transformers runs them too.
    """
    config = native_config(vlm, tiles)
    config.save_pretrained(folder)
    vlm.llm.generation_config.save_pretrained(folder)
    save_torch_state_dict(hub_weights(vlm), folder, max_shard_size=shard)


def hub_weights(vlm: VisionLanguageModel) -> dict[str, Tensor]:
    """Name all weights as the hub's folders do."""
    weights = {f"vision_tower.vision_model.{name}": weight for name, weight in whole_weights(vlm.vision).items()}
    for name, weight in vlm.projector.state_dict().items():
        weights["image_newline" if name == "newline" else f"multi_modal_projector.{name}"] = weight
    is_tied = vlm.llm.config.tie_word_embeddings
    for name, weight in vlm.llm.state_dict().items():
        if not (is_tied and name == "lm_head.weight"):
            weights[f"language_model.{name}"] = weight
    return weights
