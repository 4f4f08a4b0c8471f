"""The encoder of conversations alone: tokenizer, template and tile settings, without a model's weights."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from vlm_tune.config.schema import Config, ModelConfig
from vlm_tune.data.chat_template import choose_template
from vlm_tune.data.encode import Encoder, EncoderSettings
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import check_room, find_folder
from vlm_tune.model.layouts.parts import SETTINGS
from vlm_tune.model.llm import load_tokenizer
from vlm_tune.model.vision import VisionEncoder
from vlm_tune.model.vlm import ImageTokens


def build_encoder(config: Config) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """Make the encoder that `build_model` would make, from the small files of the same folders: no weights are read.

    Raise ConfigError as `build_model` does, for folders that are not there and settings that do not fit one another.
    """
    model = config.model
    vision_folder, llm_folder, shuffle = find_parts(model)
    tokenizer, tokens = load_tokenizer(llm_folder), ImageTokens()
    vocabulary = tokenizer.get_vocab()
    new = [AddedToken(token, special=True, normalized=False) for token in tokens.all if token not in vocabulary]
    tokenizer.add_tokens(new, special_tokens=True)
    num_patches = count_patches(vision_folder, model.tiles.size)
    if num_patches % shuffle**2:
        raise ConfigError(
            f"model.projector.shuffle={shuffle} does not divide the {num_patches} patches of a tile of "
            f"model.tiles.size={model.tiles.size}: choose another tile size or shuffle"
        )
    tokens_per_tile = num_patches // shuffle**2
    check_room(config, tokens_per_tile)
    settings = EncoderSettings(
        image_start=tokens.start,
        image_context=tokens.context,
        image_end=tokens.end,
        tokens_per_tile=tokens_per_tile,
        max_tiles=model.tiles.max,
        max_length=config.data.max_length,
        on_too_long=config.data.on_too_long,
        system=model.system,
    )
    return Encoder(tokenizer, choose_template(model.template, tokenizer), settings), tokenizer


def find_parts(model: ModelConfig) -> tuple[Path, Path, int]:
    """Find the folders of the vision encoder and of the language model, and the pixel shuffle between them."""
    if model.path is not None:
        folder = find_folder(model.path, "model.path")
        if not (folder / SETTINGS).is_file():
            return folder, folder, model.projector.shuffle
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return folder / "vision", folder / "llm", int(settings["projector"]["shuffle"])
    if model.vision.path is None or model.llm.path is None:
        raise ConfigError(
            f"model={model.name} names no weights: set model.path=FOLDER for a whole checkpoint, or both "
            "model.vision.path and model.llm.path"
        )
    vision = find_folder(model.vision.path, "model.vision.path")
    return vision, find_folder(model.llm.path, "model.llm.path"), model.projector.shuffle


def count_patches(folder: Path, tile_size: int) -> int:
    """Count the patches of a tile from the encoder's config.json; a network of timm is run dry, on shapes alone."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in config:
        import timm

        with torch.device("meta"):
            tower = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
        return VisionEncoder(tower).num_patches(tile_size)
    size = config.get("vision_config", config).get("patch_size")
    if size is None:
        raise ConfigError(f"{folder}: its config.json names no patch_size: it is not the folder of a vision encoder")
    return (tile_size // int(size[0] if isinstance(size, list) else size)) ** 2
