"""transformers' native InternVL folder <-> the model.

Any vision transformer that `InternVLVisionModel` can hold, pixel shuffle v2, an MLP and any causal LM make such a
folder; plain transformers loads it with no code of ours.
"""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
)

from vlm_tune.config.schema import ModelConfig, ProjectorConfig, Quantize
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.kernels.isolation import check_language_model
from vlm_tune.model.layouts.loaded import Loaded
from vlm_tune.model.layouts.pretrained import load_pretrained, make_empty, read_settings
from vlm_tune.model.parts.llm import guard_4bit, load_tokenizer, quantization
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions
from vlm_tune.model.vlm import ImageTokens, View, VisionLanguageModel

OTHER_PARTS = [
    "model.vision_tower",
    "model.multi_modal_projector",
    "lm_head",
]  # of a packed model: these stay in 16 bit


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Take a native folder apart into vision encoder, projector and language model."""
    config = read_settings(AutoConfig, folder)
    options = (
        {"quantization_config": quantization(quantize, dtype, OTHER_PARTS)} if quantize is not Quantize.none else {}
    )
    native = load_pretrained(
        InternVLForConditionalGeneration, folder, dtype=dtype, attn_implementation=attention.NAME, **options
    )
    tower = native.model.vision_tower
    resample_positions(tower, model.tiles.size)
    layer = config.vision_feature_layer
    vision = VisionEncoder(tower, layer if isinstance(layer, int) else -1)
    shuffle = round(1 / config.downsample_ratio)
    model.projector = ProjectorConfig(kind="mlp", shuffle=shuffle, shuffle_version="v2")
    projector = Projector(model.projector, vision.width, config.text_config.hidden_size)
    projector.load_state_dict(native.model.multi_modal_projector.state_dict())
    llm = as_causal_lm(native)
    guard_4bit(llm)
    tokenizer, tokens = load_tokenizer(folder), ImageTokens()
    context_id = tokenizer.convert_tokens_to_ids(tokens.context)
    view = View(model.tiles.size, model.vision.normalize)
    return Loaded(VisionLanguageModel(vision, projector, llm, context_id, view), tokenizer, tokens)


def as_causal_lm(native: PreTrainedModel) -> PreTrainedModel:
    """Give the native model's text part the class of a language model of its own."""
    config = native.config.text_config
    config.tie_word_embeddings = native.config.tie_word_embeddings
    with torch.device("meta"):
        llm = make_empty(AutoModelForCausalLM, config, attn_implementation=attention.NAME)
    llm.model = native.model.language_model
    llm.lm_head = native.lm_head
    llm.config.use_cache = False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft puts another layer beside a packed one
        setattr(llm, flag, getattr(native, flag, False))
    check_language_model(llm)
    return llm


def native_config(vlm: VisionLanguageModel) -> InternVLConfig:
    """Describe the model as a native InternVL; raise when its parts do not fit that class."""
    tower_config = getattr(vlm.vision.tower, "config", None)
    if tower_config is None or tower_config.model_type != "internvl_vision":
        raise ConfigError(
            "layout=hf stores a native InternVL, whose encoder is an internvl_vision transformer; this model's is "
            f"{getattr(tower_config, 'model_type', 'a timm network')}. Use layout=parts"
        )
    projector = vlm.projector.config
    if projector.kind != "mlp" or projector.shuffle_version != "v2":
        raise ConfigError(
            f"layout=hf knows pixel shuffle v2 and an MLP with LayerNorm; this model has kind={projector.kind}, "
            f"shuffle_version={projector.shuffle_version}. Use layout=parts"
        )
    text = vlm.llm.config
    side = vlm.vision.num_patches(tower_config.image_size[0])
    return InternVLConfig(
        vision_config=tower_config.to_dict(),
        text_config=text.to_dict(),
        image_token_id=vlm.context_id,
        image_seq_length=side // projector.shuffle**2,
        downsample_ratio=1 / projector.shuffle,
        vision_feature_layer=-1,  # the layers after the selected one are not stored
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def save(vlm: VisionLanguageModel, folder: Path, shard: str = "2GB") -> None:
    """Write a merged model as a native folder, config and weights, in the dtype that it has."""
    config = native_config(vlm)
    with torch.device("meta"):
        native = InternVLForConditionalGeneration(config)
    native.model.vision_tower = vlm.vision.tower
    native.model.language_model = vlm.llm.get_decoder()
    native.lm_head = vlm.llm.get_output_embeddings()
    shell = native.model.multi_modal_projector.to_empty(device=vlm.device).to(vlm.projector.linear_1.weight.dtype)
    shell.load_state_dict(vlm.projector.state_dict())
    native.config.dtype = vlm.llm.dtype
    native.generation_config = vlm.llm.generation_config
    native.save_pretrained(folder, max_shard_size=shard)
