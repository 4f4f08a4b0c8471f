"""Features of a frozen vision tower, cached on disk: it then runs once per picture, not once per step.

There is one file per picture, named by its content and tile limit, in a folder named by everything else that decides
the encoder's output. Files are written aside and renamed, so runs, ranks and workers can share the folder, and a killed
process leaves no damaged file.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm_tune.errors import DataError

NAME = "features"


@dataclass(frozen=True)
class FeatureCache:
    """Read and write features (T, P, C) of pictures, in a folder of one encoder and one way of tiling."""

    folder: Path

    def key(self, content: bytes, max_tiles: int) -> str:
        """Return the key of a picture: a hash of its encoded file and the most tiles it may have."""
        return hashlib.blake2b(content, digest_size=16, salt=max_tiles.to_bytes(4, "little")).hexdigest()

    def path(self, key: str) -> Path:
        """Return the path of a picture's features; the files are spread over 256 folders."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Return whether a picture's features are cached."""
        return self.path(key).is_file()

    def read(self, key: str) -> Tensor:
        """Read the features (T, P, C), in the encoder's dtype."""
        with safe_open(self.path(key), framework="pt") as file:
            features: Tensor = file.get_tensor(NAME)
        return features

    def write(self, key: str, features: Tensor) -> None:
        """Store the features (T, P, C) of a picture."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            save_file({NAME: features.detach().cpu().contiguous()}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise DataError(
                f"the features of a picture could not be kept ({error}). Free some space, name a folder on another "
                "disk by VLM_TUNE_CACHE=FOLDER, or set data.feature_cache=off",
                str(self.folder),
            ) from error


def fingerprint(weights: dict[str, Tensor], settings: str) -> str:
    """Hash the weights of an encoder and the settings that decide its input."""
    digest = hashlib.blake2b(settings.encode(), digest_size=12)
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
