"""An MLP's gate as one function: SiLU and product, which keeps gate and up alone."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaMLP

from vlm_tune.model.kernels.kept import made_again
from vlm_tune.model.kernels.norm import has_code_of


def join_gates(model: nn.Module) -> None:
    """Let every MLP whose code is Llama's (Qwen's, Mistral's, ...) and that gates by SiLU compute by `GatedProduct`."""
    for module in model.modules():
        if has_code_of(module, LlamaMLP) and is_silu(module.act_fn):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def is_silu(activation: Any) -> bool:
    """Return whether an activation is SiLU, of torch or of transformers."""
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _forward(mlp: Any, hidden: Tensor) -> Any:
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    product: Tensor = GatedProduct.apply(gate, up)  # type: ignore[no-untyped-call]
    return mlp.down_proj(made_again(product, gated, gate, up))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU of the gate, times the rest: (..., I) each."""
    return silu(gate).mul_(up)


class GatedProduct(torch.autograd.Function):
    """y = silu(g) * u, with silu(g) = g * sigmoid(g): (..., I) each. Only g and u are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:  # noqa: D102
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return d_gate, silu(gate).mul_(gradients[0])
