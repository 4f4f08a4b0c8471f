"""Pixel shuffle is what its source says, token by token; a new projector speaks in the language model's range."""

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm_tune.config.schema import ProjectorConfig
from vlm_tune.errors import ConfigError
from vlm_tune.model.layouts import parts
from vlm_tune.model.parts.projector import Projector, QFormer, pixel_shuffle, tokens_per_tile

SMALL = {"num_queries": 5, "qformer_layers": 2, "qformer_width": 64}


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
        ("qformer", [QFormer, nn.Linear]),
    ],
)
def test_a_kind_has_the_layers_of_its_source(kind, layers):
    projector = Projector(ProjectorConfig(kind=kind, **SMALL), 8, 24)
    assert [type(layer) for layer in projector.children() if not isinstance(layer, nn.Identity)] == layers


@pytest.mark.parametrize("kind", ["mlp", "mlp2x_gelu", "linear"])
def test_a_projector_makes_tokens_of_the_models_width(kind):
    assert Projector(ProjectorConfig(kind=kind, shuffle=2), 8, 24)(torch.randn(3, 16, 8)).shape == (3, 4, 24)


def test_an_unknown_kind_is_an_error_that_lists_the_known():
    with pytest.raises(
        ConfigError, match=r"model\.projector\.kind=resampler: no such projector\. There are: mlp, mlp2x"
    ):
        Projector(ProjectorConfig(kind="resampler"), 8, 24)


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


# --------------------------------------------------------------------------------------------------------- the Q-Former


@pytest.fixture
def qformer():
    torch.manual_seed(0)
    return Projector(ProjectorConfig(kind="qformer", **SMALL), 8, 24).eval()


@pytest.mark.parametrize("num_patches", [1, 16, 20])
def test_queries_make_as_many_tokens_of_any_tile(qformer, num_patches):
    assert qformer(torch.randn(3, num_patches, 8)).shape == (3, 5, 24)
    assert tokens_per_tile(qformer.config, num_patches) == 5


@torch.no_grad()
def test_the_q_former_is_that_of_transformers(qformer):
    config = Blip2QFormerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256, encoder_hidden_size=8
    )
    plain = Blip2QFormerModel(config).eval()
    plain.load_state_dict(qformer.reader.layers.state_dict())
    features = torch.randn(2, 16, 8)
    normed = torch.nn.functional.layer_norm(features, (8,))
    read = plain(query_embeds=qformer.reader.queries.expand(2, -1, -1), encoder_hidden_states=normed)[0]
    assert torch.equal(qformer(features), qformer.linear_1(read))


@torch.no_grad()
def test_each_query_reads_something_of_its_own(qformer):
    tokens = qformer(torch.randn(1, 16, 8))[0]
    assert torch.pdist(tokens).min() > 1e-4


@pytest.mark.parametrize(
    ("vision_width", "llm_width", "millions"),
    [(1024, 2560, 104), (1408, 2560, 107), (1408, 4096, 108)],
    ids=["ViT-L OPT-2.7B", "ViT-g OPT-2.7B", "ViT-g OPT-6.7B"],
)
def test_the_size_is_that_of_the_paper(vision_width, llm_width, millions):
    # BLIP-2 (arXiv 2301.12597), table 2, "#Trainable Params": the Q-Former and the linear layer behind it
    with torch.device("meta"):
        projector = Projector(ProjectorConfig(kind="qformer"), vision_width, llm_width)
    assert round(sum(weight.numel() for weight in projector.parameters()) / 1e6) == millions


def test_a_width_that_heads_do_not_divide_is_an_error():
    with pytest.raises(ConfigError, match=r"model\.projector\.qformer_width=100: set a multiple of 64"):
        QFormer(ProjectorConfig(kind="qformer", qformer_width=100), 8)


QFORMER = "model.projector={kind: qformer, shuffle: 1, num_queries: 5, qformer_layers: 2, qformer_width: 64}"


def test_a_model_with_a_q_former_is_trained_saved_and_loaded(toys, tmp_path):
    staged = toys.staged("stage=pretrain", QFORMER)
    vlm, batch = staged.model.vlm, staged.batch([0, 1, 6])
    assert int((batch.input_ids == vlm.context_id).sum()) == 5 * len(batch.tiles)
    optimizer = torch.optim.AdamW(vlm.projector.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = vlm(batch)
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None for weight in vlm.projector.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    parts.save(vlm, staged.model.tokenizer, tmp_path)
    loaded = ("stage=pretrain", f"model.path={tmp_path}", "model.vision.path=null", "model.llm.path=null")
    again = toys.staged(*loaded).model
    vlm.eval()
    again.vlm.eval()
    with torch.no_grad():
        assert torch.equal(again.vlm(batch), vlm(batch))
    assert again.encoder.settings == staged.model.encoder.settings
