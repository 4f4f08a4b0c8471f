"""LoRA's arithmetic here equals peft's own, with fewer passes."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vlm_tune.model.lora import spare_casts


def make_layer(**options):
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8, bias=False)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], **options), part)
    for name, weight in part.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the adapter
            nn.init.normal_(weight)
    return part


def outcome(part, dtype):
    """Output of a batch (2, 5, 12), and the gradients by it and by the adapter, under autocast for 16 bit."""
    inputs = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        torch.manual_seed(2)  # dropout
        output = part(inputs)
    adapter = [weight for name, weight in part.named_parameters() if "lora" in name]
    return [output, *torch.autograd.grad(output.float().square().sum(), [inputs, *adapter])]


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=["plain", "rslora", "dropout"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_equal_those_of_peft(options, dtype):
    wanted, ours = make_layer(**options), make_layer(**options)
    spare_casts(ours)
    if dtype != torch.float32:  # as in a run: the frozen base in 16 bit, the adapter in float32
        for part in (wanted, ours):
            for name, weight in part.named_parameters():
                weight.data = weight.data.to(torch.float32 if "lora" in name else dtype)
    close = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for one, other in zip(outcome(ours, dtype), outcome(wanted, dtype), strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(one / scale, other / scale, **close)


def test_a_variant_keeps_the_function_of_peft():
    part = make_layer(use_dora=True)
    before = part[0].forward
    spare_casts(part)
    assert part[0].forward == before


def test_a_merged_layer_adds_nothing_twice():
    part = make_layer()
    spare_casts(part)
    inputs = torch.randn(3, 12)
    beside = part(inputs)
    for layer in part:
        layer.merge()
    torch.testing.assert_close(part(inputs), beside)
