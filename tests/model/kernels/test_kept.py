"""A spared layer keeps less, and has the outputs and gradients that it has otherwise."""

from types import SimpleNamespace

import pytest
import torch
from alive import Alive
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

from vlm_tune.model.kernels.attention import NAME, Segments
from vlm_tune.model.kernels.attention_cpu import lay_out
from vlm_tune.model.kernels.elementwise import join_gates
from vlm_tune.model.kernels.kept import made_again, spare
from vlm_tune.model.kernels.lora import spare_casts
from vlm_tune.model.kernels.norm import join_norms
from vlm_tune.model.parts.stage import keep_less

WIDTH, INNER, HEADS, KV_HEADS, RANK = 48, 160, 6, 2, 4
CONFIG = LlamaConfig(
    hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
    num_hidden_layers=1, vocab_size=8, attn_implementation=NAME,
)  # fmt: skip
LENGTHS = [24, 40]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAINED = {
    "lora": {"target_modules": ALL},
    "some lora": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "dora": {"target_modules": ALL, "use_dora": True},
    "dropout": {"target_modules": ALL, "lora_dropout": 0.3},
    "full": None,
}


def make_layer(trained, dtype, spared):
    """Make a decoder layer as a stage leaves it, and the embedding of positions."""
    torch.manual_seed(0)
    model = LlamaModel(CONFIG).requires_grad_(trained is None).to(torch.float32 if trained is None else dtype)
    if trained is not None:
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=8, **trained), model)
        for name, weight in model.named_parameters():
            if "lora" in name or "magnitude" in name:
                weight.data = weight.data.float()
            if "lora_B" in name:
                nn.init.normal_(weight)
        spare_casts(model)
    if spared:
        join_norms(model)
        join_gates(model)
        spare(model.layers[0])
    return model.layers[0], model.rotary_emb


def run(trained, dtype, spared, repeats=1):
    """Run a layer; return its output, the gradients by its input and weights, and the bytes that were kept for them."""
    layer, rotary = make_layer(trained, dtype, spared)
    lengths = LENGTHS * repeats
    inputs = torch.randn(1, sum(lengths), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    embedded = rotary(inputs, torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0))
    torch.manual_seed(2)  # dropout
    lay_out(tuple(lengths), HEADS, KV_HEADS, (-1,) * len(lengths))  # once for all layers
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), Alive() as alive:
        output = layer(inputs, position_embeddings=embedded, segments=Segments(lengths))
    kept = alive.num_bytes() - output.nbytes
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [inputs, *weights], direction)], kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_a_spared_layer_equals_the_plain_one(trained, dtype):
    (ours, kept), (theirs, before) = (run(trained, dtype, spared) for spared in (True, False))
    close = {"atol": 1e-6, "rtol": 0} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max(), **close)
    assert kept < before


@pytest.mark.parametrize("trained", ["lora", "some lora"])
def test_a_layer_keeps_no_more_of_a_token_than_it_must(trained):
    options = TRAINED[trained]
    few, many = (run(options, torch.bfloat16, True, repeats)[1] for repeats in (1, 3))
    numbers = {
        "what attention adds to": WIDTH,  # the layer's input, which the first norm shares, is the caller's
        "queries, keys, values": WIDTH + 2 * WIDTH * KV_HEADS // HEADS,
        "shares": HEADS * sum(length**2 for length in LENGTHS) / sum(LENGTHS),
        "attention's output": WIDTH,
        "gate and up": 2 * INNER,
        "low-rank inputs": RANK * len(options["target_modules"]),
        "scales of two norms, in float32": 2 * 2,
    }
    assert (many - few) / (2 * sum(LENGTHS)) <= 2 * sum(numbers.values())


# ------------------------------------------------------------------------------------------------------- made again


class Twice(nn.Module):
    """Make a tensor, keep it for two products, and count how often it is made."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(3, 3)) for _ in range(2))
        self.num_made = 0

    def make(self, inputs):
        self.num_made += 1
        return inputs * 2

    def forward(self, inputs):
        made = made_again(self.make(inputs), self.make, inputs)
        return [made[1:] @ weight for weight in self.weights]


def test_what_several_keep_is_made_again_once_and_views_of_it_are_read():
    layer, inputs = Twice(), torch.randn(4, 3)
    wanted = [inputs[1:].T.mul(2) @ torch.ones(3, 3)] * 2
    spare(layer)
    outputs = layer(inputs)
    assert layer.num_made == 1
    sum(output.sum() for output in outputs).backward(retain_graph=True)
    assert layer.num_made == 2
    for weight, right in zip(layer.weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, right)
    sum(output.sum() for output in outputs).backward()
    torch.testing.assert_close(layer.weights[0].grad, 2 * wanted[0])


def test_an_input_that_was_written_into_is_an_error():
    layer, inputs = Twice(), torch.randn(4, 3)
    spare(layer)
    output = layer(inputs)[0]
    inputs.add_(1)
    with pytest.raises(AssertionError, match="was written into"):
        output.sum().backward()


@pytest.mark.parametrize(("few", "always", "num_made"), [(4, False, 1), (3, False, 2), (4, True, 2)])
def test_few_tokens_on_a_cpu_keep_what_they_did_unless_asked(few, always, num_made, monkeypatch):
    monkeypatch.setattr("vlm_tune.model.kernels.kept.FEW", few)
    layer = Twice()
    spare(layer, always)
    sum(output.sum() for output in layer(torch.randn(4, 3))).backward()
    assert layer.num_made == num_made


@pytest.mark.parametrize(("way", "num_made"), [(False, 1), ("mlp", 2)])
def test_a_stage_that_asks_for_less_memory_spares_few_tokens_too(way, num_made, monkeypatch):
    monkeypatch.setattr("vlm_tune.model.kernels.kept.FEW", 4)
    layer = Twice()
    layer.mlp = nn.Linear(3, 3)
    keep_less(SimpleNamespace(layers=[layer]), way)
    sum(output.sum() for output in layer(torch.randn(4, 3))).backward()
    assert layer.num_made == num_made


def test_a_layer_whose_weights_are_gathered_when_it_is_called_keeps_what_it_did():
    layer = Twice()
    spare(layer)
    layer.weights[0].ds_id = 0  # DeepSpeed's mark of a weight that ZeRO-3 has cut into parts
    layer(torch.randn(4, 3))[0].sum().backward()
    assert layer.num_made == 1
