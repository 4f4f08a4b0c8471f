"""What layers keep less of changes neither loss nor gradients: MLPs in chunks, recomputed layers, inputs put away."""

import pytest
import torch
from alive import Alive
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from vlm_tune.errors import ConfigError
from vlm_tune.model.kernels.elementwise import join_gates
from vlm_tune.model.parts import chunks, layers
from vlm_tune.model.parts.chunks import chunk_mlp
from vlm_tune.model.parts.stage import keep_less, trained_parameters

ROWS = [0, 1, 2, 3, 6]
WAYS = ["mlp", "true", "offload"]
LORA = "stage.lora={rank: 4, dropout: 0}"
ALL = "model.llm.targets=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"
STAGES = {
    "projector": ["stage=pretrain"],
    "lora": ["stage=finetune", LORA, ALL],
    "lora of attention": ["stage=finetune", LORA],
    "lora of last products": ["stage=finetune", LORA, "model.llm.targets=[down_proj]", "stage.train.projector=frozen"],
    "dora": ["stage=finetune", "stage.lora={rank: 4, dropout: 0, dora: true}", ALL],
    "all": ["stage.train.vision=full", "stage.train.projector=full", "stage.train.llm=full"],
    "4 bits": ["stage=qlora", LORA, ALL],
    "8 bits": ["stage=qlora", LORA, ALL, "stage.quantize=int8"],
    "padded": ["stage=finetune", LORA, ALL, "stage.packing=false"],
    "trees": ["stage=finetune", LORA, ALL, "stage.share_prefix=on"],
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "TOKENS", 50)


def way_of(way):
    return f"stage.gradient_checkpointing.llm={way}"


def opened(toys, *overrides):
    """Build a toy of which no adapter is zero, as it is before the first step."""
    staged = toys.staged(*overrides)
    chance = torch.Generator().manual_seed(5)
    for name, weight in trained_parameters(staged.model.vlm):
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=chance)
    return staged


def learn(staged, seed=3):
    """Take the loss of a batch, and its gradients by name."""
    vlm, batch = staged.model.vlm, staged.batch(ROWS, packing=staged.config.stage.packing)
    vlm.zero_grad()
    torch.manual_seed(seed)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=staged.config.trainer.precision.value == "bf16"):
        loss = vlm(batch)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in trained_parameters(vlm)}


