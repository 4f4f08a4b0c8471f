"""What a CPU makes of a pack: its sizes are rounded up, and a long one is trained in parts.

oneDNN, which multiplies in 16 bit on a CPU, writes machine code for each size of product that it meets: up to 20 ms
for one, a fifth of a step of 1,000 tokens whose sizes are all new. Rounded up, sizes come again, and so does the code.

Samples of a pack do not see one another, and its loss is the sum of theirs: in parts, each with its backward pass
before the next begins, only what is kept at one time changes. A CPU is no faster for more tokens than a part has.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlm_tune.data.batch import Batch

STEPS = 32  # sizes between a power of two and the next one: at most 1/32 is added
LEAST = 32  # the smallest step, between sizes below 2,048
LONGEST = 2048  # tokens of a part, give or take a sample (a tree of samples)


def rounded_up(embeddings: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """Round the tokens and the supervised tokens of a pack up: embeddings (1, L, D) -> (1, L', D), and the batch.

    Added tokens are zeros at the end of the last sample, whose own tokens come first and do not see them; added
    supervised tokens weigh nothing. A share of a pack, and what oneDNN does not multiply, stay as they are.
    """
    if batch.segments is None or batch.cut is not None or not uses_onednn(embeddings):
        return embeddings, batch
    more = _round_up(embeddings.shape[1]) - embeddings.shape[1]
    unread = _round_up(len(batch.targets)) - len(batch.targets)
    weights = batch.weights if batch.answers is not None else pad(batch.weights, (0, unread))  # pairs have one each
    return pad(embeddings, (0, 0, 0, more)), replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more)),
        position_ids=pad(batch.position_ids, (0, more)),
        segments=[*batch.segments[:-1], batch.segments[-1] + more],
        predicting=pad(batch.predicting, (0, unread)),
        targets=pad(batch.targets, (0, unread)),
        weights=weights,
    )


def uses_onednn(embeddings: Tensor) -> bool:
    """Return whether what follows is multiplied in 16 bit on a CPU."""
    is_half = torch.is_autocast_enabled("cpu") or embeddings.dtype in (torch.bfloat16, torch.float16)
    return embeddings.device.type == "cpu" and is_half


def _round_up(size: int) -> int:
    step = max(LEAST, 2 ** size.bit_length() // (2 * STEPS))
    return -(-size // step) * step


def is_long(embeddings: Tensor, batch: Batch) -> bool:
    """Return whether a batch is a pack to be trained in parts; pairs, and a device's share, stay together."""
    is_whole = batch.answers is None and batch.cut is None
    is_pack = batch.segments is not None and is_whole and embeddings.device.type == "cpu"
    return is_pack and torch.is_grad_enabled() and embeddings.shape[1] > LONGEST


def loss_in_parts(
    loss_of: Callable[[Tensor, Batch], Tensor], embeddings: Tensor, batch: Batch, llm: nn.Module
) -> Tensor:
    """Sum the losses of a pack's parts: embeddings (1, L, D) -> scalar. `loss_of` is that of one part."""
    weights = [weight for weight in llm.parameters() if weight.requires_grad]
    loss: Tensor = LossInParts.apply(loss_of, cut(batch), embeddings, *weights)  # type: ignore[no-untyped-call]
    return loss


def cut(batch: Batch) -> list[tuple[slice, Batch]]:
    """Cut a pack into parts of like length, between its trees: the places of each part's tokens, and what it reads."""
    assert batch.segments is not None
    parents = batch.parents or [-1] * len(batch.segments)
    starts = list(accumulate(batch.segments, initial=0))
    length = starts[-1] / ceil(starts[-1] / LONGEST)
    firsts = [0]
    for number, (start, parent) in enumerate(zip(starts, parents, strict=False)):
        if parent < 0 and start >= length * len(firsts):
            firsts.append(number)
    parts = []
    for first, last in pairwise([*firsts, len(parents)]):
        place = slice(starts[first], starts[last])
        is_own = (batch.predicting >= place.start) & (batch.predicting < place.stop)
        part = replace(
            batch,
            input_ids=batch.input_ids[:, place],
            position_ids=batch.position_ids[:, place],
            segments=batch.segments[first:last],
            parents=[max(parent - first, -1) for parent in parents[first:last]],
            predicting=batch.predicting[is_own] - place.start,
            targets=batch.targets[is_own],
            weights=batch.weights[is_own],
        )
        parts.append((place, part))
    return parts


class LossInParts(torch.autograd.Function):
    """The loss of all parts, and its gradients by the embeddings (1, L, D) and weights in the same pass."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, loss_of: Any, parts: list[tuple[slice, Batch]], embeddings: Tensor, *weights: Tensor
    ) -> Tensor:
        losses, d_embeddings = [], []
        sums: list[Tensor | None] = [None] * len(weights)
        for place, part in parts:
            seen = embeddings[:, place].detach().requires_grad_()
            with torch.enable_grad():
                loss = loss_of(seen, part)
            torch.clear_autocast_cache()  # casts of weights, which belong to this part's graph
            d_seen, *gradients = torch.autograd.grad(loss, [seen, *weights], allow_unused=True)
            sums = [added(*pair) for pair in zip(sums, gradients, strict=True)]
            losses.append(loss.detach())
            d_embeddings.append(d_seen)
        ctx.gradients = [torch.cat(d_embeddings, dim=1), *sums]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # noqa: D102
        return None, None, *(each if each is None else each * gradients[0] for each in ctx.gradients)


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Add a gradient to the sum of those before it, in place; either may not be there."""
    return other if one is None else one if other is None else one.add_(other)
