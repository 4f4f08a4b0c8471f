"""The mmproj file for llama.cpp-based engines: vision encoder and projector of a native InternVL."""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from vlm_tune.config.schema import ModelConfig, TileRule
from vlm_tune.data.tiles import find_normalization
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.gguf.text import FILE_TYPES, finish, store
from vlm_tune.model.layouts.internvl.hf import native_config
from vlm_tune.model.vlm import VisionLanguageModel

PROJECTOR = {"layer_norm": "mm.model.mlp.0", "linear_1": "mm.model.mlp.1", "linear_2": "mm.model.mlp.3"}
RMS_SIZES = (3200, 45)  # width and layers of InternViT-6B: by these alone the engines know a norm that is RMSNorm


def write_vision_model(vlm: VisionLanguageModel, model: ModelConfig, path: Path, dtype: str) -> None:
    """Write encoder and projector.

    Raises ConfigError for parts that the engines' InternVL does not have, or pictures cut by another rule.
    """
    check_vision(vlm, model)
    tower: Any = vlm.vision.tower.config
    writer = gguf.GGUFWriter(path, "clip", use_temp_file=True)
    writer.add_type("mmproj")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(gguf.VisionProjectorType.INTERNVL)
    writer.add_vision_projection_dim(vlm.llm.config.hidden_size)
    writer.add_vision_image_size(vlm.tile_size)
    writer.add_vision_patch_size(vlm.vision.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(tower.num_hidden_layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_use_gelu(tower.hidden_act in ("gelu", "gelu_pytorch_tanh"))
    writer.add_vision_projector_scale_factor(vlm.projector.config.shuffle)
    writer.add_vision_preproc_min_tiles(model.tiles.min)
    writer.add_vision_preproc_max_tiles(model.tiles.max)
    mean, std = find_normalization(model.vision.normalize)
    writer.add_vision_image_mean(list(mean))
    writer.add_vision_image_std(list(std))
    for name, weight in vision_tensors(vlm).items():
        store(writer, name, weight, "fp32" if "embd" in name else dtype)
    finish(writer)


def check_vision(vlm: VisionLanguageModel, model: ModelConfig) -> None:
    """Raise ConfigError for what the engines would compute otherwise."""
    tower = native_config(vlm).vision_config  # refuses other encoders and projectors
    problems = []
    if tower.hidden_act not in ("gelu", "gelu_pytorch_tanh", "quick_gelu"):
        problems.append(f"the encoder's activation is {tower.hidden_act}: the engines know gelu and quick_gelu")
    if tower.norm_type == "rms_norm" and (tower.hidden_size, tower.num_hidden_layers) != RMS_SIZES:
        problems.append("the encoder has RMSNorm: the engines expect it of InternViT-6B with all its layers alone")
    if not tower.use_absolute_position_embeddings:
        problems.append("the encoder has no table of positions, and the engines ask for one")
    tiles = model.tiles
    if tiles.max > 1 and (tiles.rule is not TileRule.dynamic or not tiles.thumbnail):
        problems.append(
            f"model.tiles.rule={tiles.rule.value}, thumbnail={str(tiles.thumbnail).lower()}: the engines cut pictures "
            "as InternVL does, with a thumbnail"
        )
    if problems:
        raise ConfigError.from_problems([f"layout=gguf: {problem}" for problem in problems])


def vision_tensors(vlm: VisionLanguageModel) -> dict[str, Tensor]:
    """Name every weight of encoder and projector as the engines do."""
    num_layers = vlm.vision.tower.config.num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, num_layers)
    found: dict[str, Tensor] = {}
    for name, weight in vlm.vision.tower.state_dict().items():
        if name == "embeddings.mask_token":
            continue  # only masked pre-training uses it
        theirs = names.get_name(f"model.vision_tower.{name}", try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ConfigError(f"layout=gguf: the encoder's {name} has no name in the mmproj files of llama.cpp")
        if theirs == "v.position_embd":
            weight = torch.cat([weight[0, 1:], weight[0, :1]])  # (P + 1, C): the class token comes last there
        if theirs == "v.class_embd":
            weight = weight.flatten()
        has_suffix = theirs.endswith((".weight", ".bias")) or theirs == "v.class_embd"
        found[theirs if has_suffix else f"{theirs}.weight"] = weight
    for part, theirs in PROJECTOR.items():
        for name, weight in getattr(vlm.projector, part).state_dict().items():
            found[f"{theirs}.{name}"] = weight
    return found
