"""RMS norm as one function: transformers' arithmetic, without keeping its float32 copies.

transformers writes the norm as six operations on float32 tensors, and autograd keeps their results: more memory than a
layer's linear inputs, and on a CPU a sixth of a step at the widths of small models.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def join_norms(model: nn.Module) -> None:
    """Let every frozen RMS norm whose code is Llama's (that of 138 kinds) compute by `ScaleToUnit`, in 16 bit."""
    norms: list[Any] = [module for module in model.modules() if _is_llamas(module)]
    for norm in norms:
        if not norm.weight.requires_grad:
            norm.forward = partial(_forward, norm)


def _is_llamas(module: nn.Module) -> bool:
    ours, theirs = (getattr(kind.forward, "__code__", None) for kind in (type(module), LlamaRMSNorm))
    return all(getattr(ours, part, None) == getattr(theirs, part) for part in ("co_code", "co_names", "co_consts"))


def _forward(norm: Any, hidden: Tensor) -> Tensor:
    if hidden.dtype is torch.float32:
        plain: Tensor = type(norm).forward(norm, hidden)
        return plain
    made: Tensor = ScaleToUnit.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return made


class ScaleToUnit(torch.autograd.Function):
    """Divide x (..., D) by the root of its mean square, times a weight (D,). Source: Zhang and Sennrich 2019.

    With n = x*s, s = 1/rms(x), and g the gradient times the weight: d_x = s*(g - n*mean(g*n)). Only x and s are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: D102
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # (..., 1)
        scale = scale.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return wide.mul_(scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # noqa: D102
        x, scale, weight = ctx.saved_tensors
        wide, gradient = x.float(), (gradients[0] * weight).float()
        share = (gradient * wide).sum(-1, keepdim=True).mul_(scale).mul_(scale).div_(-x.shape[-1])  # (..., 1)
        return gradient.addcmul_(wide, share).mul_(scale).to(x.dtype), None, None
