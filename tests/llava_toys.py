"""LLaVA folders of a few thousand random weights, written by plain transformers, with its own processor."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from toys import TOKENIZER
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)

SIZE, PATCH = 56, 14  # 4 x 4 patches
VOCABULARY = 2880  # a multiple of 64 above the tokenizer's tokens, as llava-hf pads it
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
TEXT |= {"num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 4096}


def llava_config(is_next: bool, vision: str, text: str, **changes: Any) -> Any:
    """Describe a LLaVA of small parts."""
    facts: dict[str, Any] = {
        "vision_config": AutoConfig.for_model(vision, **TOWER, image_size=SIZE, patch_size=PATCH),
        "text_config": AutoConfig.for_model(text, **TEXT, vocab_size=VOCABULARY, pad_token_id=0),
        "image_token_index": len(AutoTokenizer.from_pretrained(TOKENIZER)),
        "vision_feature_select_strategy": "default" if vision.startswith("clip") else "full",
    }
    if is_next:
        return LlavaNextConfig(**facts | {"image_grid_pinpoints": PINPOINTS} | changes)
    return LlavaConfig(**facts | changes)


def save_llava(
    folder: Path, is_next: bool = False, vision: str = "clip_vision_model", text: str = "llama", **changes: Any
) -> PreTrainedModel:
    """Write a folder as transformers does, model and processor; return the plain model."""
    config = llava_config(is_next, vision, text, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = (LlavaNextForConditionalGeneration if is_next else LlavaForConditionalGeneration)(config).eval()
        for weight in model.parameters():
            weight.data += torch.randn_like(weight) * 0.1
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    square = {"height": SIZE, "width": SIZE}
    pictures: Any = CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False)
    if is_next:
        pictures = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size=square, image_grid_pinpoints=PINPOINTS
        )
    (LlavaNextProcessor if is_next else LlavaProcessor)(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(vision.startswith("clip")),
        image_token="<image>",
    ).save_pretrained(folder)
    return model


RENAMED = {  # llava-hf -> LLaVA
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "language_model.": "",
    "image_newline": "model.image_newline",
}


def rename(name):
    old = next(old for old in RENAMED if name.startswith(old))
    return RENAMED[old] + name.removeprefix(old)


def write_original(folder, is_next=False, text="llama", has_vision=True, as_bin=False, **changes):
    """Write LLaVA's layout of a model that is also written in llava-hf's: (folder/original, folder/hub)."""
    hub, original = folder / "hub", folder / "original"
    plain = save_llava(hub, is_next, text=text)
    plain.model.vision_tower.save_pretrained(original / "clip")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(original)
    num_rows = len(tokenizer)  # Vicuna's table has no row for pictures
    weights = {rename(name): weight for name, weight in load_file(hub / "model.safetensors").items()}
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[table] = weights[table][:num_rows].clone()
    if not has_vision:
        weights = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
    if as_bin:
        torch.save(weights, original / "pytorch_model.bin")
    else:
        save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    own = {"architectures": [{"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}[text]]}
    own |= {"mm_vision_tower": "clip", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    own |= {"model_type": "llava", "mm_vision_select_feature": "patch", "mm_hidden_size": TOWER["hidden_size"]}
    own |= {"image_aspect_ratio": "anyres" if is_next else "pad", "tune_mm_mlp_adapter": False}
    own |= {"mm_patch_merge_type": "spatial_unpad" if is_next else "flat", "vocab_size": num_rows}
    (original / "config.json").write_text(json.dumps(TEXT | own | {"pad_token_id": 0} | changes))
    return original, hub
