"""Pixel shuffle is what its source says, token by token; a new projector speaks in the language model's range."""

import pytest
import torch
from torch import nn

from vlm_tune.config.schema import ProjectorConfig
from vlm_tune.errors import ConfigError
from vlm_tune.model.projector import Projector, pixel_shuffle


def by_hand(features, shuffle, version):
    """Fold blocks one at a time: (T, P, C) -> (T, P/r^2, r^2*C)."""
    num_tiles, num_patches, _ = features.shape
    side = int(num_patches**0.5)
    blocks = side // shuffle
    tiles = []
    for tile in features.view(num_tiles, side, side, -1):
        tokens = {}
        for row in range(blocks):
            for column in range(blocks):
                patches = [
                    tile[row * shuffle + down, column * shuffle + right]
                    for down in range(shuffle)
                    for right in range(shuffle)
                ]
                tokens[row, column] = torch.cat(patches)
        order = [(row, column) for row in range(blocks) for column in range(blocks)]
        if version == "v1":  # the first InternVL 1.5 reads the blocks column by column
            order = [(row, column) for column in range(blocks) for row in range(blocks)]
        tiles.append(torch.stack([tokens[place] for place in order]))
    return torch.stack(tiles)


def internvl(features, shuffle, version):
    """Do as `modeling_internvl_chat.py:pixel_shuffle` does, with scale 1 / shuffle: copied, not understood."""
    side = int(features.shape[1] ** 0.5)
    x, scale = features.reshape(features.shape[0], side, side, -1), 1 / shuffle
    n, w, h, c = x.size()
    x = x.view(n, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(h * scale), int(w * scale), int(c / (scale * scale)))
    if version == "v2":
        x = x.permute(0, 2, 1, 3).contiguous()
    return x.reshape(n, -1, x.shape[-1])


@pytest.mark.parametrize("reference", [by_hand, internvl], ids=lambda reference: reference.__name__)
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("side", "shuffle"), [(4, 2), (6, 2), (6, 3), (8, 4), (32, 2)])
def test_pixel_shuffle_equals_the_reference(side, shuffle, version, reference):
    features = torch.randn(2, side * side, 5)
    assert torch.equal(pixel_shuffle(features, shuffle, version), reference(features, shuffle, version))


def test_a_shuffle_of_one_changes_nothing():
    features = torch.randn(2, 16, 5)
    assert pixel_shuffle(features, 1) is features


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("mlp", [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]),
        ("mlp2x_gelu", [nn.Linear, nn.GELU, nn.Linear]),
        ("linear", [nn.Linear]),
    ],
)
def test_a_kind_has_the_layers_of_its_source(kind, layers):
    projector = Projector(ProjectorConfig(kind=kind), 8, 24)
    assert [type(layer) for layer in projector.children() if not isinstance(layer, nn.Identity)] == layers


@pytest.mark.parametrize("kind", ["mlp", "mlp2x_gelu", "linear"])
def test_a_projector_makes_tokens_of_the_models_width(kind):
    assert Projector(ProjectorConfig(kind=kind, shuffle=2), 8, 24)(torch.randn(3, 16, 8)).shape == (3, 4, 24)


def test_an_unknown_kind_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"model\.projector\.kind=qformer: no such projector\. There are: mlp, mlp2x"):
        Projector(ProjectorConfig(kind="qformer"), 8, 24)


def test_a_new_projector_speaks_as_loud_as_the_words():
    torch.manual_seed(0)
    embeddings = torch.randn(500, 24) * 0.07
    projector = Projector(ProjectorConfig(kind="mlp"), 64, 24)
    projector.match_scale(embeddings)
    spread = projector(torch.randn(8, 16, 64)).std()
    assert 0.5 < float(spread / embeddings.std()) < 2


def test_a_tile_does_not_see_another():
    projector = Projector(ProjectorConfig(), 8, 24)
    features = torch.randn(2, 16, 8)
    torch.testing.assert_close(projector(features)[1:], projector(features[1:]))
