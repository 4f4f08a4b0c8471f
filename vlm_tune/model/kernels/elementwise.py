"""What a decoder layer computes element by element, each as one function: the MLP's gate, and rotary positions."""

from functools import partial
from inspect import unwrap
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from vlm_tune.model.kernels.kept import made_again
from vlm_tune.model.kernels.norm import has_code_of

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
        if "forward" not in vars(module) and ROTARY in names and _code(names[ROTARY]) == _code(apply_rotary_pos_emb):
            joined = FunctionType(
                forward.__code__, names | {ROTARY: rotate}, forward.__name__, forward.__defaults__, forward.__closure__
            )
            joined.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(joined, module)


def _code(function: Any) -> tuple[Any, ...]:
    function = unwrap(function)
    code = function.__code__
    return code.co_code, code.co_names, [each for each in code.co_consts if each != function.__doc__]


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
        d_query, d_key = (_turn_back(gradient, cos, sin) for gradient in gradients)
        return d_query, d_key, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a*cos - b*sin, b*cos + a*sin), the halves of x (..., d)."""
    first, second = _halves(x.shape[-1])
    turned = x * cos
    turned[first].addcmul_(x[second], sin[first], value=-1)
    turned[second].addcmul_(x[first], sin[second])
    return turned


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_turn`, which is its inverse where both halves have the same angles."""
    first, second = _halves(x.shape[-1])
    turned = x * cos
    turned[first].addcmul_(x[second], sin[second])
    turned[second].addcmul_(x[first], sin[first], value=-1)
    return turned


def _halves(size: int) -> tuple[Any, Any]:
    return (..., slice(size // 2)), (..., slice(size // 2, None))
