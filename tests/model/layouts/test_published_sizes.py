"""Each InternVL model file, built on the meta device from its published configuration, has the published parameters.

Sources. Parts of the architecture: the config.json of each OpenGVLab repository, of InternViT-300M-448px and
InternViT-6B-448px-V1-5. Counts: OpenExplorer's cards of InternVL2-1B and InternVL2_5-2B ("calculated from the tensors
stored in the upstream checkpoint": whole, vision with MLP, language model); the table of the InternVL 2.5 documentation
(whole, vision, language model); the model cards of InternVL2 ("Model Size") and InternVL3; the card of
InternViT-6B-448px-V1-2 (5540 M for its 45 blocks); the table in the InternVL 3.5 documentation (whole, vision, language
model). Each is compared to the digits that it is published with. The shapes of Qwen3 are those of its own repositories;
that the head is not tied, as it is in the small Qwen3, follows from the published counts.
"""

import pytest
import torch
from official_toys import official_config

from vlm_tune.config.parse import load_config, options
from vlm_tune.data.text.templates import load_template
from vlm_tune.model.layouts.internvl.official import empty_model
from vlm_tune.model.parts.stage import add_lora

VIT_300M = {
    "num_hidden_layers": 24,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}
VIT_6B = VIT_300M | {
    "num_hidden_layers": 45,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}
LLMS = {  # layers, width, heads, key heads, inner width
    "Qwen2(.5)-0.5B": ("qwen2", 24, 896, 14, 2, 4864),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 12, 2, 8960),
    "Qwen2.5-3B": ("qwen2", 36, 2048, 16, 2, 11008),
    "Qwen2.5-7B": ("qwen2", 28, 3584, 28, 4, 18944),
    "internlm2(.5)-1.8b": ("internlm2", 24, 2048, 16, 8, 8192),
    "internlm2.5-7b": ("internlm2", 32, 4096, 32, 8, 14336),
    "internlm2-20b": ("internlm2", 48, 6144, 48, 8, 16384),
    "Phi-3-mini": ("phi3", 32, 3072, 32, 32, 8192),
    "Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 3072),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 6144),
    "Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 9728),
    "Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 12288),
    "Qwen3-14B": ("qwen3", 40, 5120, 40, 8, 17408),
    "Qwen3-32B": ("qwen3", 64, 5120, 64, 8, 25600),
    "Qwen3-30B-A3B": ("qwen3_moe", 48, 2048, 32, 4, 6144),
}
MORE = {  # keys of one kind alone
    "internlm2": {"bias": False},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
}
MODELS = {  # encoder, language model, rows of its table (its own tokens and InternVL's nine), published counts
    "internvl2_1b": (VIT_300M, "Qwen2(.5)-0.5B", 151655, {"all": "938.2M", "seeing": "308.5M", "llm": "629.7M"}),
    "internvl2_2b": (VIT_300M, "internlm2(.5)-1.8b", 92553, {"all": "2.2B", "vision": "304M"}),
    "internvl2_4b": (VIT_300M, "Phi-3-mini", 32020, {"all": "4.15B", "vision": "304M"}),
    "internvl2_8b": (VIT_300M, "internlm2.5-7b", 92553, {"all": "8.1B", "vision": "304M"}),
    "internvl2_26b": (VIT_6B, "internlm2-20b", 92553, {"all": "25.5B", "vision": "5.54B"}),
    "internvl2_5_1b": (VIT_300M, "Qwen2(.5)-0.5B", 151674, {"all": "938.19M", "vision": "304.01M", "llm": "629.70M"}),
    "internvl2_5_2b": (VIT_300M, "internlm2(.5)-1.8b", 92553, {"all": "2.206B", "seeing": "316.6M", "llm": "1.889B"}),
    "internvl2_5_4b": (VIT_300M, "Qwen2.5-3B", 151674, {"all": "3.71B", "vision": "304.01M", "llm": "3.40B"}),
    "internvl2_5_8b": (VIT_300M, "internlm2.5-7b", 92553, {"all": "8.08B", "vision": "304.01M", "llm": "7.74B"}),
    "internvl3_1b": (VIT_300M, "Qwen2(.5)-0.5B", 151674, {"all": "0.94B"}),
    "internvl3_2b": (VIT_300M, "Qwen2.5-1.5B", 151674, {"all": "2.09B"}),
    "internvl3_8b": (VIT_300M, "Qwen2.5-7B", 151674, {"all": "7.94B"}),
    "internvl3_5_1b": (VIT_300M, "Qwen3-0.6B", 151936, {"all": "1.06B", "vision": "0.3B", "llm": "0.8B"}),
    "internvl3_5_2b": (VIT_300M, "Qwen3-1.7B", 151936, {"all": "2.3B", "vision": "0.3B", "llm": "2.0B"}),
    "internvl3_5_4b": (VIT_300M, "Qwen3-4B", 151936, {"all": "4.7B", "vision": "0.3B", "llm": "4.4B"}),
    "internvl3_5_8b": (VIT_300M, "Qwen3-8B", 151936, {"all": "8.5B", "vision": "0.3B", "llm": "8.2B"}),
    "internvl3_5_14b": (VIT_300M, "Qwen3-14B", 151936, {"all": "15.1B", "vision": "0.3B", "llm": "14.8B"}),
    "internvl3_5_38b": (VIT_6B, "Qwen3-32B", 151936, {"all": "38.4B", "vision": "5.5B", "llm": "32.8B"}),
    "internvl3_5_30b_a3b": (VIT_300M, "Qwen3-30B-A3B", 151936, {"all": "30.8B", "vision": "0.3B", "llm": "30.5B"}),
}
ONE_OF_EACH_KIND = {
    *("internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl2_26b", "internvl3_5_1b", "internvl3_5_30b_a3b"),
}
MLP = {  # LayerNorm of 4 C, Linear(4 C, D), Linear(D, D); internvl_chat's mlp1
    name: 8 * vit["hidden_size"] + (4 * vit["hidden_size"] + 1 + LLMS[llm][2] + 1) * LLMS[llm][2]
    for name, (vit, llm, _, _) in MODELS.items()
}


