"""An encoder's folder alone: transformers' and timm's own kinds, and InternViT's, whose code is not run."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from vlm_tune.model.folders import model_kind
from vlm_tune.model.layouts.official_config import vision_config
from vlm_tune.model.layouts.official_keys import entries
from vlm_tune.model.layouts.weights import Shards
from vlm_tune.model.vision import load_tower

KIND = "intern_vit_6b"  # of InternViT-300M too
OURS, THEIRS = "vision.tower.", "vision_model."  # inside a whole model


def load_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """Load an encoder. InternViT becomes transformers' own class of it.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight of an InternViT.
    """
    if model_kind(folder) != KIND:
        return load_tower(folder, dtype)
    config = vision_config({"vision_config": json.loads((folder / "config.json").read_text(encoding="utf-8"))})
    with torch.device("meta"):
        tower = AutoModel.from_config(config, attn_implementation="sdpa")
    named = {OURS + name: tuple(weight.shape) for name, weight in tower.named_parameters()}
    table = {entry.original.removeprefix(THEIRS): entry for entry in entries(named, None)}
    shards = Shards.find(folder)
    shards.compare({name: entry.shape for name, entry in table.items()})
    weights: dict[str, Tensor] = {}
    for key, tensor in shards.read(table):
        for name, part in zip(table[key].ours, table[key].split(tensor), strict=True):
            weights[name.removeprefix(OURS)] = part.to(dtype, copy=True, memory_format=torch.contiguous_format)
    tower.load_state_dict(weights, assign=True)
    return tower.eval()
