"""The options of an export and its folder, checked before torch is imported."""

import re
from dataclasses import dataclass
from pathlib import Path

from vlm_tune.errors import ConfigError

ADAPTERS = ("adapter", "adapter_and_base")
WRITTEN = ("hf", "official", "llava_hf", "parts", "gguf", *ADAPTERS)
DTYPES = ("fp32", "bf16", "fp16")
GGUF_DTYPES = {"f32": "fp32", "fp32": "fp32", "f16": "fp16", "fp16": "fp16", "q8_0": "q8_0"}
BASES = ("trained", "original")


@dataclass(frozen=True)
class Wanted:
    """The options of an export."""

    layout: str = "auto"
    dtype: str = "fp32"
    base: str = "trained"  # of a quantized run: what its adapters were trained on, or the weights before quantization
    shard: str = "2GB"

    def check(self) -> None:
        """Raise ConfigError for an unknown choice."""
        for key, value, choices in (
            ("dtype", self.dtype, tuple(GGUF_DTYPES if self.layout == "gguf" else DTYPES)),
            ("layout", self.layout, ("auto", *WRITTEN)),
            ("base", self.base, BASES),
        ):
            if value not in choices:
                raise ConfigError(f"{key}={value}: no such {key}. There are: {', '.join(choices)}")
        if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B", self.shard):
            raise ConfigError(f"max_shard_size={self.shard}: write a number and KB, MB, GB or TB, as in 2GB")


def empty_folder(out: str) -> Path:
    """Return the folder to write; raise ConfigError if it is not empty."""
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={out}: a file of that name is there. Name a new folder: nothing is overwritten")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"out={out}: the folder is not empty. Name a new one: nothing is overwritten")
    return folder
