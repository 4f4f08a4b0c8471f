"""Load a single encoder's or language model's folder: of transformers, timm or InternVL, whose code is not run."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from vlm_tune.config.schema import Quantize
from vlm_tune.model.layouts.folders import model_kind, read_json
from vlm_tune.model.layouts.internvl.official_config import text_config, vision_config
from vlm_tune.model.layouts.internvl.official_names import INTERNVIT, internlm2_names
from vlm_tune.model.layouts.keys import fill
from vlm_tune.model.layouts.pretrained import empty_llm, make_empty
from vlm_tune.model.parts.llm import load_llm
from vlm_tune.model.parts.vision import load_tower


def load_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """Load an encoder. InternViT becomes transformers' own class of it.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight of an InternViT.
    """
    if model_kind(folder) != "intern_vit_6b":  # InternViT-300M says so too
        return load_tower(folder, dtype)
    tower = make_empty(AutoModel, vision_config({"vision_config": read_json(folder)}))
    fill(tower, folder, INTERNVIT, (dtype, Quantize.none))
    return tower.eval()


def load_language_model(folder: Path, dtype: torch.dtype, quantize: Quantize = Quantize.none) -> PreTrainedModel:
    """Load a causal LM for training. InternLM2, which transformers does not have, becomes a Llama of the same logits.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight of an InternLM2.
    """
    if model_kind(folder) != "internlm2":
        return load_llm(folder, dtype, quantize)
    llm: PreTrainedModel = empty_llm(text_config({"llm_config": read_json(folder)}, folder))
    fill(llm, folder, internlm2_names(llm.config), (dtype, quantize))
    return llm
