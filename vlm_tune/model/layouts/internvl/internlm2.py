"""A language model's folder alone: transformers' own kinds, and InternLM2, which becomes a Llama of the same logits."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from vlm_tune.config.schema import Quantize
from vlm_tune.model.kernels import attention
from vlm_tune.model.layouts.fill import fill, restore_buffers, tie_head
from vlm_tune.model.layouts.folders import model_kind, read_json
from vlm_tune.model.layouts.internvl.official_config import text_config
from vlm_tune.model.layouts.internvl.official_keys import Heads, part_entries
from vlm_tune.model.layouts.pretrained import make_empty
from vlm_tune.model.layouts.weights import Shards
from vlm_tune.model.parts.llm import guard_4bit, load_llm, quantization
from vlm_tune.model.parts.quantize import use_quantized_layers

HEAD = "output.weight"


def load_language_model(folder: Path, dtype: torch.dtype, quantize: Quantize = Quantize.none) -> PreTrainedModel:
    """Load a causal LM for training; transformers has no InternLM2, and its folder's code is not run.

    Raises CheckpointError that lists every missing, unexpected and misshapen weight of an InternLM2.
    """
    if model_kind(folder) != "internlm2":
        return load_llm(folder, dtype, quantize)
    text = text_config({"llm_config": read_json(folder)}, folder)
    with torch.device("meta"):
        llm = make_empty(AutoModelForCausalLM, text, attn_implementation=attention.NAME)
    llm.config.use_cache = False
    shapes = {name: tuple(weight.shape) for name, weight in llm.named_parameters()}
    table = part_entries(shapes, "llm.", "language_model.", Heads.of(text))
    shards = Shards.find(folder)
    shards.compare({entry.original: entry.shape for entry in table}, [HEAD] if text.tie_word_embeddings else [])
    if quantize is not Quantize.none:
        use_quantized_layers(llm, quantization(quantize, dtype))
    fill(llm, shards, table, dtype)
    tie_head(llm, shards, HEAD)
    restore_buffers(llm)
    guard_4bit(llm)
    return llm  # type: ignore[no-any-return]
