"""transformers' own vision-language classes (InternVL, LLaVA 1.5, LLaVA-NeXT) -> the model."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.errors import CheckpointError
from vlm_tune.model.kernels import attention
from vlm_tune.model.kernels.isolation import check_language_model
from vlm_tune.model.layouts.folders import model_kind
from vlm_tune.model.layouts.found import Loaded, read_found
from vlm_tune.model.layouts.pretrained import empty_llm, load_pretrained, read_settings
from vlm_tune.model.parts.llm import guard_4bit, load_tokenizer, packing, refuse_experts
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions
from vlm_tune.model.vlm import View, VisionLanguageModel

CLASSES: dict[str, Any] = {
    "internvl": InternVLForConditionalGeneration,
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
}
OTHER_PARTS = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]  # these are not packed


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Split a transformers folder into vision encoder, projector and language model."""
    found = read_found(folder, model)
    if quantize is not Quantize.none:
        refuse_experts(empty_llm(read_settings(AutoConfig, folder).text_config), quantize)
    kind, options = CLASSES[model_kind(folder)], packing(quantize, dtype, OTHER_PARTS)
    native = load_pretrained(kind, folder, dtype=dtype, attn_implementation=attention.NAME, **options)
    tower = native.model.vision_tower
    resample_positions(tower, model.tiles.size)
    vision = VisionEncoder(tower, found.select_layer, found.keeps_class)
    projector = Projector(found.projector, vision.width, native.config.text_config.hidden_size)
    newline = {"newline": native.model.image_newline} if found.projector.newline else {}
    projector.load_state_dict(native.model.multi_modal_projector.state_dict() | newline)
    llm = as_causal_lm(native)
    guard_4bit(llm)
    tokenizer, wanted = load_tokenizer(folder), found.tokens.context
    context_id = getattr(native.config, "image_token_index", None)
    if context_id is None:
        context_id = tokenizer.convert_tokens_to_ids(wanted)
    elif (context := tokenizer.convert_ids_to_tokens(int(context_id))) != wanted:
        raise CheckpointError(
            f"{folder}: config.json gives {context_id} as the image token, which is {context!r} in its tokenizer, not "
            f"{wanted}: the folder's files belong to different models"
        )
    view = View(model.tiles.size, found.normalize)
    return Loaded(VisionLanguageModel(vision, projector, llm, int(context_id), view), tokenizer, found)


def as_causal_lm(native: PreTrainedModel) -> PreTrainedModel:
    """Return the native model's text part as a causal language model."""
    config = native.config.text_config
    config.tie_word_embeddings = native.config.tie_word_embeddings
    llm: PreTrainedModel = empty_llm(config)
    llm.model = native.model.language_model
    llm.lm_head = native.lm_head
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft uses a different layer for a quantized one
        setattr(llm, flag, getattr(native, flag, False))
    check_language_model(llm)
    return llm
