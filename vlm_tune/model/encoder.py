"""Make the encoder of conversations for a model, without reading its weights if only rows are counted."""

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from vlm_tune.config.schema import Config, ModelConfig, TileRule, TooLong
from vlm_tune.data.encode import Encoder
from vlm_tune.data.fit import EncoderSettings
from vlm_tune.data.text.chat_template import choose_template
from vlm_tune.data.text.positions import Positions
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.folders import LLAVA_ORIGINAL, find_folder, model_kind, read_json, require_weights
from vlm_tune.model.layouts.found import Found, read_found
from vlm_tune.model.layouts.internvl import official_config
from vlm_tune.model.layouts.llava import original as llava_original
from vlm_tune.model.layouts.pretrained import reading
from vlm_tune.model.parts.llm import load_tokenizer
from vlm_tune.model.parts.projector import tokens_per_tile
from vlm_tune.model.parts.vision import VisionEncoder, resample_positions
from vlm_tune.model.vlm import ImageTokens


def make_encoder(
    config: Config, tokenizer: PreTrainedTokenizerBase, tokens: ImageTokens, num_patches: int, positions: Positions
) -> Encoder:
    """Make the encoder of a model whose vision encoder sees `num_patches` patches in a tile.

    Raise ConfigError if the tile settings contradict each other, or one large picture could never fit a sample.
    """
    model, data = config.model, config.data
    shuffle = model.projector.shuffle
    if model.projector.kind != "qformer" and num_patches % shuffle**2:
        raise ConfigError(
            f"model.projector.shuffle={shuffle} does not divide the {num_patches} patches of a tile of "
            f"model.tiles.size={model.tiles.size}: choose another tile size or shuffle"
        )
    per_tile = tokens_per_tile(model.projector, num_patches)
    has_overview = model.tiles.thumbnail or model.tiles.rule is TileRule.anyres
    most = model.tiles.max + (has_overview and model.tiles.max > 1)
    limit = positions.limit(data.max_length)
    if most * per_tile >= limit.tokens and data.on_too_long is TooLong.error:
        raise ConfigError(
            f"model.tiles.max={model.tiles.max} needs up to {most}*{per_tile}={most * per_tile} image "
            f"tokens, but {limit.name}: {limit.remedy}, lower model.tiles.max or set data.on_too_long=fewer_tiles"
        )
    settings = EncoderSettings(
        image_start=tokens.start,
        image_context=tokens.context,
        image_end=tokens.end,
        tokens_per_tile=per_tile,
        newline=model.projector.newline,
        max_tiles=model.tiles.max,
        max_length=data.max_length,
        positions=positions,
        on_too_long=data.on_too_long,
        system=model.system,
        markup=None if model.markup is None else tuple(model.markup),
        reasoning_loss=data.reasoning_loss,
        pairs=config.stage.preference.is_on,
    )
    return Encoder(tokenizer, choose_template(model.template, tokenizer), settings)


def build_encoder(config: Config) -> tuple[Encoder, PreTrainedTokenizerBase]:
    """Make the encoder that `build_model` would make, from the small files of the same folders: no weights are read."""
    (vision_folder, llm_folder), found = look_up(config.model)
    config = replace(config, model=found.over(config.model))
    size = config.model.tiles.size
    with reading(vision_folder):
        patches = count_patches(vision_folder, size) if found.patch_size is None else (size // found.patch_size) ** 2
    tokenizer, tokens = load_tokenizer(llm_folder), found.tokens
    vocabulary = tokenizer.get_vocab()
    # a whole checkpoint's tokenizer knows its own tokens; LLaVA's original one lacks the one for a picture
    wanted = [tokens.context] if vision_folder == llm_folder else tokens.all
    new = [AddedToken(token, special=True, normalized=False) for token in wanted if token not in vocabulary]
    tokenizer.add_tokens(new, special_tokens=True)
    positions = read_positions(llm_folder)
    return make_encoder(config, tokenizer, tokens, patches + found.keeps_class, positions), tokenizer


def joined(config: Config) -> Config:
    """Join a configuration with what its model's folder says, as `build_model` does; no weights are read."""
    return replace(config, model=look_up(config.model)[1].over(config.model))


def look_up(model: ModelConfig) -> tuple[tuple[Path, Path], Found]:
    """Find the folders of both parts, which need no weights, and what they say."""
    require_weights(model)
    if model.path is None:
        vision = find_folder(str(model.vision.path), "model.vision.path", with_weights=False)
        return (vision, find_folder(str(model.llm.path), "model.llm.path", with_weights=False)), Found.given(model)
    folder = find_folder(model.path, "model.path", with_weights=False)
    with reading(folder):
        found = read_found(folder, model)
    is_apart = model_kind(folder) == "parts"
    return (folder / "vision", folder / "llm") if is_apart else (folder, folder), found


def read_positions(folder: Path) -> Positions:
    """Read how many positions a folder's language model has, whatever the folder's layout."""
    kind, config = model_kind(folder), read_json(folder)
    if kind == LLAVA_ORIGINAL:
        text = llava_original.text_config(config, folder)
    elif kind in (official_config.KIND, "internlm2"):
        text = official_config.text_config(config if kind == official_config.KIND else {"llm_config": config}, folder)
    elif kind in CONFIG_MAPPING:
        text = CONFIG_MAPPING[kind].from_dict(config).get_text_config()
    else:
        return Positions()  # loading such a model says what is wrong with it
    return Positions.of(text)


def count_patches(folder: Path, tile_size: int) -> int:
    """Count the patches of a tile from the encoder's config.json; a timm network is run on shapes only."""
    config = read_json(folder)
    if "architecture" in config:
        import timm

        with torch.device("meta"):
            tower = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
        resample_positions(tower, tile_size)
        return VisionEncoder(tower).num_patches(tile_size)
    size = config.get("vision_config", config).get("patch_size")
    if size is None:
        raise ConfigError(f"{folder}: its config.json names no patch_size: it is not the folder of a vision encoder")
    return (tile_size // int(size[0] if isinstance(size, list) else size)) ** 2
