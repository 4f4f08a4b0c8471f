"""LoRA's arithmetic on a mixture's experts equals peft's own; how unevenly experts are used follows its formula."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from vlm_tune.export.merge import merge_adapters
from vlm_tune.model.parts.experts import expert_layers, join_products, taken_share, unevenness

CONFIG = Qwen3MoeConfig(hidden_size=24, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2)
CONFIG._experts_implementation = "grouped_mm"
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def make_block(targets, dtype=torch.float32):
    """Make one layer's mixture with adapters; its last expert is taken by no token."""
    torch.manual_seed(0)
    part = nn.ModuleList([Qwen3MoeSparseMoeBlock(CONFIG)]).requires_grad_(False)
    for weight in part.parameters():
        nn.init.normal_(weight, std=0.2)
    part[0].gate.weight.data[-1] = 0
    part[0].gate.weight.data[:-1, 0] += 4
    adapter = LoraConfig(r=8, lora_alpha=6, target_modules=[], target_parameters=targets)
    inject_adapter_in_model(adapter, part)
    for name, weight in part.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the adapter
            nn.init.normal_(weight)
        weight.data = weight.data.to(torch.float32 if "lora" in name else dtype)
    return part


def outcome(part, dtype=torch.float32):
    """Output of hidden states (1, 30, 24), and the gradients by them and by the adapters."""
    inputs = torch.randn(1, 30, 24, generator=torch.Generator().manual_seed(1))
    inputs[..., 0] = 1
    inputs.requires_grad_()
    output = part[0](inputs.to(dtype))
    adapter = [weight for name, weight in part.named_parameters() if "lora" in name]
    return [output, *torch.autograd.grad(output.float().square().sum(), [inputs, *adapter])]


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate and up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_equal_those_of_peft(targets, dtype):
    wanted, ours = make_block(targets, dtype), make_block(targets, dtype)
    join_products(ours)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for one, other in zip(outcome(ours, dtype), outcome(wanted, dtype), strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, **close)


def test_no_sum_of_weights_and_adapters_is_kept():
    kept = []
    part = make_block(BOTH)
    join_products(part)
    own = {weight.data_ptr() for weight in part.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        outcome(part)
    whole = [each for each in kept if each.ndim == 3 and each.numel() >= 6 * 16 * 24 and each.data_ptr() not in own]
    assert not whole


@torch.no_grad()
def test_merged_experts_have_no_layer_around_them_and_the_same_output():
    part = make_block(BOTH)
    join_products(part)
    inputs = torch.randn(1, 30, 24)
    before = part[0](inputs)
    assert merge_adapters(part) == 2
    assert list(expert_layers(part)) == ["0.experts"]
    assert not [name for name, _ in part.named_parameters() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(part[0](inputs), before, atol=1e-5, rtol=1e-5)


def test_even_use_costs_as_many_as_a_token_takes_and_uneven_use_more():
    even = torch.zeros(6, 6)
    even[range(6), range(6)] = even[range(6), [1, 2, 3, 4, 5, 0]] = 1.0  # each expert is taken by two of six tokens
    assert float(unevenness((even, even), CONFIG, None)) == pytest.approx(2)
    assert float(unevenness((even[:1].repeat(6, 1),) * 2, CONFIG, None)) > 2.5


def test_padding_does_not_count_as_use():
    logits = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    is_token = torch.tensor([[True, True, True, False], [True, True, False, False]])
    found = unevenness((logits,), CONFIG, is_token)
    torch.testing.assert_close(found, unevenness((logits[is_token.flatten()],), CONFIG, None))


def test_a_model_without_experts_takes_all_of_its_weights():
    assert taken_share(CONFIG) == pytest.approx(2 / 6)
    assert taken_share(Qwen3MoeConfig(num_experts=0)) == 1
