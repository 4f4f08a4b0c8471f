"""RMS norm as one function: transformers' arithmetic, without keeping its float32 copies.

transformers writes the norm as six operations on float32 tensors, and autograd keeps their results: more memory than a
layer's linear inputs, and on a CPU a sixth of a step at the widths of small models.
"""

from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vlm_tune.model.kernels.kept import made_again


def join_norms(model: nn.Module) -> None:
    """Let every frozen RMS norm whose code is Llama's (that of 138 kinds) compute by `ScaleToUnit`, in 16 bit."""
    norms: list[Any] = [module for module in model.modules() if has_code_of(module, LlamaRMSNorm)]
    for norm in norms:
        if not norm.weight.requires_grad:
            norm.forward = partial(_forward, norm)


def has_code_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module's forward function is that of another kind, whatever it is called or wrapped in."""
    return is_same_code(type(module).forward, kind.forward)


def is_same_code(one: Any, other: Any) -> bool:
    """Return whether two functions, whatever they are called or wrapped in, are the same code."""
    ours, theirs = (getattr(unwrap(each), "__code__", None) for each in (one, other))
    return all(getattr(ours, part, None) == getattr(theirs, part) for part in ("co_code", "co_names", "co_consts"))


def _forward(norm: Any, hidden: Tensor) -> Tensor:
    if hidden.dtype is torch.float32:
        plain = partial(type(norm).forward, norm)
        return made_again(plain(hidden), plain, hidden)
    made: Tensor = ScaleToUnit.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return made_again(made, partial(_scaled, norm), hidden)


def _scaled(norm: Any, hidden: Tensor) -> Tensor:
    return scale_to_unit(hidden, norm.weight, norm.variance_epsilon)[0]


def scale_to_unit(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x (..., D) over the root of its mean square, times a weight (D,), and one over that root: (..., 1)."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # (..., 1)
    scale = scale.add_(epsilon).rsqrt_()
    return wide.mul_(scale).to(x.dtype) * weight, scale


class ScaleToUnit(torch.autograd.Function):
    """Divide x (..., D) by the root of its mean square, times a weight (D,). Source: Zhang and Sennrich 2019.

    With n = x*s, s = 1/rms(x), and g the gradient times the weight: d_x = s*(g - n*mean(g*n)). Only x and s are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: D102
        made, scale = scale_to_unit(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # noqa: D102
        x, scale, weight = ctx.saved_tensors
        wide, gradient = x.float(), (gradients[0] * weight).float()
        share = (gradient * wide).sum(-1, keepdim=True).mul_(scale).mul_(scale).div_(-x.shape[-1])  # (..., 1)
        return gradient.addcmul_(wide, share).mul_(scale).to(x.dtype), None, None
