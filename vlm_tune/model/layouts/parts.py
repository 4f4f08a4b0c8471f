"""Separate parts: an encoder's folder, a language model's folder, and a projector between them.

`join` makes a model of two separate parts. `save` writes a trained model the same way (vision/, llm/,
projector.safetensors), for models that no class of transformers describes: each part still loads on its own.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlm_tune.config.schema import ModelConfig, Quantize
from vlm_tune.model.layouts.folders import PARTS_SETTINGS
from vlm_tune.model.layouts.found import Found, Loaded, read_found
from vlm_tune.model.layouts.internvl.alone import load_encoder, load_language_model
from vlm_tune.model.layouts.weights import notes, read_tensors
from vlm_tune.model.parts.llm import add_tokens, load_tokenizer
from vlm_tune.model.parts.projector import Projector
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions, whole_tower, whole_weights
from vlm_tune.model.vlm import View, VisionLanguageModel

PROJECTOR = "projector.safetensors"


def join(
    vision_folder: Path, llm_folder: Path, found: Found, tile_size: int, storage: tuple[torch.dtype, Quantize]
) -> Loaded:
    """Join an encoder and a language model with a new projector, whose initial weights are the same in every run.

    `storage` is the dtype of the weights, and how those of the language model are packed.
    """
    tower = load_encoder(vision_folder, storage[0])
    resample_positions(tower, tile_size)
    vision = VisionEncoder(tower, found.select_layer, found.keeps_class)
    tokenizer, llm = load_tokenizer(llm_folder), load_language_model(llm_folder, *storage)
    add_tokens(tokenizer, llm, found.tokens.all)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the projector's initial weights belong to the model, not to the run's seed
        projector = Projector(found.projector, vision.width, llm.config.hidden_size)
    projector.match_scale(spoken(llm))
    context_id = tokenizer.convert_tokens_to_ids(found.tokens.context)
    vlm = VisionLanguageModel(vision, projector, llm, context_id, View(tile_size, found.normalize))
    return Loaded(vlm, tokenizer, found, (*notes(vision_folder), *notes(llm_folder)))


def spoken(llm: PreTrainedModel) -> Tensor:
    """Return the token embeddings (V, D) as the language model reads them: Gemma scales those of its table."""
    table = llm.get_input_embeddings()
    scale = getattr(table, "embed_scale", 1.0)
    return table.weight.detach() * scale


def load(folder: Path, model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> Loaded:
    """Load a folder that `save` wrote."""
    found = read_found(folder, model)
    loaded = join(folder / "vision", folder / "llm", found, model.tiles.size, (dtype, quantize))
    loaded.vlm.projector.load_state_dict(read_tensors(folder / PROJECTOR))
    return loaded


def save(vlm: VisionLanguageModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shard: str = "2GB") -> None:
    """Write a merged model as parts, in the dtype that it has."""
    save_tower(vlm.vision, folder / "vision")
    vlm.llm.save_pretrained(folder / "llm", max_shard_size=shard)
    tokenizer.save_pretrained(folder / "llm")
    save_file({name: weight.contiguous() for name, weight in vlm.projector.state_dict().items()}, folder / PROJECTOR)
    settings: dict[str, Any] = {"projector": asdict(vlm.projector.config), "normalize": vlm.normalization}
    settings |= {"select_layer": vlm.vision.select_layer, "keeps_class": vlm.vision.keeps_class}
    (folder / PARTS_SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def save_tower(vision: VisionEncoder, folder: Path) -> None:
    """Write an encoder in its library's own layout."""
    if not vision.is_timm:
        whole_tower(vision).save_pretrained(folder)
        return
    folder.mkdir(parents=True)
    tower: Any = vision.tower
    config = {
        "architecture": tower.pretrained_cfg["architecture"],
        "num_classes": 0,
        "pretrained_cfg": {"num_classes": 0},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    weights = {name: weight.contiguous() for name, weight in whole_weights(vision).items()}
    save_file(weights, folder / "model.safetensors")
