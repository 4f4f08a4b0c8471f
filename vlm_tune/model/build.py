"""Build a model from its configuration: find the weights, load each part, join the parts."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from vlm_tune.config.schema import Config, ModelConfig, Precision, Quantize, TooLong
from vlm_tune.data.chat_template import choose_template
from vlm_tune.data.encode import Encoder, EncoderSettings
from vlm_tune.data.recipe import run_recipe
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts import internvl_hf, parts
from vlm_tune.model.vlm import ImageTokens, VisionLanguageModel

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass
class Model:
    """A loaded model with what belongs to it: the tokenizer and the encoder of conversations."""

    vlm: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder


def build_model(config: Config) -> Model:
    """Load a whole checkpoint, or join a vision encoder and a language model that never met by a new projector."""
    dtype = DTYPES[resolve_precision(config.trainer.precision)]
    model = config.model
    vlm, tokenizer = load_parts(model, dtype, config.stage.quantize)
    tokens = ImageTokens()
    num_patches = vlm.vision.num_patches(model.tiles.size)
    if num_patches % model.projector.shuffle**2:
        raise ConfigError(
            f"model.projector.shuffle={model.projector.shuffle} does not divide the {num_patches} patches of a tile of "
            f"model.tiles.size={model.tiles.size}: choose another tile size or shuffle"
        )
    tokens_per_tile = num_patches // model.projector.shuffle**2
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
    return Model(vlm, tokenizer, Encoder(tokenizer, choose_template(model.template, tokenizer), settings))


def check_room(config: Config, tokens_per_tile: int) -> None:
    """Refuse settings under which one large picture could never fit."""
    tiles, data = config.model.tiles, config.data
    most = tiles.max + (tiles.thumbnail and tiles.max > 1)
    if most * tokens_per_tile >= data.max_length and data.on_too_long is TooLong.error:
        raise ConfigError(
            f"model.tiles.max={tiles.max} needs up to {most}*{tokens_per_tile}={most * tokens_per_tile} image tokens, "
            f"data.max_length is {data.max_length}: raise it, lower model.tiles.max or set data.on_too_long=fewer_tiles"
        )


def load_parts(model: ModelConfig, dtype: torch.dtype, quantize: Quantize) -> parts.Loaded:
    """Find the weights that a model's configuration names, and load them in the layout that they have."""
    if model.path is not None:
        folder = find_folder(model.path, "model.path")
        load = parts.load if (folder / parts.SETTINGS).is_file() else internvl_hf.load
        return load(folder, model, dtype, quantize)
    if model.vision.path is None or model.llm.path is None:
        raise ConfigError(
            f"model={model.name} names no weights: set model.path=FOLDER for a whole checkpoint, or both "
            "model.vision.path and model.llm.path"
        )
    vision = find_folder(model.vision.path, "model.vision.path")
    return parts.join(vision, find_folder(model.llm.path, "model.llm.path"), model, dtype, quantize)


def resolve_precision(precision: Precision) -> Precision:
    """Choose bf16 where the machine computes in it, else float32."""
    if precision is not Precision.auto:
        return precision
    if torch.cuda.is_available():
        return Precision.bf16 if torch.cuda.is_bf16_supported() else Precision.fp16
    return Precision.bf16 if "avx512_bf16" in _cpu_flags() else Precision.fp32


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8") if info.exists() else ""


def find_folder(path: str, key: str) -> Path:
    """Turn recipe:NAME, a folder, or a hub id into a local folder.

    Raises ConfigError that names the key, the hub id, and what to download, when there is neither folder nor network.
    """
    if path.startswith("recipe:"):  # a data recipe may also prepare the weights of a part
        return run_recipe(path.removeprefix("recipe:"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", parts.SETTINGS)):
            raise ConfigError(f"{key}={path}: the folder has no config.json. Name the folder of a Hugging Face model")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"{key}={path}: no such folder. Name a folder with config.json and *.safetensors, or a hub id"
        )
    return _download(path, key)


def _download(hub_id: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={hub_id}: the hub cannot be reached and the model is not in the local cache. On a machine with a "
            f"network run `hf download {hub_id}` (files {', '.join(patterns)}), copy the folder here, and set "
            f"{key}=FOLDER"
        ) from error
