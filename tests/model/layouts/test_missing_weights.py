"""A folder that lacks a weight, in any layout, is an error that names it: a library would draw it at random."""

import shutil

import pytest
from layout_toys import write_layouts
from safetensors.torch import load_file, save_file
from test_llava_hf import ANYRES, ONE

from vlm_tune.config.parse import load_config
from vlm_tune.errors import CheckpointError
from vlm_tune.model.build import build_model

LLAVA = ("model.template=v1", "model.vision.normalize=openai_clip")
KINDS = {  # the key that names the folder, and what is set beside it
    "encoder": ("model.vision.path", ()),
    "language model": ("model.llm.path", ()),
    "internvl": ("model.path", ()),
    "internvl_chat": ("model.path", ("model.template=internvl2_5",)),
    "llava": ("model.path", (ONE[0], *LLAVA)),
    "llava_next": ("model.path", (ANYRES[0], *LLAVA)),
    "llava_original": ("model.path", (ONE[0], *LLAVA)),
}
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(toys, tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    shutil.copytree(toys.vision, root / "encoder")
    shutil.copytree(toys.llm, root / "language model")
    write_layouts(toys, root, "qwen2")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_missing_is_named(kind, folders, toys, tmp_path):
    key, more = KINDS[kind]
    folder = shutil.copytree(folders / kind, tmp_path / "folder")
    weights = load_file(folder / FILE)
    gone = next(name for name in sorted(weights) if "layers.1." in name or "layer.1." in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, folder / FILE, {"format": "pt"})
    whole = ("model.vision.path=null", "model.llm.path=null") if key == "model.path" else ()
    with pytest.raises(CheckpointError, match=rf"missing(.|\n)*{'.'.join(gone.split('.')[-2:])}|{gone}: missing"):
        build_model(load_config(toys.arguments(*whole, f"{key}={folder}", *more)))
