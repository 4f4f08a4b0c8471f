"""The language model's file for llama.cpp-based engines: weights, rotary settings, tokenizer and chat template."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlm_tune.errors import ConfigError

TYPES = {
    "fp32": gguf.GGMLQuantizationType.F32,
    "fp16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {"fp32": gguf.LlamaFileType.ALL_F32, "fp16": gguf.LlamaFileType.MOSTLY_F16}
FILE_TYPES["q8_0"] = gguf.LlamaFileType.MOSTLY_Q8_0
ARCHITECTURES = {  # transformers' model_type -> the engines' name
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # the steps before the merges, as tokenizer.json describes them -> the engines' name
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (QWEN2_SPLIT, "ByteLevel"): "qwen2",
    (QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"), "ByteLevel"): "llama-bpe",
}


def write_text_model(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int], template: str, target: tuple[Path, str]
) -> None:
    """Write a causal LM into the file of `target`, (path, dtype); `ends` are the tokens that end an answer.

    Raises ConfigError for an architecture, a rotary scaling or a tokenizer that the engines read otherwise.
    """
    path, dtype = target
    config = llm.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"layout=gguf knows the language models {known}; this one is {config.model_type}")
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch], use_temp_file=True)
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[dtype])
    add_sizes(writer, config)
    add_tokenizer(writer, tokenizer, llm.get_input_embeddings().weight.shape[0], ends)
    writer.add_chat_template(template)
    for name, weight in text_tensors(llm, arch):
        store(writer, name, weight, dtype)
    if (factors := rotary_factors(config)) is not None:
        store(writer, "rope_freqs.weight", factors, dtype)
    finish(writer)


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the architecture's numbers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rotary = config.rope_parameters
    writer.add_rope_dimension_count(int(head * rotary.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    elif rotary["rope_type"] not in ("default", "dynamic", "llama3"):  # dynamic acts beyond the context length alone
        raise ConfigError(
            f"layout=gguf knows the rotary scalings default, dynamic, linear and llama3; this model has "
            f"{rotary['rope_type']}. Use layout=hf"
        )
    if config.model_type == "phi3":  # its reader insists on a window; one as long as the context is none
        writer.add_sliding_window(getattr(config, "sliding_window", None) or config.max_position_embeddings)


def rotary_factors(config: Any) -> Tensor | None:
    """Return Llama 3's divisors of the rotary frequencies: (head size / 2,), None for other models."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    size = 2 * len(scaled)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
    return plain / scaled


def text_tensors(llm: PreTrainedModel, arch: gguf.MODEL_ARCH) -> list[tuple[str, Tensor]]:
    """Name every weight as the engines do. A tied head is left out: they take the embeddings then."""
    config = llm.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = []
    for name, weight in llm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ConfigError(f"layout=gguf: {name} has no name in the {config.model_type} files of llama.cpp")
        if arch is gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            weight = neighbours(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        found.append((theirs, weight))
    return found


def neighbours(weight: Tensor, num_heads: int) -> Tensor:
    """Order the rows of a head for an engine that rotates neighbours (0, 1); transformers rotates halves (0, d/2)."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, 2, rows // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def store(writer: gguf.GGUFWriter, name: str, weight: Tensor, dtype: str) -> None:
    """Add a tensor. Vectors stay in float32; rows that 8-bit blocks of 32 do not divide become 16-bit."""
    data = weight.detach().float().cpu().numpy()
    kind = TYPES[dtype] if data.ndim == 2 else TYPES["fp32"]
    if kind is TYPES["q8_0"] and data.shape[-1] % 32:
        kind = TYPES["fp16"]
    writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_rows: int, ends: list[int]) -> None:
    """Write a byte-level BPE tokenizer; rows of the embeddings beyond its tokens get names that nobody can say.

    Raises ConfigError for a tokenizer of another kind, or steps before its merges that the engines have no name for.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(content)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for added in content["added_tokens"]:
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    spare = num_rows - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *(f"[PAD{number}]" for number in range(spare))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * spare])
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(encoded) and encoded[0] == tokenizer.bos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


def pre_tokenizer_name(content: dict[str, Any]) -> str:
    """Find the engines' name for what tokenizer.json does before its merges."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = tuple(step.get("pattern", {}).get("Regex", step.get("type")) for step in steps)
    model = content["model"]
    if model["type"] != "BPE" or kinds not in PRE_TOKENIZERS or content.get("normalizer", {}) not in (None, {}, NFC):
        raise ConfigError(
            f"layout=gguf knows byte-level BPE tokenizers of the kinds {', '.join(PRE_TOKENIZERS.values())}; this one "
            f"is {model['type']} after {' + '.join(map(str, kinds))}. Convert this model with the engine's own script"
        )
    return PRE_TOKENIZERS[kinds]


NFC = {"type": "NFC"}  # Qwen's; text is in this form already, but for rare letters
