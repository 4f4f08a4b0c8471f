"""Find the folder of a model's weights: a local folder, what a recipe prepares, or a download from the hub."""

import os
from pathlib import Path
from typing import Any

from vlm_tune.config.schema import ModelConfig
from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.layouts.folder_files import read_config_file
from vlm_tune.recipes.recipe import run_recipe

LLAVA_ORIGINAL = "llava_original"  # haotian-liu/LLaVA's layout
ADAPTER_SETTINGS = "adapter_config.json"  # of peft
PARTS_SETTINGS = "vlm_tune.json"  # in a folder of separate parts: what joins them


def find_folder(path: str, key: str, with_weights: bool = True) -> Path:
    """Turn recipe:NAME, a folder, or a hub id into a local folder.

    Of a hub id all is downloaded, or by `with_weights=False` its small files alone. Raises ConfigError that names the
    key, the hub id, and what to download, when there is neither folder nor network.
    """
    if path.startswith("recipe:"):  # a data recipe may also prepare the weights of a part
        return run_recipe(path.removeprefix("recipe:"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        refuse_adapter(folder)
        if not any((folder / name).is_file() for name in ("config.json", PARTS_SETTINGS)):
            raise ConfigError(f"{key}={path}: the folder has no config.json. Name the folder of a Hugging Face model")
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"{key}={path}: no such folder. Name a folder with config.json and *.safetensors, or a hub id"
        )
    return _download(path, key, with_weights)


def require_weights(model: ModelConfig) -> None:
    """Raise ConfigError for a model that names neither a whole checkpoint nor both of its parts."""
    if model.path is None and (model.vision.path is None or model.llm.path is None):
        raise ConfigError(
            f"model={model.name} names no weights: set model.path=FOLDER for a whole checkpoint, or both "
            "model.vision.path and model.llm.path"
        )


def read_json(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json as it is: transformers' own classes of it are not asked."""
    return read_config_file(folder / "config.json")


def model_kind(folder: Path) -> str:
    """Read which layout a folder has: the model_type of its config.json, or "parts".

    The file itself is asked: transformers would offer to run a strange folder's own code. Raises CheckpointError for an
    adapter's folder.
    """
    refuse_adapter(folder)
    if (folder / PARTS_SETTINGS).is_file():
        return "parts"
    config = read_json(folder)
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        return LLAVA_ORIGINAL  # its model_type may be the same as that of transformers' own LLaVA
    return str(config.get("model_type"))


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder of peft: transformers lays it over another model than the folder's own."""
    if (folder / ADAPTER_SETTINGS).is_file():
        raise CheckpointError(
            f"{folder}: an adapter ({ADAPTER_SETTINGS}), not a model. Fold it into its base first: `python -m vlm_tune "
            f"merge base=FOLDER adapter={folder} out=FOLDER`; remove {ADAPTER_SETTINGS} from a folder that "
            "holds a whole model all the same"
        )


def check_part(folder: Path, key: str) -> None:
    """Raise ConfigError for a part that transformers has no class of: it would offer to run the folder's own code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = model_kind(folder)
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{key}.path={folder}: a model of type {kind}, which transformers does not know. No code out of a folder "
            "is run: convert it to a type that is known"
        )


def _download(hub_id: str, key: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if with_weights else [])]
    try:
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
        if with_weights and not any(folder.glob("*.safetensors")):  # older models have nothing else
            snapshot_download(hub_id, allow_patterns=["pytorch_model*.bin"])
            if not any(folder.glob("*.bin")):  # without a network, what an earlier call left in the cache is returned
                raise FileNotFoundError("no weights")
        return folder
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}={hub_id}: there is no such folder, and no such model on the hub that can be read without a login. "
            "Look at the name; for a model that asks for one run `hf auth login` first"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={hub_id}: the hub cannot be reached and the model is not in the local cache, or it holds no "
            "*.safetensors and no pytorch_model*.bin. On a machine with a network run "
            f"`hf download {hub_id}` (files {', '.join(patterns)}), copy the folder here, and set {key}=FOLDER"
        ) from error