def build(name: str):
    vision, llm, rows, _ = MODELS[name]
    keys = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    text = dict(zip((*keys, "intermediate_size"), LLMS[llm], strict=True)) | {"vocab_size": rows}
    text |= MORE.get(text["model_type"], {})
    model = load_config([f"model={name}"]).model
    return empty_model(official_config(vision, text), model, model.name), model


def count(*parts) -> int:
    return sum(weight.numel() for part in parts for weight in part.parameters())


def rounded(number: int, like: str) -> str:
    """Write a number as another is written: "938.2M"."""
    unit = {"M": 1e6, "B": 1e9}[like[-1]]
    digits = len(like[:-1].partition(".")[2])
    return f"{number / unit:.{digits}f}{like[-1]}"


def test_every_internvl_model_file_is_counted():
    assert {name for name in options("model") if name.startswith("internvl")} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_published_ones(name):
    vlm, _ = build(name)
    counts = {
        "all": count(vlm),
        "vision": count(vlm.vision),
        "seeing": count(vlm.vision, vlm.projector),
        "llm": count(vlm.llm),
    }
    published = MODELS[name][3]
    assert {part: rounded(counts[part], like) for part, like in published.items()} == published
    assert count(vlm.projector) == MLP[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_OF_EACH_KIND else pytest.mark.slow) for name in MODELS]
)
def test_adapters_find_their_layers(name):
    vlm, model = build(name)
    stage = load_config([f"model={name}", "stage=finetune"]).stage
    for part, targets in (("vision", model.vision.targets), ("llm", model.llm.targets)):
        with torch.device("meta"):
            add_lora(getattr(vlm, part), stage.lora, targets, f"model.{part}.targets")
        layers = MODELS[name][0]["num_hidden_layers"] if part == "vision" else LLMS[MODELS[name][1]][1]
        found = [key for key, _ in getattr(vlm, part).named_parameters() if key.endswith("lora_A.default.weight")]
        assert len(found) == len(targets) * layers


@pytest.mark.parametrize("name", MODELS)
def test_template_and_system_prompt_belong_together(name):
    # InternVL2 introduces itself in other words than 2.5, 3 and 3.5, and Qwen2 has no first token
    model = load_config([f"model={name}"]).model
    by_llm = {"internlm2": "internlm2-chat", "qwen2": "Hermes-2", "phi3": "phi3-chat"}
    is_second = name.startswith("internvl2_") and not name.startswith("internvl2_5")
    assert model.template == (by_llm[LLMS[MODELS[name][1]][0]] if is_second else "internvl2_5")
    assert model.system == load_template(model.template).default_system
    assert (model.tiles.size, model.tiles.max, model.tiles.thumbnail) == (448, 12, True)
