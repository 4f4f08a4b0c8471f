"""Recomputed layers give the same gradients; skipped layers are skipped as often as asked, in training alone."""

import pytest
import torch
from alive import Alive
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_tune.errors import ConfigError
from vlm_tune.model.parts.layers import drop_paths
from vlm_tune.model.parts.stage import trained_parameters
from vlm_tune.model.parts.vision import layer_list

FULL = "stage.train={vision: full, projector: full, llm: lora}"
ROWS = [0, 1, 6]


def gradients(vlm, batch):
    vlm.zero_grad()
    torch.manual_seed(3)  # dropout, noise and skipped layers draw from here
    vlm(batch).backward()
    return {name: weight.grad.clone() for name, weight in trained_parameters(vlm) if weight.grad is not None}


def saved_bytes(vlm, batch):
    """Count what is kept of one forward pass."""
    with Alive() as alive:
        loss = vlm(batch)
    return alive.num_bytes() - loss.nbytes


PARTS = ["vision", "projector", "llm"]
RANDOM = ("stage.lora.dropout=0.2", "stage.drop_path=0.4", "stage.neftune=5")


@pytest.mark.parametrize("part", PARTS)
def test_recomputed_layers_give_the_very_same_gradients(toys, part):
    plain = toys.staged("stage=finetune", FULL, *RANDOM)
    other = toys.staged("stage=finetune", FULL, *RANDOM, f"stage.gradient_checkpointing.{part}=true")
    found = [gradients(run.model.vlm, run.batch(ROWS)) for run in (plain, other)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("part", PARTS)
def test_recomputed_layers_keep_less(toys, part):
    plain = toys.staged("stage=finetune", FULL)
    other = toys.staged("stage=finetune", FULL, f"stage.gradient_checkpointing.{part}=true")
    assert saved_bytes(other.model.vlm, other.batch(ROWS)) < saved_bytes(plain.model.vlm, plain.batch(ROWS))


def test_a_frozen_language_model_is_recomputed_too(toys):
    # a projector learns through it, and its activations are most of what pretraining keeps
    plain, other = (
        toys.staged("stage=pretrain", f"data.path={toys.data / 'train.jsonl'}", *more)
        for more in ((), ("stage.gradient_checkpointing.llm=true",))
    )
    assert saved_bytes(other.model.vlm, other.batch(ROWS)) < 0.7 * saved_bytes(plain.model.vlm, plain.batch(ROWS))


def test_a_frozen_encoder_stays_outside_autograd(toys):
    vlm = toys.staged(
        "stage=finetune", "stage.gradient_checkpointing={vision: true, projector: true, llm: true}"
    ).model.vlm
    features = vlm.see(torch.zeros(1, 56, 56, 3, dtype=torch.uint8))
    assert features.grad_fn is None
    assert not any("forward" in vars(layer) for layer in layer_list(vlm.vision.tower, ""))


# ------------------------------------------------------------------------------------------------------- drop path


class Branches(nn.Module):
    """A layer whose branches add one each."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = One(), One()

    def forward(self, states):
        states = states + self.attention(states)[0]
        return states + self.mlp(states)


class One(nn.Module):
    def forward(self, states):
        ones = torch.ones_like(states)
        return (ones, None) if states.max() < 0.5 else ones


class Tower(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(Branches() for _ in range(depth))


def test_the_last_layer_is_skipped_as_often_as_asked_and_the_first_never():
    torch.manual_seed(0)
    tower = Tower(3)
    drop_paths(tower, 0.5)
    tower.train()
    states = torch.zeros(4000, 1, 1)
    shares = [float((layer.mlp(states + 1) == 0).float().mean()) for layer in tower.layers]
    assert shares == pytest.approx([0, 0.25, 0.5], abs=0.03)
    assert float(tower.layers[2].mlp(states + 1).mean()) == pytest.approx(1, abs=0.05)  # the rest is scaled up
    assert torch.equal(tower.layers[2].eval().mlp(states + 1), torch.ones(4000, 1, 1))


def test_branches_of_real_layers_are_found_and_a_tile_is_skipped_whole():
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    tower = CLIPVisionModel(config)
    drop_paths(tower, 0.5)
    layer = layer_list(tower, "")[1].train()
    torch.manual_seed(1)
    branch = layer.mlp(torch.randn(64, 5, 16))
    skipped = (branch == 0).flatten(1).all(1)
    assert 0 < int(skipped.sum()) < 64
    assert not (branch[~skipped] == 0).any()


def test_an_encoder_without_layers_is_an_error():
    with pytest.raises(ConfigError, match=r"stage\.drop_path: Linear has no list of transformer layers"):
        drop_paths(nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("stage.drop_path=0.1", r"stage\.drop_path=0\.1 concerns a trained encoder but stage\.train\.vision=frozen"),
        ("stage.layer_decay=0.9", r"stage\.layer_decay=0\.9 concerns a trained encoder but stage\.train\.vision=froz"),
    ],
)
def test_what_concerns_a_frozen_encoder_is_an_error(toys, key, said):
    with pytest.raises(ConfigError, match=said):
        toys.staged("stage=finetune", key)


# ----------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("packing", [True, False])
def test_noise_is_bounded_by_each_samples_own_length_and_leaves_pictures_alone(toys, packing):
    run = toys.staged("stage=finetune", "stage.neftune=5")
    vlm, batch = run.model.vlm, run.batch(ROWS, packing=packing)
    noise = vlm._noise(batch)
    rows = (
        noise[0].split(batch.segments)
        if packing
        else [row[: int(positions.max()) + 1] for row, positions in zip(noise, batch.position_ids, strict=True)]
    )
    for row in rows:
        bound = 5 / (len(row) * 32) ** 0.5
        assert 0.9 * bound < float(row.abs().max()) <= bound
    assert not noise[batch.input_ids == vlm.context_id].any()


def test_noise_is_for_training_alone(toys):
    run = toys.staged("stage=finetune", "stage.neftune=5", "stage.lora.dropout=0")
    vlm, batch = run.model.vlm, run.batch(ROWS)
    with torch.no_grad():
        assert not torch.equal(vlm(batch), vlm(batch))
        vlm.eval()
        assert torch.equal(vlm(batch), vlm(batch))
