"""Cross entropy at the supervised positions only: no logits that no loss needs."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # supervised rows whose logits exist at one time


def supervised_loss(hidden: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted cross entropies: hidden (N, D), targets (N,), weights (N,) -> scalar, float32.

    Rows are taken in chunks, each recomputed in the backward pass, so that memory does not grow with N times V.
    """
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
