"""Files next to the weights of a llava-hf folder: tokenizer, chat template and picture settings, as trained."""

from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from vlm_tune.config.schema import ModelConfig, TileRule
from vlm_tune.data.encode import Encoder
from vlm_tune.data.tiles import anyres_grids, find_normalization
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.folders import read_json
from vlm_tune.model.layouts.internvl.processor import jinja_template, show_content, show_pictures


def save_llava_processor(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, model: ModelConfig, folder: Path
) -> list[str]:
    """Write a processor that makes the tokens and tiles of training, next to the existing config.json.

    Returns notes on what it cannot do as training did. Raises ConfigError for a tile rule that transformers' processors
    do not know.
    """
    pictures = picture_processor(model, encoder.settings.newline)
    config = read_json(folder)
    context = encoder.settings.image_context
    template = jinja_template(encoder.template, tokenizer, model.system, show_content(context), show_pictures(context))
    tokenizer.save_pretrained(folder)
    kind = LlavaNextProcessor if encoder.settings.newline else LlavaProcessor
    processor = kind(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=config["vision_config"]["patch_size"],
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        num_additional_image_tokens=int(config["vision_config"]["model_type"] == "clip_vision_model"),
        image_token=encoder.settings.image_context,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return [f"llava_hf: {note}" for note in notes(model, encoder.settings.newline)]


def notes(model: ModelConfig, newline: bool) -> list[str]:
    """Describe where a transformers processor differs from training."""
    told = [
        "a folder cannot name the library that resizes pictures. Training took Pillow: AutoProcessor.from_pretrained("
        'FOLDER, backend="pil"). The default, torchvision, moves pixels by up to 2/255'
    ]
    if newline:
        told.append(
            f"of several pictures in one conversation, transformers gives each up to {model.tiles.max} tiles and the "
            "base tile; training shared them among the pictures (model.tiles.max)"
        )
    return told


def picture_processor(model: ModelConfig, newline: bool) -> Any:
    """Choose the picture processor of transformers that cuts as model.tiles says; Pillow resizes, as in training."""
    tiles = model.tiles
    mean, std = find_normalization(model.vision.normalize)
    square = {"height": tiles.size, "width": tiles.size}
    options: dict[str, Any] = {"image_mean": list(mean), "image_std": list(std), "crop_size": square}
    if newline:
        pinpoints = [[rows * tiles.size, columns * tiles.size] for columns, rows in anyres_grids(tiles)]
        return LlavaNextImageProcessorPil(size={"shortest_edge": tiles.size}, image_grid_pinpoints=pinpoints, **options)
    if tiles.rule is TileRule.pad:
        return LlavaImageProcessorPil(size=square, do_pad=True, do_center_crop=False, **options)
    if tiles.rule is TileRule.resize or tiles.max == 1:
        return CLIPImageProcessorPil(size=square, do_center_crop=False, **options)
    raise ConfigError(
        f"layout=llava_hf: transformers' LLaVA processors cut no picture by model.tiles.rule={tiles.rule.value} into "
        f"up to {tiles.max} tiles: use layout=parts"
    )
