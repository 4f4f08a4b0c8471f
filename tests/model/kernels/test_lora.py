"""LoRA's arithmetic here equals peft's own, with fewer passes."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vlm_tune.model.kernels.lora import _draw_mask, spare_casts


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


class OurMask(nn.Module):
    """Drop what our function would drop."""

    is_drawn_once = False
    drawn = None

    def forward(self, inputs):
        if self.drawn is None or not self.is_drawn_once:
            self.drawn = _draw_mask(inputs, 0.3)
        return inputs * self.drawn / 0.7


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=["plain", "rslora", "dropout"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_equal_those_of_peft(options, dtype):
    wanted, ours = make_layer(**options), make_layer(**options)
    spare_casts(ours)
    if "lora_dropout" in options:
        for layer in wanted:
            layer.lora_dropout["default"] = OurMask()
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


def test_a_layer_whose_weights_are_gathered_when_it_is_called_is_called():
    part = make_layer()
    spare_casts(part)
    inputs, calls = torch.randn(3, 12), []
    beside = part(inputs)
    for layer in part:
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
        layer.base_layer.weight.ds_id = 0  # DeepSpeed's mark of a weight that ZeRO-3 has cut into parts
    torch.testing.assert_close(part(inputs), beside)
    assert len(calls) == 2


class Packed(nn.Linear):
    """A layer that has a product of its own, as those of 4 and 8 bit have."""


class Attention(nn.Module):
    """Three layers that read the same input, as in a decoder."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = kind(12, 16), kind(12, 8), nn.Linear(12, 8, bias=False)

    def forward(self, inputs):
        return torch.cat([self.v_proj(inputs), self.q_proj(inputs), self.k_proj(inputs)], dim=-1)


def make_attention(targets, kind=nn.Linear, **options):
    torch.manual_seed(0)
    part = nn.Sequential(Attention(kind)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options), part)
    for name, weight in part.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    return part


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("kind", [nn.Linear, Packed], ids=["plain", "beside packed ones"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_of_one_input_equal_those_of_peft(targets, kind, dropout):
    wanted, ours = (make_attention(targets, kind, lora_dropout=dropout) for _ in range(2))
    spare_casts(ours)
    if dropout:  # the layers that are computed together share one mask
        mask = OurMask()
        mask.is_drawn_once = len(targets) == 3
        for name in targets:
            getattr(wanted[0], name).lora_dropout["default"] = mask
    for one, other in zip(outcome(ours, torch.float32), outcome(wanted, torch.float32), strict=True):
        torch.testing.assert_close(one / other.abs().max(), other / other.abs().max())


def test_layers_of_one_input_read_a_new_input_anew_and_hold_none():
    part = make_attention(["q_proj", "k_proj", "v_proj"])
    spare_casts(part)
    readers = part[0].q_proj.forward.args[1].func.__self__
    first, second = torch.randn(3, 12), torch.randn(3, 12)
    alone = part[0].k_proj(second)
    assert torch.equal(part[0].k_proj(second), alone)  # asked twice
    part(first)
    assert readers.input is None
    assert torch.equal(part(second)[:, 24:], alone)


def test_a_mask_drops_the_share_that_was_asked_for():
    torch.manual_seed(0)
    mask = _draw_mask(torch.empty(400, 501), 0.05)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(float((mask == 0).float().mean()) - 0.05) < 0.002
    assert not torch.equal(mask, _draw_mask(mask, 0.05))


def test_no_adapter_is_dropped_in_eval_mode():
    part = make_layer(lora_dropout=0.5)
    spare_casts(part)
    part.eval()
    inputs = torch.randn(3, 12)
    assert torch.equal(part(inputs), part(inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_rows_at_all_have_no_outputs_and_gradients_of_zero(dropout):
    """A part of a pack has none for its last MLP where it holds no answer."""
    part = make_layer(lora_dropout=dropout)
    spare_casts(part)
    inputs = torch.zeros(1, 0, 12, requires_grad=True)
    output = part(inputs)
    assert output.shape == (1, 0, 8)
    adapter = [weight for name, weight in part.named_parameters() if "lora" in name]
    assert all(not each.any() for each in torch.autograd.grad(output.sum(), [inputs, *adapter]))
