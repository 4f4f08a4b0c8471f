"""Random models in InternVL's original layout: small ones to load, published sizes to count."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vlm_tune.config.schema import ModelConfig, TilesConfig
from vlm_tune.model.layouts.internvl.official import empty_model, original_entries
from vlm_tune.model.layouts.weights import write_shards

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_VISION = SIZES | {
    "image_size": 56,
    "patch_size": 14,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}
SMALL_LLM = SIZES | {"num_key_value_heads": 2, "vocab_size": 2509, "tie_word_embeddings": False, "pad_token_id": 3}

MIXTURE = {  # of experts, as in InternVL3.5-30B-A3B
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "rope_theta": 1e6,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def official_config(vision: dict[str, Any], llm: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Write the configuration of an InternVLChatModel."""
    config = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": llm, "select_layer": -1}
    more = {"downsample_ratio": 0.5, "ps_version": "v2", "force_image_size": vision["image_size"]}
    return config | more | {"template": "internvl2_5", "auto_map": {"AutoConfig": "code.Config"}} | changes


def small_model() -> ModelConfig:
    """Name the settings that fit the small models."""
    return ModelConfig(template="internvl2_5", tiles=TilesConfig(size=56, max=2))


def write_official(folder: Path, llm: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a small random folder with this language model."""
    config = official_config(SMALL_VISION, SMALL_LLM | llm, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    vlm = empty_model(config, small_model(), folder)
    shapes = {entry.stored: entry.shape for entry in original_entries(vlm, config)}
    generator = torch.Generator().manual_seed(3)

    def random(key: str) -> torch.Tensor:
        weight = torch.randn(shapes[key], generator=generator) * 0.2
        return (weight + 1 if "norm" in key and key.endswith("weight") else weight).to(dtype)

    write_shards(shapes, random, folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder
