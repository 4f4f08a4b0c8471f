"""The model -> transformers' native InternVL folder.

Any vision transformer that `InternVLVisionModel` can hold, pixel shuffle v2, an MLP and any causal LM make such a
folder; plain transformers loads it with no code of ours.
"""

from pathlib import Path

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from vlm_tune.errors import ConfigError
from vlm_tune.model.vlm import VisionLanguageModel


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
