"""InternVL's original folder (InternVLChatModel: InternVL 1.5 to 3.5) <-> the model; no code of the folder is run.

InternLM2 becomes a Llama, exactly: its fused attention weights are taken apart. Weights are read tensor by tensor
straight into the dtype and place that they will have.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.data.text.templates import Template
from vlm_tune.data.tiles import find_normalization
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.layouts.folders import find_folder, model_kind
from vlm_tune.model.layouts.found import Loaded, read_found
from vlm_tune.model.layouts.internvl.official_config import (
    KIND,
    read_config,
    text_config,
    vision_config,
    written_config,
)
from vlm_tune.model.layouts.internvl.official_names import official_names
from vlm_tune.model.layouts.keys import HEAD, Entry, Names, entries, fill, stored_name
from vlm_tune.model.layouts.pretrained import empty_llm, make_empty
from vlm_tune.model.layouts.weights import Shards, write_shards
from vlm_tune.model.parts.llm import load_tokenizer
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions
from vlm_tune.model.vlm import ImageTokens, View, VisionLanguageModel

EMBEDDING = "llm.model.embed_tokens.weight"


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Load an original folder; its config.json decides the selected layer and the pixel shuffle.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight.
    """
    config, found = read_config(folder), read_found(folder, model)
    model = found.over(model)
    vlm = empty_model(config, model, folder)
    fill(vlm, folder, _names(vlm, config), (dtype, quantize), found.select_layer)
    resample_positions(vlm.vision.tower, model.tiles.size)
    tokenizer = load_tokenizer(folder)
    vlm.context_id = _image_token(tokenizer, found.tokens, vlm, folder)
    is_other = found.template and found.template != model.template
    notes = (f"model.template={model.template}; {folder} names {found.template}",) if is_other else ()
    return Loaded(vlm, tokenizer, found, notes)


def empty_model(config: dict[str, Any], model: ModelConfig, folder: Path) -> VisionLanguageModel:
    """Make the whole model without weights, no layer cut off, on the meta device."""
    text = text_config(config, folder)
    vision = VisionEncoder(make_empty(AutoModel, vision_config(config)))
    with torch.device("meta"):
        projector = Projector(model.projector, vision.width, text.hidden_size)
    view = View(model.tiles.size, model.vision.normalize)
    return VisionLanguageModel(vision, projector, empty_llm(text), -1, view)


def original_entries(vlm: VisionLanguageModel, config: dict[str, Any]) -> list[Entry]:
    """List the original tensors that make up the model."""
    return entries(vlm, _names(vlm, config))


def _names(vlm: VisionLanguageModel, config: dict[str, Any]) -> list[Names]:
    return official_names(vlm.llm.config, config["llm_config"]["model_type"] == "internlm2")


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
) -> list[str]:
    """Write a merged model as an original folder, config and weights, in the dtype that it has; return notes on it.

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
    return [
        "official: InternVL's code is not among the files. Where it must run, copy the *.py files of the original "
        "folder beside them"
    ]


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
    table = {entry.stored: entry for entry in original_entries(vlm, config)}
    shapes = {key: entry.shape for key, entry in table.items()}
    unused: dict[str, Tensor] = {}
    if base is not None:
        shards = Shards.find(base)
        unused_keys = [key for key in shards.shapes if key.startswith("vision_model.") and key not in table]
        unused = {key: tensor.to(vlm.llm.dtype, copy=True) for key, tensor in shards.read(unused_keys)}
        head = stored_name(HEAD, _names(vlm, config))
        if vlm.llm.config.tie_word_embeddings and head in shards.shapes:
            unused[head] = weights[EMBEDDING]
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
