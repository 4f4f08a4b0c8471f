"""Any vision encoder joins: each gives the hidden states of its own library, at any layer, at any tile size."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from transformers import AutoConfig as Config
from transformers import AutoModel, CLIPConfig, CLIPModel, Siglip2ImageProcessorPil

from vlm_tune.errors import CheckpointError, ConfigError
from vlm_tune.model.encoder import count_patches
from vlm_tune.model.layouts.parts import save_tower
from vlm_tune.model.layouts.weights import notes
from vlm_tune.model.parts.vision import VisionEncoder, load_tower, patchify, resample_positions, whole_tower

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}
KINDS = {
    "clip_vision_model": {"image_size": 56},
    "siglip_vision_model": {"image_size": 56},
    "siglip2_vision_model": {"num_patches": 16},
    "dinov2": {"image_size": 56, "mlp_ratio": 2},
    "internvl_vision": {"image_size": [56, 56], "patch_size": [14, 14], "use_mean_pooling": False},
}
CLASS_TOKENS = {"clip_vision_model": 1, "dinov2": 1, "internvl_vision": 1}
IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))


def inputs(kind, images):
    return patchify(images, 14) if kind == "siglip2_vision_model" else {"pixel_values": images}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tower(kind):
    sizes = {key: value for key, value in SIZES.items() if not (kind == "dinov2" and key == "intermediate_size")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tower = AutoModel.from_config(Config.for_model(kind, **sizes | KINDS[kind])).eval()
        for weight in tower.parameters():  # norms and layer scales too, or a lost one would not be seen
            weight.data += torch.randn_like(weight) * 0.2
    return tower


@torch.no_grad()
def test_the_last_layer_is_the_librarys_own_output_without_a_class_token(tower, kind):
    wanted = tower(**inputs(kind, IMAGES)).last_hidden_state[:, CLASS_TOKENS.get(kind, 0) :]
    vision = VisionEncoder(tower)
    torch.testing.assert_close(vision(IMAGES), wanted)
    assert wanted.shape[1:] == (vision.num_patches(56), vision.width)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3, -2, -3])
def test_an_earlier_layer_is_the_librarys_hidden_state(tower, kind, layer):
    states = tower(**inputs(kind, IMAGES), output_hidden_states=True).hidden_states
    wanted = states[layer][:, CLASS_TOKENS.get(kind, 0) :]
    vision = VisionEncoder(tower, layer)
    torch.testing.assert_close(vision(IMAGES), wanted)
    assert sum("fc1.weight" in name for name, _ in vision.named_parameters()) == layer % 4


@torch.no_grad()
@pytest.mark.parametrize("layer", [2, -1])
def test_tiles_of_another_size_see_the_librarys_resized_positions(tower, kind, layer):
    reference = deepcopy(tower)
    options = {"interpolate_pos_encoding": True} if kind in ("clip_vision_model", "siglip_vision_model") else {}
    if kind == "internvl_vision":  # resizes by itself, as DINOv2 does
        reference.embeddings.image_size = (84, 84)
    output = reference(**inputs(kind, LARGE), **options, output_hidden_states=True)
    wanted = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    resample_positions(tower, 84)
    vision = VisionEncoder(tower, layer)
    torch.testing.assert_close(vision(LARGE), wanted[:, CLASS_TOKENS.get(kind, 0) :], atol=1e-4, rtol=1e-4)
    assert vision.num_patches(84) == 36


@pytest.mark.parametrize("layer", [2, -1])
def test_what_is_not_run_is_saved_all_the_same(tower, kind, tmp_path, layer):
    whole = deepcopy(tower.state_dict())
    vision = VisionEncoder(tower, layer)
    save_tower(vision, tmp_path / "vision")
    plain = AutoModel.from_pretrained(tmp_path / "vision")
    assert plain.state_dict().keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in plain.state_dict().items())
    assert count_patches(tmp_path / "vision", 56) == 16


@torch.no_grad()
def test_a_folder_of_ours_gives_the_features_that_were_trained(tower, tmp_path):
    vision = VisionEncoder(tower, 2)
    save_tower(vision, tmp_path / "vision")
    again = VisionEncoder(load_tower(tmp_path / "vision", torch.float32), 2)
    assert torch.equal(again(IMAGES), vision(IMAGES))


def test_the_layers_that_are_not_run_follow_the_dtype(tower):
    vision = VisionEncoder(tower, 2).to(torch.bfloat16)
    assert {weight.dtype for weight in whole_tower(vision).parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_folder_with_a_text_tower_gives_its_vision_part(tmp_path):
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    clip = CLIPModel(CLIPConfig(vision_config=SIZES | {"image_size": 56}, text_config=sizes | {"vocab_size": 50}))
    clip.eval().save_pretrained(tmp_path)
    wanted = clip.vision_model(IMAGES, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(VisionEncoder(load_tower(tmp_path, torch.float32), -2)(IMAGES), wanted)


def test_a_folder_without_some_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    AutoModel.from_config(Config.for_model("clip_vision_model", **SIZES, image_size=56)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"are missing\n  .*layers\.1\.mlp\.fc1\.weight"):
        load_tower(tmp_path, torch.float32)


def test_patches_of_siglip_2_are_those_of_its_processor():
    image = (np.random.default_rng(0).random((84, 84, 3)) * 255).astype(np.uint8)
    made = Siglip2ImageProcessorPil(patch_size=14, max_num_patches=36)(image, return_tensors="pt")
    assert made["spatial_shapes"].tolist() == [[6, 6]]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    torch.testing.assert_close(patchify(pixels, 14)["pixel_values"], made["pixel_values"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, -2, -1])
@pytest.mark.parametrize("size", [160, 192])
def test_a_transformer_of_timm_gives_the_layer_asked_for(layer, size, tmp_path):
    tower = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    pixels = torch.randn(2, 3, size, size)
    resample_positions(tower, size)
    depth = len(tower.blocks)
    wanted = tower.forward_features(pixels)[:, tower.num_prefix_tokens :]
    if layer != -1:
        keep = layer if layer > 0 else depth + 1 + layer
        states = tower.forward_intermediates(pixels, indices=[keep - 1], output_fmt="NLC", intermediates_only=True)
        wanted = states[0]
    vision = VisionEncoder(tower, layer)
    torch.testing.assert_close(vision(pixels), wanted)
    save_tower(vision, tmp_path / "vision")
    assert count_patches(tmp_path / "vision", size) == wanted.shape[1]


def test_a_network_without_a_list_of_layers_says_so():
    tower = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    with pytest.raises(ConfigError, match="has no list of transformer layers"):
        VisionEncoder(tower, -2)


def test_a_folder_that_brings_its_own_code_is_refused_without_a_question(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "my_vit", "auto_map": {"AutoModel": "code.Mine"}}')
    with pytest.raises(ConfigError, match=r"model\.vision\.path=.*: a model of type my_vit, which transformers does"):
        load_tower(tmp_path, torch.float32)


def test_bin_files_are_read_as_tensors_only_and_say_so(tmp_path):
    tower = AutoModel.from_config(Config.for_model("clip_vision_model", **SIZES, image_size=56))
    tower.config.save_pretrained(tmp_path)
    torch.save(tower.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_tower(tmp_path, torch.float32)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in tower.state_dict().items())
    assert "read as tensors only" in " ".join(notes(tmp_path))


def test_bin_files_that_hold_code_are_not_run(tmp_path):
    AutoModel.from_config(Config.for_model("clip_vision_model", **SIZES, image_size=56)).config.save_pretrained(
        tmp_path
    )
    torch.save({"embeddings.class_embedding": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights.?only|Unsupported|safe"):
        load_tower(tmp_path, torch.float32)
    assert not Harmful.was_run


class Harmful:
    """Run something when it is unpickled."""

    was_run = False

    def __reduce__(self):
        return run_it, ()


def run_it():
    """Show that code of a file was run."""
    Harmful.was_run = True