def require_close(found, wanted, bound=1e-5):
    """Compare losses, and gradients beside the largest number of each."""
    assert abs(found[0] - wanted[0]) <= bound * abs(wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, right in wanted[1].items():
        assert (found[1][name] is None) == (right is None), name
        if right is not None:
            assert (found[1][name] - right).abs().max() <= bound * right.abs().max().clamp(min=1e-6), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_loss_and_gradients_are_those_of_the_plain_path(toys, stage, way):
    plain, other = (learn(opened(toys, *stage, way_of(each))) for each in ("false", way))
    assert any(gradient is not None for gradient in plain[1].values())
    require_close(other, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["lora", "all", "4 bits"])
def test_so_they_are_in_16_bit(toys, stage, way):
    half = "trainer.precision=bf16"
    plain, other = (learn(opened(toys, *STAGES[stage], half, way_of(each))) for each in ("false", way))
    require_close(other, plain, 0.03)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_of_a_pack_of_one_chunk_is_that_of_the_plain_path(toys, way, monkeypatch):
    monkeypatch.setattr(chunks, "TOKENS", 10**6)
    stage = ["stage=finetune", "stage.lora={rank: 4, dropout: 0.3}", ALL]
    plain, other = (learn(opened(toys, *stage, way_of(each))) for each in ("false", way))
    require_close(other, plain)


@pytest.mark.parametrize("way", WAYS)
def test_dropout_is_the_same_in_both_passes(toys, way, monkeypatch):
    staged = opened(toys, "stage=finetune", "stage.lora={rank: 4, dropout: 0.3}", ALL, way_of(way))
    found = learn(staged)
    assert not torch.equal(learn(staged, seed=4)[0], found[0])

    def whole(mlp, forward, hidden):  # the same chunks, and autograd's own backward pass
        return torch.cat([forward(chunk[0]) for chunk in chunks._chunks((hidden.flatten(0, -2),))]).view_as(hidden)

    for layer in staged.model.vlm.llm.get_decoder().layers:
        mlp = layer.mlp
        mlp.forward = lambda hidden, mlp=mlp, forward=mlp.forward.args[1]: whole(mlp, forward, hidden)
    require_close(found, learn(staged))


def test_the_random_numbers_after_a_backward_pass_are_those_after_the_forward_pass(toys):
    staged = opened(toys, "stage=finetune", "stage.lora={rank: 4, dropout: 0.3}", ALL, way_of("mlp"))
    loss = staged.model.vlm(staged.batch(ROWS))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------- what is kept, and computed


def kept_bytes(staged):
    vlm, batch = staged.model.vlm, staged.batch(ROWS)
    with Alive() as alive:
        loss = vlm(batch)
    return alive.num_bytes() - loss.nbytes


def test_each_way_keeps_less_than_the_one_before(toys):
    sizes = [kept_bytes(opened(toys, *STAGES["lora"], way_of(way))) for way in ("false", "mlp", "true")]
    tokens = toys.staged(*STAGES["lora"]).batch(ROWS).num_tokens
    gate_and_up = 2 * 64 * 4 * tokens  # of the first of two layers; the last one's MLP runs on few tokens
    assert sizes[0] - sizes[1] >= gate_and_up
    assert sizes[2] < sizes[1]


def test_the_inputs_of_layers_alone_are_put_away(toys, monkeypatch):
    seen, put_away = [], layers.put_away
    monkeypatch.setattr(layers, "put_away", lambda tensor: seen.append(tuple(tensor.shape)) or put_away(tensor))
    staged = opened(toys, *STAGES["lora"], way_of("offload"))
    learn(staged)
    assert seen == [(1, staged.batch(ROWS).num_tokens, 32)] * 2  # of two layers


@pytest.mark.parametrize(("way", "attended"), [("mlp", 1), ("true", 2)])
def test_attention_is_computed_once_and_an_mlp_twice(toys, way, attended, monkeypatch):
    monkeypatch.setattr(chunks, "TOKENS", 10**6)
    staged = opened(toys, *STAGES["lora"], way_of(way))
    layer, seen = staged.model.vlm.llm.get_decoder().layers[0], []
    for name, module in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
        module.register_forward_hook(lambda *given, name=name: seen.append(name))
    learn(staged)
    assert (seen.count("attention"), seen.count("mlp")) == (attended, 2)


class Largest(TorchDispatchMode):
    """Note the most elements of any tensor that is made or read."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_iter((args, kwargs, made)):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("config", [LlamaConfig, Phi3Config])
def test_the_largest_tensor_of_an_mlp_is_that_of_a_chunk(config):
    width, inner, tokens = 4, 1024, 640  # 13 chunks of 50 tokens or 49
    layer, sizes = nn.Module(), {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 2}
    kind = LlamaMLP if config is LlamaConfig else Phi3MLP
    layer.mlp, joined = kind(config(**sizes)), 1 if config is LlamaConfig else 2  # Phi-3's gate and up are one product
    join_gates(layer)
    hidden = torch.randn(2, tokens // 2, width, requires_grad=True)
    right = torch.autograd.grad(layer.mlp(hidden).square().sum(), [hidden, *layer.mlp.parameters()])
    assert chunk_mlp(layer)
    with Largest() as largest:
        made = layer.mlp(hidden)
        found = torch.autograd.grad(made.square().sum(), [hidden, *layer.mlp.parameters()])
    assert largest.elements == 50 * inner * joined
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_gradients_it_is_chunked_too():
    layer = nn.Module()
    layer.mlp = LlamaMLP(LlamaConfig(hidden_size=4, intermediate_size=1024, num_attention_heads=2))
    hidden = torch.randn(1, 640, 4)
    right = layer.mlp(hidden)
    assert chunk_mlp(layer)
    with torch.no_grad(), Largest() as largest:
        torch.testing.assert_close(layer.mlp(hidden), right)
    assert largest.elements == 50 * 1024


def test_an_mlp_whose_weights_are_gathered_when_a_layer_is_called_stays_whole():
    layer, seen = nn.Module(), []
    layer.mlp = nn.Linear(3, 3)
    layer.mlp.forward = lambda hidden: seen.append(len(hidden)) or linear(hidden, layer.mlp.weight)
    chunk_mlp(layer)
    layer.mlp.weight.ds_id = 0  # DeepSpeed's mark of a weight that ZeRO-3 has cut into parts
    layer.mlp(torch.randn(120, 3))
    assert seen == [120]


def test_a_layer_without_an_mlp_of_this_name_is_an_error():
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"gradient_checkpointing\.llm=mlp: Linear has no `mlp`; set it to true"):
        keep_less(decoder, "mlp")
    keep_less(decoder, True)
