"""LoRA's arithmetic: peft's layers and weights, without the casts and passes of their forward function.

peft computes `base(x) + lora_B(lora_A(dropout(x))) * scaling`, with x cast to float32 and, under autocast, back again;
at the widths of small models these passes cost as much as the products. Here the products alone remain.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"  # the name that peft gives an adapter by itself


def spare_casts(part: nn.Module) -> None:
    """Let every plain LoRA layer of a part compute by `AddLowRank`; variants (DoRA) keep peft's own function."""
    layers: list[Any] = [module for module in part.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if ADAPTER not in layer.lora_variant:
            layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    if layer.disable_adapters or layer.merged:
        output: Tensor = type(layer).forward(layer, x, *args, **options)
        return output
    base = layer.base_layer(x, *args, **options)
    if type(layer.base_layer) is not nn.Linear:  # what another kind of layer returns may not be changed in place
        base = base.clone()
    low = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    output = AddLowRank.apply(  # type: ignore[no-untyped-call]
        base, layer.lora_dropout[ADAPTER](x), *low, layer.scaling[ADAPTER]
    )
    return output


class AddLowRank(torch.autograd.Function):
    """Add scaling * (x A^T) B^T to y, in place: y (..., O), x (..., I), A (r, I), B (O, r) -> (..., O).

    A and B are kept in float32; the products are in the type of y. Source: LoRA, arXiv 2106.09685.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:  # noqa: D102
        rows = x.flatten(0, -2).to(y.dtype)
        down, up = a.to(y.dtype), (b * scaling).to(y.dtype)
        low = rows @ down.T
        y.view(-1, y.shape[-1]).addmm_(low, up.T)
        ctx.mark_dirty(y)
        ctx.save_for_backward(rows, low, down, up)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, a.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:  # noqa: D102
        rows, low, down, up = ctx.saved_tensors
        d_y = gradients[0].flatten(0, -2)
        d_low = d_y @ up
        d_x = (d_low @ down).view(ctx.shape).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        d_a, d_b = (d_low.T @ rows).to(ctx.dtypes[1]), (low.T @ d_y).T.to(ctx.dtypes[1]).mul_(ctx.scaling)
        return gradients[0], d_x, d_a, d_b, None
