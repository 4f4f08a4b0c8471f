"""Small files of a model's folder: read as JSON objects with plausible sizes, or an error that names the file."""

import json
from pathlib import Path
from typing import Any

from vlm_tune.errors import CheckpointError

LARGEST = {  # what no published model comes near: a wrong digit must not ask for all memory, or build layers for hours
    "num_hidden_layers": 1000,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "vocab_size": 2**24,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "image_size": 2**14,
    "patch_size": 2**12,
    "downsample_ratio": 1,
}
FRACTIONS = {"downsample_ratio"}


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises CheckpointError for a file that is missing, is no JSON, names a key twice, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Copy it anew from the original") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds a {type(content).__name__}, not a JSON object. Copy it anew")
    return content


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a config.json, with sizes that a model can have.

    Raises CheckpointError that lists the sizes which are no positive numbers, or larger than any model's.
    """
    config = read_object(path)
    if problems := list(_false_sizes(config)):
        raise CheckpointError(f"{path}: {'; '.join(problems)}. Correct the file, or copy it anew from the original")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a key stands twice: {next(name for name in names if names.count(name) > 1)}")
    return content


def _false_sizes(config: dict[str, Any], prefix: str = "") -> Any:
    for key, value in config.items():
        if isinstance(value, dict) and key not in LARGEST:
            yield from _false_sizes(value, f"{prefix}{key}.")
        elif key in LARGEST and (value is not None or key in FRACTIONS):
            kinds = (int, float) if key in FRACTIONS else (int,)
            for size in value if isinstance(value, list) else [value]:
                if isinstance(size, bool) or not isinstance(size, kinds) or not 0 < size <= LARGEST[key]:
                    yield f"{prefix}{key}={value} is no size from 1 to {LARGEST[key]}"
                    break
