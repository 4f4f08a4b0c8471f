"""An InternViT folder of the hub, which brings code of its own, joins as an encoder; nothing of that code is run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError
from vlm_tune.model.encoder import build_encoder
from vlm_tune.model.layouts.internvl.alone import load_encoder
from vlm_tune.model.parts.vision import VisionEncoder

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
KINDS = {
    "300M": {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
    "6B": {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True},
}
RENAMED = {  # transformers' own class -> InternViT; q, k and v are joined
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "lambda_": "ls",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """Write an InternViT as its hub folder has it, and give the same encoder in transformers' own class."""
    own = KINDS[request.param]
    theirs = {"attention_bias": own["qkv_bias"], "use_qk_norm": own["qk_normalization"], "norm_type": own["norm_type"]}
    sizes = {"image_size": [56, 56], "patch_size": [14, 14], "layer_norm_eps": 1e-6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain = AutoModel.from_config(AutoConfig.for_model("internvl_vision", **SIZES, **sizes, **theirs)).eval()
        for weight in plain.parameters():
            weight.data += torch.randn_like(weight) * 0.2
    weights = {}
    for name, weight in plain.state_dict().items():
        if "k_proj" in name or "v_proj" in name:
            continue
        parts = [plain.state_dict()[name.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
        joined = torch.cat(parts) if "q_proj" in name else weight
        renamed = name.replace("attention.q_proj", "attn.qkv")
        for old, new in RENAMED.items():
            renamed = renamed.replace(old, new)
        weights[renamed] = joined.contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = SIZES | own | {"image_size": 56, "patch_size": 14, "layer_norm_eps": 1e-6, "model_type": "intern_vit_6b"}
    code = {"auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config | code))
    return tmp_path, plain


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2])
def test_its_features_are_those_of_the_same_weights_in_transformers(pair, layer):
    folder, plain = pair
    wanted = plain(PIXELS, output_hidden_states=True).hidden_states[layer][:, 1:]
    found = VisionEncoder(load_encoder(folder, torch.float32), layer)(PIXELS)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_missing_and_unexpected_weights_are_listed(pair):
    folder, _ = pair
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layers.7.ls1"] = weights.pop("encoder.layers.1.ls1")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"encoder\.layers\.1\.ls1: missing\n.*encoder\.layers\.7\.ls1: unexpected"
    ):
        load_encoder(folder, torch.float32)


def test_it_joins_a_language_model(pair, toys):
    folder, _ = pair
    overrides = [f"model.vision.path={folder}", "model.vision.select_layer=-2"]
    staged = toys.staged("stage=pretrain", *overrides)
    assert torch.isfinite(staged.model.vlm(staged.batch([0, 1, 6])))
    counted, _ = build_encoder(load_config(toys.arguments(*overrides)))
    assert counted.settings == staged.model.encoder.settings
