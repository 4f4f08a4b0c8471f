"""InternVL's original folder (InternVLChatModel: InternVL 1.5 to 3.5) <-> the model; no code of the folder is run.

InternLM2 becomes a Llama, exactly: its fused attention weights are taken apart. Weights are read tensor by tensor
straight into the dtype and place that they will have.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.data.text.templates import Template
from vlm_tune.data.tiles import find_normalization
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.fill import fill, restore_buffers, tie_head
from vlm_tune.model.layouts.folders import find_folder, model_kind
from vlm_tune.model.layouts.internvl.official_config import (
    KIND,
    projector_config,
    read_config,
    text_config,
    vision_config,
    written_config,
)
from vlm_tune.model.layouts.internvl.official_keys import Entry, Heads, entries
from vlm_tune.model.layouts.loaded import Loaded
from vlm_tune.model.layouts.pretrained import make_empty
from vlm_tune.model.layouts.weights import Shards, write_shards
from vlm_tune.model.parts.llm import guard_4bit, load_tokenizer, quantization
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.quantize import use_quantized_layers
from vlm_tune.model.parts.vision import VisionEncoder, cut_layers, resample_positions
from vlm_tune.model.vlm import ImageTokens, View, VisionLanguageModel

EMBEDDING = "llm.model.embed_tokens.weight"


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Load an original folder; its config.json decides the selected layer and the pixel shuffle.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight.
    """
    config = read_config(folder)
    model.vision.select_layer = config.get("select_layer", -1)
    model.projector = projector_config(config)
    vlm = empty_model(config, model, folder)
    table = original_entries(vlm, config)
    shards = Shards.find(folder)
    shards.compare({entry.original: entry.shape for entry in table}, optional=_optional(vlm, config))
    cut_layers(vlm.vision.tower, model.vision.select_layer)
    if quantize is not Quantize.none:
        use_quantized_layers(vlm.llm, quantization(quantize, dtype))
    fill(vlm, shards, table, dtype)
    tie_head(vlm.llm, shards, _head_key(config))
    restore_buffers(vlm.llm)
    guard_4bit(vlm.llm)
    resample_positions(vlm.vision.tower, model.tiles.size)
    tokenizer, tokens = load_tokenizer(folder), ImageTokens()
    vlm.context_id = _image_token(tokenizer, tokens, vlm, folder)
    if (trained := config.get("template")) and trained != model.template:
        Console().print(f"model.template={model.template}; {folder} names {trained}", highlight=False)
    return Loaded(vlm, tokenizer, tokens)


def empty_model(config: dict[str, Any], model: ModelConfig, folder: Path) -> VisionLanguageModel:
    """Make the whole model without weights, no layer cut off, on the meta device."""
    text = text_config(config, folder)
    with torch.device("meta"):
        tower = make_empty(AutoModel, vision_config(config), attn_implementation=attention.NAME)
        llm = make_empty(AutoModelForCausalLM, text, attn_implementation=attention.NAME)
        vision = VisionEncoder(tower)
        projector = Projector(model.projector, vision.width, text.hidden_size)
    llm.config.use_cache = False
    return VisionLanguageModel(vision, projector, llm, -1, View(model.tiles.size, model.vision.normalize))


def original_entries(vlm: VisionLanguageModel, config: dict[str, Any]) -> list[Entry]:
    """List the original tensors that make up the model."""
    heads = Heads.of(vlm.llm.config) if config["llm_config"]["model_type"] == "internlm2" else None
    return entries({name: tuple(weight.shape) for name, weight in vlm.named_parameters()}, heads)


def _head_key(config: dict[str, Any]) -> str:
    leaf = "output" if config["llm_config"]["model_type"] == "internlm2" else "lm_head"
    return f"language_model.{leaf}.weight"


def _optional(vlm: VisionLanguageModel, config: dict[str, Any]) -> list[str]:
    return [_head_key(config)] if vlm.llm.config.tie_word_embeddings else []


