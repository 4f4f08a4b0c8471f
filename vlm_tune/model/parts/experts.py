"""A mixture's experts: found in any decoder of transformers, and with LoRA computed without a copy of their weights.

transformers keeps all experts of a layer in two parameters, (E, 2 I, D) and (E, D, I), which are no linear layers.
peft adds LoRA to them (`target_parameters`) by making the sum of weights and adapters in each forward pass, as large as
the weights, and autograd keeps it. Here the low-rank products are added to the outputs of the weights' own.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import grouped_mm
from transformers import PreTrainedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, load_balancing_loss_func

from vlm_tune.model.kernels.lora import ADAPTER

WEIGHTS = ("gate_up_proj", "down_proj")


def expert_layers(part: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that hold all experts of a layer, by name."""
    return {
        name: module
        for name, module in part.named_modules()
        if all(isinstance(module._parameters.get(weight), nn.Parameter) for weight in WEIGHTS)
    }


def taken_share(config: PreTrainedConfig) -> float:
    """Return which share of its experts a token takes; 1 for a model without any."""
    num_experts = getattr(config, "num_local_experts", 0)
    return config.num_experts_per_tok / num_experts if num_experts else 1.0


def unevenness(router_logits: tuple[Tensor, ...], config: PreTrainedConfig, is_token: Tensor | None) -> Tensor:
    """Return how unevenly tokens use the experts, over all layers: from k, the experts that a token takes, upwards.

    `router_logits` are those of each layer (B*L, E); `is_token` (B, L) leaves padding out. With f the share of tokens
    that take an expert, and p its mean probability, E * sum(f * p). Source: Switch Transformers, arXiv 2101.03961,
    equations 4 to 6, as transformers and InternVL compute it: over the tokens of one forward pass.
    """
    assert router_logits, f"the routers of a {config.model_type} are not recorded"
    made: Tensor = load_balancing_loss_func(
        router_logits, config.num_local_experts, config.num_experts_per_tok, is_token
    )
    return made


def has_adapters(part: nn.Module) -> bool:
    """Return whether peft adapts the experts of a part."""
    return any(isinstance(module, ParamWrapper) for module in part.modules())


def join_products(part: nn.Module) -> None:
    """Let experts with LoRA compute by the functions below; peft's wrappers, one a weight, stand around each other."""
    for parent in part.modules():
        for child in parent.children():
            if isinstance(child, ParamWrapper) and not isinstance(parent, ParamWrapper):
                child.forward = partial(_forward, child)  # type: ignore[method-assign]


def _forward(wrapper: Any, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    adapters, base = {}, wrapper
    while isinstance(base, ParamWrapper):
        adapters[base.parameter_name] = base
        base = base.base_layer
    if not isinstance(base, Qwen3MoeExperts) or not all(_is_plain(each) for each in adapters.values()):
        made: Tensor = type(wrapper).forward(wrapper, hidden, chosen, shares)
        return made
    return _products(base, adapters, (hidden, chosen, shares))


def _is_plain(wrapper: Any) -> bool:
    """Return whether an adapter acts, and torch's grouped products take it: rows of 16 bytes or more, no float64."""
    weight, rank = wrapper.get_param(), wrapper.r[ADAPTER]
    is_aligned = rank * weight.element_size() % 16 == 0
    if wrapper.disable_adapters or wrapper.merged or not is_aligned or weight.dtype is torch.float64:
        return False
    return not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (8, 0)


def _products(base: Any, adapters: dict[str, Any], given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run experts on hidden states (L, D), of which each takes k, `chosen` (L, k), by their `shares` (L, k): (L, D)."""
    hidden, chosen, shares = given
    taken, order = chosen.flatten().sort()  # (L*k,), each expert's rows side by side
    experts = torch.arange(base.num_experts, device=taken.device)
    ends = torch.searchsorted(taken, experts, right=True).to(torch.int32)  # (E,)

    def product(rows: Tensor, name: str) -> Tensor:
        weight = getattr(base, name)  # (E, O, I)
        rows = rows.to(weight.dtype)
        made = grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        if name not in adapters:
            return made
        down, up = _factors(adapters[name], weight)
        low = grouped_mm(rows, down.transpose(1, 2), offs=ends) * adapters[name].scaling[ADAPTER]  # (L*k, r)
        return made + grouped_mm(low, up.transpose(1, 2), offs=ends)

    gate, up = product(hidden[order // chosen.shape[1]], WEIGHTS[0]).chunk(2, dim=-1)
    made = product(base.act_fn(gate) * up, WEIGHTS[1]) * shares.flatten()[order].unsqueeze(1)  # (L*k, D)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return made[back].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


def _factors(wrapper: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Take the adapters of the E experts out of peft's layers, A (E*r, I) and B (O, r*E): (E, r, I), (E, O, r)."""
    down, up = wrapper.lora_A[ADAPTER].weight.to(weight.dtype), wrapper.lora_B[ADAPTER].weight.to(weight.dtype)
    num_experts = len(weight)
    apart = up.view(len(up), -1, num_experts).permute(2, 0, 1)  # peft counts experts first in A, ranks first in B
    return down.view(num_experts, -1, down.shape[1]), apart.contiguous()
