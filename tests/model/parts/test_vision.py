"""The encoder gives the features that its library gives, up to the layer asked for, whichever library it is."""

import pytest
import timm
import torch
from toys import save_vision
from transformers import AutoModel, CLIPVisionConfig, Dinov2Config, InternVLVisionModel, SiglipVisionConfig

from vlm_tune.data.tiles import normalize
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts.parts import save_tower
from vlm_tune.model.parts.vision import VisionEncoder, load_tower, resample_positions

PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tower(tmp_path):
    save_vision(tmp_path / "vision", num_hidden_layers=3)
    return InternVLVisionModel.from_pretrained(tmp_path / "vision").eval()


@torch.no_grad()
def test_the_last_layer_is_what_the_library_returns_without_its_class_token(tower):
    wanted = tower(PIXELS).last_hidden_state[:, 1:]
    assert torch.equal(VisionEncoder(tower, -1)(PIXELS), wanted)


@torch.no_grad()
@pytest.mark.parametrize("layer", [-2, -3, 1, 2])
def test_an_earlier_layer_is_the_librarys_hidden_state(tower, layer):
    wanted = tower(PIXELS, output_hidden_states=True).hidden_states[layer][:, 1:]
    torch.testing.assert_close(VisionEncoder(tower, layer)(PIXELS), wanted)


def test_later_layers_are_gone(tower):
    assert len(VisionEncoder(tower, -2).tower.encoder.layer) == 2


@pytest.mark.parametrize("layer", [4, -4, 0])
def test_a_layer_that_is_not_there_is_an_error(tower, layer):
    with pytest.raises(ConfigError, match=rf"model\.vision\.select_layer={layer}: the encoder has 3 layers"):
        VisionEncoder(tower, layer)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "CLIP": CLIPVisionConfig(**SIZES, image_size=56, patch_size=14),
    "DINOv2": Dinov2Config(**SIZES, image_size=56, patch_size=14),
    "SigLIP": SiglipVisionConfig(**SIZES, image_size=56, patch_size=14),
    "timm": "vit_tiny_patch16_224",
}


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_trained_encoder_gets_a_gradient(kind, layer):
    """Several devices would wait for the others' gradients of those that do not."""
    config = KINDS[kind]
    is_timm = isinstance(config, str)
    tower = timm.create_model(config, img_size=56, patch_size=14) if is_timm else AutoModel.from_config(config)
    vision = VisionEncoder(tower, layer)
    vision.requires_grad_(True)
    vision.freeze_unread()
    vision(PIXELS).square().sum().backward()
    assert not [name for name, each in vision.named_parameters() if each.requires_grad and each.grad is None]


@torch.no_grad()
def test_tiles_of_another_size_get_a_resized_table_of_positions(tower):
    # as InternVL resizes its own table: bicubic, the class token's place left as it is
    wanted = tower.embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 36, 32), 84, 84)
    resample_positions(tower, 84)
    torch.testing.assert_close(tower.embeddings.position_embeddings, wanted, atol=1e-5, rtol=1e-4)
    assert VisionEncoder(tower)(torch.zeros(1, 3, 84, 84)).shape == (1, 36, 32)


def test_tiles_of_the_same_size_leave_the_table_alone(tower):
    before = tower.embeddings.position_embeddings
    resample_positions(tower, 56)
    assert tower.embeddings.position_embeddings is before


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_network_of_timm_gives_its_features_as_patches(name):
    tower = timm.create_model(name, pretrained=False, num_classes=0).eval()
    size = tower.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(2, 3, size, size)
    vision = VisionEncoder(tower)
    features, own = vision(pixels), tower.forward_features(pixels)
    assert features.shape == (2, vision.num_patches(size), vision.width)
    last = own[0, :, -1, -1] if own.ndim == 4 else own[0, -1]
    assert torch.equal(features[0, -1], last)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_of_timm_survives_its_folder(name, tmp_path):
    tower = timm.create_model(name, pretrained=False, num_classes=0).eval()
    save_tower(VisionEncoder(tower), tmp_path / "vision")
    size = tower.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(1, 3, size, size)
    loaded = load_tower(tmp_path / "vision", torch.float32).eval()
    assert torch.equal(loaded.forward_features(pixels), tower.forward_features(pixels))


def test_a_model_with_a_network_of_timm_is_built_trained_and_asked(toys, tmp_path):
    tower = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    save_tower(VisionEncoder(tower), tmp_path / "vision")
    staged = toys.staged("stage=pretrain", f"model.vision.path={tmp_path}/vision", "model.tiles.size=64")
    loss = staged.model.vlm(staged.batch([0, 1, 6]))
    loss.backward()
    assert staged.model.vlm.projector.linear_1.weight.grad.abs().sum() > 0


def test_pixels_are_normalised_per_channel():
    white = torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)
    means = torch.tensor([0.485, 0.456, 0.406])
    spreads = torch.tensor([0.229, 0.224, 0.225])
    pixels = normalize(white, "imagenet", torch.float32)
    torch.testing.assert_close(pixels[0, :, 0, 0], (1 - means) / spreads)
