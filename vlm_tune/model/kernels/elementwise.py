"""What a decoder layer computes element by element, each as one function: the MLP's gate, and rotary positions."""

from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from vlm_tune.model.kernels.kept import made_again
from vlm_tune.model.kernels.norm import has_code_of, is_same_code

ROTARY = "apply_rotary_pos_emb"  # as every modeling file of transformers names it


def join_gates(model: nn.Module) -> None:
    """Let every MLP whose code is Llama's (Qwen's, Mistral's, ...) and that gates by SiLU compute by `GatedProduct`."""
    for module in model.modules():
        if has_code_of(module, LlamaMLP) and is_silu(module.act_fn):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def is_silu(activation: Any) -> bool:
    """Return whether an activation is SiLU, of torch or of transformers."""
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def _forward(mlp: Any, hidden: Tensor) -> Any:
    gate, up, activation = mlp.gate_proj(hidden), mlp.up_proj(hidden), Activation()
    product: Tensor = GatedProduct.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return mlp.down_proj(made_again(product, activation.gated, gate, up))


class Activation:
    """SiLU of a gate: made with a product that is made again, and used up by the gate's gradient, which comes next."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """SiLU of the gate, times the rest: (..., I) each."""
        self.values = silu(gate)
        return self.values * up

    def take(self, gate: Tensor) -> Tensor:
        """Hand over what there is, or make it."""
        values, self.values = self.values, None
        return silu(gate) if values is None else values


class GatedProduct(torch.autograd.Function):
    """y = silu(g) * u, with silu(g) = g * sigmoid(g): (..., I) each. Only g and u are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:  # noqa: D102
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return d_gate, ctx.activation.take(gate).mul_(gradients[0]), None


def join_rotations(model: nn.Module) -> None:
    """Let every attention whose rotary positions are Llama's (Qwen's, Mistral's, ...) compute them by `Rotation`.

    Its forward function stays that of transformers, in which `rotate` has the name of the function that it replaces.
    """
    for module in model.modules():
        forward = type(module).forward
        names = getattr(forward, "__globals__", {})  # none: the function is not one of Python
        if "forward" not in vars(module) and ROTARY in names and is_same_code(names[ROTARY], apply_rotary_pos_emb):
            joined = FunctionType(
                forward.__code__, names | {ROTARY: rotate}, forward.__name__, forward.__defaults__, forward.__closure__
            )
            joined.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(joined, module)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Turn query (B, heads, L, d) and key (B, kv_heads, L, d) by the angles of their positions: (B, L, d) each."""
    angles = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    made: tuple[Tensor, Tensor] = Rotation.apply(query, key, *angles)  # type: ignore[no-untyped-call]
    return made


class Rotation(torch.autograd.Function):
    """Turn pairs of numbers, half a head apart, by an angle each: in three passes where transformers takes five.

    Backwards, gradients are turned back. Only the angles are kept, which all layers share.
    Source: RoFormer, arXiv 2104.09864.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        ctx.save_for_backward(cos, sin)
        return _turn(query, cos, sin), _turn(key, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:  # noqa: D102
        cos, sin = ctx.saved_tensors
        d_query, d_key = (_turn(gradient, cos, sin, is_back=True) for gradient in gradients)
        return d_query, d_key, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, is_back: bool = False) -> Tensor:
    """(a, b) -> (a*cos - b*sin, b*cos + a*sin), the halves of x (..., d); `is_back` multiplies by the transpose."""
    first, second = (..., slice(x.shape[-1] // 2)), (..., slice(x.shape[-1] // 2, None))
    turned = x * cos
    for own, other, sign in ((first, second, -1), (second, first, 1)):
        angles, way = (sin[other], -sign) if is_back else (sin[own], sign)
        turned[own].addcmul_(x[other], angles, value=way)
    return turned
