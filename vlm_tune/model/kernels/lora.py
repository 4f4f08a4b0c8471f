"""LoRA's arithmetic: peft's layers and weights, without the casts and passes of their forward function.

peft computes `base(x) + lora_B(lora_A(dropout(x))) * scaling`, with x cast to float32 and, under autocast, back again;
at the widths of small models these passes cost as much as the products. Here the products alone remain, and layers that
read the same input are computed together.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.functional import linear

ADAPTER = "default"  # the name that peft gives an adapter by itself
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as every decoder of transformers names them


def spare_casts(part: nn.Module) -> None:
    """Let plain LoRA layers compute by the functions below; variants (DoRA) keep peft's own."""
    for parent in part.modules():
        layers: dict[str, Any] = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, LoraLayer)
            and not isinstance(child, ParamWrapper)
            and ADAPTER not in child.lora_variant
        }
        joined = [group for group in SAME_INPUT if all(name in layers for name in group)]
        alone = [(name,) for name in layers if not any(name in group for group in joined)]
        for group in (*joined, *alone):
            readers = Readers([layers[name] for name in group])
            for number, layer in enumerate(readers.layers):
                layer.forward = partial(_forward, layer, partial(readers.answer, number))


def _is_plain(layer: Any) -> bool:
    """Return whether a LoRA layer is on a plain frozen linear layer, and not on quantized weights."""
    return type(layer.base_layer) is nn.Linear and not layer.base_layer.weight.requires_grad


def _forward(layer: Any, answer: Any, x: Tensor) -> Tensor:
    # ZeRO-3 (ds_id) gathers a layer's weights when that layer is called, and then alone
    keeps_own = layer.disable_adapters or layer.merged or hasattr(layer.base_layer.weight, "ds_id")
    output: Tensor = type(layer).forward(layer, x) if keeps_own else answer(x)
    return output


class Readers:
    """Layers that read the same input. The first one called computes for all; the others return their output."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.outputs: list[Tensor | None] = []

    def answer(self, number: int, x: Tensor) -> Tensor:
        """Return the output of one layer."""
        if x is not self.input or self.outputs[number] is None:
            self.input, self.outputs = x, list(self._compute(x))
        output, self.outputs[number] = self.outputs[number], None
        assert output is not None
        if all(rest is None for rest in self.outputs):
            self.input = None  # nothing is kept between steps
        return output

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        frozen = [
            (layer.base_layer.weight, layer.base_layer.bias) if _is_plain(layer) else None for layer in self.layers
        ]
        adapters = [weight for layer in self.layers for weight in _adapter(layer)]
        first = self.layers[0]
        dropout = getattr(first.lora_dropout[ADAPTER], "p", 0.0) if first.training else 0.0
        outputs: tuple[Tensor, ...] = LowRankLinear.apply(  # type: ignore[no-untyped-call]
            x, frozen, dropout, first.scaling[ADAPTER], *adapters
        )
        return tuple(
            layer.base_layer(x) + output if own is None else output
            for layer, own, output in zip(self.layers, frozen, outputs, strict=True)
        )


def _adapter(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


class LowRankLinear(torch.autograd.Function):
    """Linear layers of one input, each y = x W^T + b + scaling * (dropout(x) A^T) B^T: x (..., I) -> (..., O) each.

    W (O, I) and b (O,) are frozen; A (r, I) and B (O, r) are kept in float32, and the products are in the type of W or
    of autocast. The layers share one dropout mask. A layer whose W is None has its low-rank part alone as its output.
    Source: LoRA, arXiv 2106.09685.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, frozen: Any, dropout: float, scaling: float, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        device = x.device.type
        dtype = next((own[0].dtype for own in frozen if own is not None), x.dtype)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        rows = x.flatten(0, -2).to(dtype)  # (L, _)
        mask = _draw_mask(rows, dropout) if dropout else None
        kept = 1 / (1 - dropout)  # what remains is scaled up
        down = (torch.cat(adapters[::2]) * kept).to(dtype)  # (n*r, _)
        ups = [(up * scaling).to(dtype) for up in adapters[1::2]]
        lows = (_drop(rows, mask) @ down.T).split([len(each) for each in adapters[::2]], dim=1)  # n of (L, r)
        outputs = [
            low @ up.T if own is None else linear(rows, *own).addmm_(low, up.T)
            for own, low, up in zip(frozen, lows, ups, strict=True)
        ]
        ctx.save_for_backward(rows, mask, down, *lows, *ups)
        ctx.weights, ctx.scales, ctx.shape, ctx.dtype = (
            [None if own is None else own[0] for own in frozen],
            (kept, scaling),
            x.shape,
            x.dtype,
        )
        return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # noqa: D102
        rows, mask, down, *saved = ctx.saved_tensors
        lows, ups = saved[: len(gradients)], saved[len(gradients) :]
        d_outputs = [gradient.flatten(0, -2) for gradient in gradients]  # n of (L, O)
        d_low = torch.cat([d_output @ up for d_output, up in zip(d_outputs, ups, strict=True)], dim=1)  # (L, n*r)
        kept, scaling = ctx.scales
        d_downs = ((d_low.T @ _drop(rows, mask)).float() * kept).split([low.shape[1] for low in lows])
        d_ups = [((low.T @ d_output).T.float() * scaling) for low, d_output in zip(lows, d_outputs, strict=True)]
        d_x = None
        if ctx.needs_input_grad[0]:
            own = [
                (d_output, weight.to(rows.dtype))
                for d_output, weight in zip(d_outputs, ctx.weights, strict=True)
                if weight is not None
            ]
            if mask is None:
                d_x = _sum_products([*own, (d_low, down)])
            else:
                d_x = (d_low @ down).mul_(mask)  # (L, _)
                d_x = d_x.add_(_sum_products(own)) if own else d_x
            d_x = d_x.view(ctx.shape).to(ctx.dtype)
        pairs = [gradient for pair in zip(d_downs, d_ups, strict=True) for gradient in pair]
        return d_x, None, None, None, *pairs


def _drop(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else rows * mask


def _draw_mask(like: Tensor, dropout: float) -> Tensor:
    """Draw 1 with the chance 1-p, else 0, for each element.

    On a CPU torch asks its generator once for each element, in one thread, which takes longer than a layer's products;
    16 bits an element are enough.
    """
    mask = torch.empty_like(like)
    if like.device.type != "cpu":
        return mask.bernoulli_(1 - dropout)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # type: ignore[arg-type]
    bits = words.view(torch.int16)[: like.numel()].view_as(like)
    return torch.ge(bits, round(dropout * 2**16) - 2**15, out=mask)


def _sum_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Add up products of matrices, each into the sum of those before it."""
    (left, right), *rest = pairs
    total = left @ right
    for left, right in rest:
        total.addmm_(left, right)
    return total
