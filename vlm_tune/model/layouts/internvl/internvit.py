"""An encoder's folder alone: transformers' and timm's own kinds, and InternViT's, whose code is not run."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.fill import fill
from vlm_tune.model.layouts.folders import model_kind, read_json
from vlm_tune.model.layouts.internvl.official_config import vision_config
from vlm_tune.model.layouts.internvl.official_keys import part_entries
from vlm_tune.model.layouts.pretrained import make_empty
from vlm_tune.model.layouts.weights import Shards
from vlm_tune.model.parts.vision import load_tower

KIND = "intern_vit_6b"  # of InternViT-300M too


def load_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """Load an encoder. InternViT becomes transformers' own class of it.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight of an InternViT.
    """
    if model_kind(folder) != KIND:
        return load_tower(folder, dtype)
    config = vision_config({"vision_config": read_json(folder)})
    with torch.device("meta"):
        tower = make_empty(AutoModel, config, attn_implementation=attention.NAME)
    shapes = {name: tuple(weight.shape) for name, weight in tower.named_parameters()}
    table = part_entries(shapes, "vision.tower.", "vision_model.")
    shards = Shards.find(folder)
    shards.compare({entry.original: entry.shape for entry in table})
    fill(tower, shards, table, dtype)
    return tower.eval()
