"""Cross entropy at the supervised positions only: no logits are computed that the loss does not need."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 128  # supervised rows whose logits exist at one time
CACHE = 2**18  # logits that are worked on at one time on a CPU: in float32 they fit into a core's cache


def supervised_loss(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted cross entropies: hidden (N, D), targets (N,), weights (N,) -> scalar, float32."""
    return (token_losses(hidden, head, targets) * weights).sum()


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Return the cross entropy of each token: hidden (N, D), targets (N,) -> (N,), float32.

    Rows are taken in chunks, so that memory does not grow with N times V. With a frozen head the gradient is computed
    with the loss, while a chunk's logits exist; a trained head recomputes each chunk.
    """
    is_plain = isinstance(head, nn.Linear) and head.bias is None and not head.weight.requires_grad
    is_plain = is_plain and not hasattr(head.weight, "ds_id")  # ZeRO-3 gathers a layer's weights when it is called
    if is_plain and hidden.requires_grad:
        losses: Tensor = FrozenHeadLoss.apply(hidden, head.weight, targets)
        return losses
    chunks = []
    for start in range(0, max(1, len(targets)), CHUNK):  # without any, a trained head still has a gradient, of zero
        inputs = hidden[start : start + CHUNK], head, targets[start : start + CHUNK]
        if len(targets) <= CHUNK or not torch.is_grad_enabled():
            chunks.append(_chunk(*inputs))
        else:
            chunks.append(checkpoint(_chunk, *inputs, use_reentrant=False))
    return torch.cat(chunks)


def _chunk(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    logits = head(hidden).float()  # (N, V)
    losses = cross_entropy(logits, targets, reduction="none")  # (N,)
    return losses


class FrozenHeadLoss(torch.autograd.Function):
    """The cross entropy of each token, and its gradient by the hidden states in the same pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:  # noqa: D102
        rows = hidden.to(head.dtype)  # (N, D)
        gradient = torch.empty_like(rows)
        losses = hidden.new_empty(len(rows), dtype=torch.float32)
        logits = rows.new_empty(min(CHUNK, len(rows)), len(head))  # (_, V)
        block = CHUNK if rows.is_cuda else max(2, CACHE // len(head))
        for start in range(0, len(rows), CHUNK):
            stop = min(start + CHUNK, len(rows))
            z = torch.mm(rows[start:stop], head.T, out=logits[: stop - start])
            for first in range(start, stop, block):
                some = slice(first, min(first + block, stop))
                losses[some] = _differentiate(z[first - start : some.stop - start], targets[some])
            torch.mm(z, head, out=gradient[start:stop])  # weighed later: 16 bit has no room for small weights
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:  # noqa: D102
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0].unsqueeze(1)).to(ctx.dtype), None, None


def _differentiate(logits: Tensor, targets: Tensor) -> Tensor:
    """Replace logits (N, V) by the gradients of the cross entropies, and return these: (N,), float32.

    The gradient of one row's loss by its logits z is softmax(z), less 1 at the target.
    """
    target = targets.unsqueeze(1)  # (N, 1)
    shares = logits.log_softmax(-1, dtype=torch.float32)  # (N, V)
    right = shares.gather(1, target)  # (N, 1)
    shares.exp_().scatter_(1, target, right.expm1())
    logits.copy_(shares)
    return -right.squeeze(1)
