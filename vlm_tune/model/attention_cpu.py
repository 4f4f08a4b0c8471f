"""Attention in 16 bit on a CPU, by matrix products over blocks: about twice as fast as SDPA's kernel there.

SDPA reaches a quarter of the rate of a bf16 matrix product on a CPU. Here samples of like length are multiplied
together, the scores of one block of queries stay in the processor's cache, later keys are skipped, and nothing but
query, key and value is kept for the backward pass. Scores are rounded to 16 bit before the softmax, as in transformers'
eager attention. Figures: benchmarks/README.md.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

BLOCK = 128  # queries of a long sample whose scores exist at one time
SHORT = 192  # tokens of a sample that is one block
WASTE = 1.2  # samples that are multiplied together are padded to at most this multiple of the shortest one,
TOGETHER = 2048  # and have about so many tokens in all


class Groups:
    """Where the samples of a pack stand when those of like length are side by side.

    gather  (J,) the token at each place; a padded place repeats its sample's first token
    order   (L,) the place of each token
    shapes  (first place, samples, places of a sample) of each group
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        starts = list(accumulate(lengths, initial=0))[:-1]
        self.shapes: list[tuple[int, int, int]] = []
        gather, self.order, first = [], torch.empty(sum(lengths), dtype=torch.long), 0
        for group in _alike(sorted(zip(lengths, starts, strict=True))):
            width = group[-1][0]
            self.shapes.append((first, len(group), width))
            for length, start in group:
                places = torch.arange(width)
                gather.append(start + places.where(places < length, 0))
                self.order[start : start + length] = first + places[:length]
                first += width
        self.gather = torch.cat(gather)


def _alike(samples: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Part (length, start) of samples, short ones first, into groups of like length."""
    groups: list[list[tuple[int, int]]] = []
    for sample in samples:
        length = sample[0]
        if not groups or length > WASTE * groups[-1][0][0] or length * (len(groups[-1]) + 1) > TOGETHER:
            groups.append([])
        groups[-1].append(sample)
    return groups


class PackedProducts(torch.autograd.Function):
    """Attend causally within each sample of a pack: query (L, heads, d), key and value (L, kv_heads, d) -> as query.

    Padding comes last in a sample, so causality hides it; its own gradient is zero.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scale = groups, scale
        joined = [tensor.index_select(0, groups.gather) for tensor in (query, key, value)]
        output = torch.empty_like(joined[0])
        for first, count, width in groups.shapes:
            rows = slice(first, first + count * width)
            q, k, v = (_by_head(tensor[rows], count, key.shape[1]) for tensor in joined)
            q *= scale
            made = torch.empty_like(q)
            for block in _blocks(width):
                made[:, :, block] = (_shares(q, k, block) @ v[:, 0, : block.stop]).view_as(made[:, :, block])
            output[rows] = _by_token(made, count)
        return output.index_select(0, groups.order)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: D102
        groups, kv_heads = ctx.groups, ctx.saved_tensors[1].shape[1]
        joined = [tensor.index_select(0, groups.gather) for tensor in ctx.saved_tensors]
        joined.append(torch.zeros_like(joined[0]).index_copy_(0, groups.order, gradients[0]))
        made = [torch.empty_like(tensor) for tensor in joined[:3]]
        for first, count, width in groups.shapes:
            rows = slice(first, first + count * width)
            q, k, v, d_output = (_by_head(tensor[rows], count, kv_heads) for tensor in joined)
            q *= ctx.scale
            d_q, d_k, d_v = _backward(q, k, v, d_output)
            for whole, part in zip(made, (d_q.mul_(ctx.scale), d_k, d_v), strict=True):
                whole[rows] = _by_token(part, count)
        d_query, d_key, d_value = (tensor.index_select(0, groups.order) for tensor in made)
        return d_query, d_key, d_value, None, None


def _backward(q: Tensor, k: Tensor, v: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through one group; sums over blocks are in float32. The softmax is computed again, not kept."""
    d_q = torch.empty_like(q)
    d_k, d_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for block in _blocks(q.shape[2]):
        stop = block.stop
        shares = _shares(q, k, block)  # (_, _, stop)
        d_out = d_output[:, :, block].flatten(1, 2)
        d_v[:, 0, :stop] += shares.transpose(1, 2) @ d_out
        d_shares = d_out @ v[:, 0, :stop].transpose(1, 2)
        d_scores = torch.ops.aten._softmax_backward_data(d_shares, shares, -1, shares.dtype)
        d_q[:, :, block] = (d_scores @ k[:, 0, :stop]).view_as(d_q[:, :, block])
        d_k[:, 0, :stop] += d_scores.transpose(1, 2) @ q[:, :, block].flatten(1, 2)
    return d_q, d_k, d_v


def _by_head(tokens: Tensor, count: int, kv_heads: int) -> Tensor:
    """(n*W, heads, d) -> (n*kv_heads, heads/kv_heads, W, d), for n samples of W tokens; a copy."""
    grouped = tokens.view(count, -1, kv_heads, tokens.shape[1] // kv_heads, tokens.shape[2])
    return grouped.permute(0, 2, 3, 1, 4).contiguous().flatten(0, 1)


def _by_token(heads: Tensor, count: int) -> Tensor:
    """(n*kv_heads, heads/kv_heads, W, d) -> (n*W, heads, d)."""
    return heads.unflatten(0, (count, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _blocks(width: int) -> list[slice]:
    if width <= SHORT:
        return [slice(0, width)]
    return [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]


def _shares(q: Tensor, k: Tensor, block: slice) -> Tensor:
    """Softmax of the scores of one block of queries on all keys up to it: (n*kv_heads, groups*b, stop)."""
    queries = q[:, :, block].flatten(1, 2)  # (_, _, d)
    scores = queries @ k[:, 0, : block.stop].transpose(1, 2)
    width = block.stop - block.start
    scores.view(*q.shape[:2], width, block.stop)[..., block].masked_fill_(_future(width), float("-inf"))
    return scores.softmax(-1)


@lru_cache(maxsize=256)
def _future(width: int) -> Tensor:
    """Mark the keys that come after each query: (W, W)."""
    return torch.ones(width, width, dtype=torch.bool).triu(1)


def attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to every position, without a backward pass: (T, heads, P, d) -> (T, P, heads, d)."""
    num_tiles, heads, num_patches, size = query.shape
    output = query.new_empty(num_tiles, num_patches, heads, size)
    for tile in range(num_tiles):
        for head in range(heads):
            scores = (query[tile, head] * scale) @ key[tile, head].T  # (num_patches, num_patches)
            output[tile, :, head] = scores.softmax(-1) @ value[tile, head]
    return output