def _image_token(tokenizer: Any, tokens: ImageTokens, vlm: VisionLanguageModel, folder: Path) -> int:
    """Find the id of the image token; every token of the tokenizer must have a row in the table."""
    vocabulary, rows = tokenizer.get_vocab(), vlm.llm.get_input_embeddings().weight.shape[0]
    lacking = [token for token in (tokens.start, tokens.end, tokens.context) if token not in vocabulary]
    if lacking:
        raise CheckpointError(f"{folder}: its tokenizer lacks {', '.join(lacking)}. Copy its tokenizer files anew")
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, the language model's table {rows} rows: the files "
            "are of two models"
        )
    return int(vocabulary[tokens.context])


# ---------------------------------------------------------------------------------------------------------------- out


def save(
    vlm: VisionLanguageModel,
    template: Template,
    model: ModelConfig,
    folder: Path,
    auto_map: bool = False,
    shard: str = "2GB",
) -> None:
    """Write a merged model as an original folder, config and weights, in the dtype that it has.

    The layers that select_layer leaves unused come from the folder that training started from (`model.path`), and so
    does the kind of language model: InternLM2 stays InternLM2. The repository's code is not ours to ship: whoever
    loads the folder by it copies its *.py files there, and needs `auto_map`, which says where a class is.
    Raises ConfigError for a model that InternVLChatModel cannot hold.
    """
    if vlm.projector.config.kind != "mlp":
        raise ConfigError(
            f"layout=official has an MLP with LayerNorm; model.projector.kind={vlm.projector.config.kind}: use "
            "layout=parts"
        )
    base = _base_folder(model)
    started = read_config(base) if base is not None else None
    config = written_config(vlm, template, model, started)
    config.pop("auto_map", None)
    for part in ("vision_config", "llm_config"):
        config[part].pop("auto_map", None)
    if auto_map:
        config["auto_map"] = {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    vlm.llm.generation_config.save_pretrained(folder)
    _write_pictures(model, folder)
    _write_weights(vlm, config, base, folder, shard)
    Console().print(
        "official: InternVL's code is not among the files. Where it must run, copy the *.py files of the original "
        "folder beside them",
        highlight=False,
    )


def _base_folder(model: ModelConfig) -> Path | None:
    """Find the original folder that the model was loaded from, if it was."""
    if model.path is None:
        return None
    folder = find_folder(model.path, "model.path")
    return folder if model_kind(folder) == KIND else None


def _write_weights(
    vlm: VisionLanguageModel, config: dict[str, Any], base: Path | None, folder: Path, shard: str
) -> None:
    weights: dict[str, Tensor] = {name: weight.detach() for name, weight in vlm.named_parameters()}
    table = {entry.original: entry for entry in original_entries(vlm, config)}
    shapes = {key: entry.shape for key, entry in table.items()}
    unused: dict[str, Tensor] = {}
    if base is not None:
        shards = Shards.find(base)
        unused_keys = [key for key in shards.shapes if key.startswith("vision_model.") and key not in table]
        unused = {key: tensor.to(vlm.llm.dtype, copy=True) for key, tensor in shards.read(unused_keys)}
        if vlm.llm.config.tie_word_embeddings and _head_key(config) in shards.shapes:
            unused[_head_key(config)] = weights[EMBEDDING]
        shapes |= {key: tuple(tensor.shape) for key, tensor in unused.items()}

    def read(key: str) -> Tensor:
        if key in unused:
            return unused[key].clone()  # a shard holds no tensor twice
        return table[key].join([weights[name] for name in table[key].ours])

    write_shards(shapes, read, folder, shard)


def _write_pictures(model: ModelConfig, folder: Path) -> None:
    mean, std = find_normalization(model.vision.normalize)
    settings = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": model.tiles.size,
        "crop_size": model.tiles.size,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
