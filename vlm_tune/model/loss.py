"""Cross entropy at the supervised positions only: no logits that no loss needs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # supervised rows whose logits exist at one time


def supervised_loss(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted cross entropies: hidden (N, D), targets (N,), weights (N,) -> scalar, float32.

    Rows are taken in chunks, so that memory does not grow with N times V. Beside a frozen head the gradient is made
    with the loss, while a chunk's logits are there; a head that is trained computes each chunk again.
    """
    is_plain = isinstance(head, nn.Linear) and head.bias is None and not head.weight.requires_grad
    if is_plain and hidden.requires_grad:
        total: Tensor = FrozenHeadLoss.apply(hidden, head.weight, targets, weights)
        return total
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        inputs = (hidden[rows], head, targets[rows], weights[rows])
        if len(targets) <= CHUNK or not torch.is_grad_enabled():
            total = total + _chunk(*inputs)
        else:
            total = total + checkpoint(_chunk, *inputs, use_reentrant=False)
    return total


def _chunk(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> Tensor:
    logits = head(hidden).float()  # (N, V)
    losses = cross_entropy(logits, targets, reduction="none")  # (N,)
    return (losses * weights).sum()


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of weighted cross entropies, and its gradient by the hidden states in the same pass.

    With shares p = softmax(z), the gradient of one row's loss by its logits z is p, less 1 at the target.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:  # noqa: D102
        rows = hidden.to(head.dtype)  # (N, D)
        gradient = torch.empty_like(rows)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            chunk = slice(start, start + CHUNK)
            target = targets[chunk].unsqueeze(1)  # (_, 1)
            logits = linear(rows[chunk], head)  # (_, V)
            shares = logits.softmax(-1, dtype=torch.float32)  # (_, V)
            largest, place = logits.max(-1, keepdim=True)  # log(sum(exp(z))) = max(z) - log(max(p))
            losses = largest.float() - shares.gather(1, place).log() - logits.gather(1, target).float()  # (_, 1)
            total += (losses.squeeze(1) * weights[chunk]).sum()  # no product: autocast would round it
            shares.scatter_add_(1, target, shares.new_full((1, 1), -1.0).expand_as(target))
            gradient[chunk] = shares.to(head.dtype) @ head  # weighed later: 16 bit has no room for small weights
        ctx.save_for_backward(gradient, weights)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:  # noqa: D102
        gradient, weights = ctx.saved_tensors
        return (gradient * (weights * gradients[0]).unsqueeze(1)).to(ctx.dtype), None, None, None
