"""The language model: any causal LM of transformers, loaded with packed attention and extended by the image tokens."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlm_tune.config.schema import Quantize
from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels import attention
from vlm_tune.model.kernels.isolation import check_language_model
from vlm_tune.model.layouts import tokenizer
from vlm_tune.model.layouts.folders import check_part
from vlm_tune.model.layouts.pretrained import load_pretrained, make_empty, read_settings, reading
from vlm_tune.model.parts.experts import expert_layers


def load_llm(folder: Path, dtype: torch.dtype, quantize: Quantize = Quantize.none) -> PreTrainedModel:
    """Load a causal LM for training: packed attention, no cache, 4- or 8-bit weights when asked for.

    Raises ConfigError for a kind that would be wrong in a pack, or that cannot be packed into 4 or 8 bit.
    """
    check_part(folder, "model.llm")
    if quantize is not Quantize.none:
        refuse_experts(make_empty(AutoModelForCausalLM, read_settings(AutoConfig, folder)), quantize)
    options = {"dtype": dtype, "attn_implementation": attention.NAME, **packing(quantize, dtype)}
    llm = load_pretrained(AutoModelForCausalLM, folder, part="the language model", **options)
    llm.config.use_cache = False
    guard_4bit(llm)
    check_language_model(llm)
    return llm


def quantization(quantize: Quantize, dtype: torch.dtype, skip: list[str] | None = None) -> BitsAndBytesConfig:
    """Describe the storage of a frozen base: NF4 with double quantization (QLoRA), or 8-bit; `skip` stays as it is."""
    if quantize is Quantize.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def packing(quantize: Quantize, dtype: torch.dtype, skip: list[str] | None = None) -> dict[str, Any]:
    """Name the option of `from_pretrained` that packs what it loads; none for a base that stays as it is."""
    return {} if quantize is Quantize.none else {"quantization_config": quantization(quantize, dtype, skip)}


def refuse_experts(llm: Any, quantize: Quantize) -> None:
    """Raise ConfigError for a mixture of experts: bitsandbytes packs linear layers, which experts are not."""
    if expert_layers(llm):
        raise ConfigError(
            f"stage.quantize={quantize.value} packs linear layers, but the experts of a {llm.config.model_type}, most "
            "of its weights, are none and would stay as they are. Set stage.quantize=none"
        )


def guard_4bit(llm: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on AVX512 CPUs.

    It does so at the first forward pass in eval mode and never undoes it: gradients are silently wrong from then on.
    """
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantize(llm: PreTrainedModel) -> int:
    """Replace 4- and 8-bit layers by float32 layers of the values that they computed with; return how many there were.

    In the run's own arithmetic a layer multiplies with its codes times their scales, rounded to that arithmetic: these
    are the weights that adapters learned to correct.
    """
    import bitsandbytes as bnb  # late: it takes seconds to import
    from peft.utils.integrations import dequantize_module_weight

    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    packed = [(name, layer) for name, layer in llm.named_modules() if isinstance(layer, kinds)]
    dtype = llm.dtype
    for name, layer in packed:
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = dequantize_module_weight(layer).detach().to(dtype).float()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(llm.get_submodule(parent), child, plain)
    for trace in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method"):
        llm.__dict__.pop(trace, None)
    llm.config.__dict__.pop("quantization_config", None)
    llm.float()
    return len(packed)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer; no code comes out of the folder.

    Raises CheckpointError for one that cannot be read, or splits no text.
    """
    loaded: PreTrainedTokenizerBase
    if tokenizer.brings_code(folder) or tokenizer.needs_building(folder):
        with reading(folder):
            loaded = tokenizer.load_without_code(folder)
    else:
        loaded = read_settings(AutoTokenizer, folder)
    with reading(folder):
        loaded("a text")
    return loaded


def add_tokens(tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel, tokens: list[str]) -> None:
    """Add special tokens; new embedding rows are the mean of the old ones, so that they are the same in every run."""
    vocabulary = tokenizer.get_vocab()
    if new := [token for token in tokens if token not in vocabulary]:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    num_rows = llm.get_input_embeddings().weight.shape[0]
    num_tokens = len(tokenizer)
    if num_tokens <= num_rows:
        return
    llm.resize_token_embeddings(num_tokens, mean_resizing=False)
    tables = {id(layer.weight): layer.weight for layer in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    with torch.no_grad():
        for table in tables.values():
            table[num_rows:] = table[:num_rows].float().mean(dim=0).to(table.dtype)
