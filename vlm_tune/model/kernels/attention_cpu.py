"""Attention in 16 bit on a CPU, by matrix products over samples and blocks: faster than SDPA's kernel there.

SDPA reaches a quarter of the rate of a bf16 matrix product on a CPU without AMX, and is slow backwards on any. Here
samples of similar length are multiplied together, long ones in blocks of queries whose scores stay in the processor's
cache, and later keys are skipped. Very long samples keep no scores for the backward pass. Scores are rounded to 16 bit
before the softmax, as in transformers' eager attention. Where no scores are kept, a CPU with AMX computes the forward
pass by SDPA, which takes half the time there. Figures: benchmarks/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 128  # queries of a long sample whose scores exist at one time
SHORT = 256  # tokens of a sample that is one block
KEPT = 1024  # tokens of a sample whose shares are kept for the backward pass; those of longer ones are computed again
WASTE = 1.5  # samples that are multiplied together are padded to at most this multiple of the shortest one,
TOGETHER = 2048  # and have about so many tokens in all


@dataclass(frozen=True)
class Block:
    """The same queries of samples of similar length, and the keys that they may see.

    queries  rows of the gathered queries: (batch, heads/kv_heads, num_queries), batch = samples * kv_heads
    keys     rows of the gathered keys: (batch, places of a sample), of which the first `stop` are seen
    """

    queries: slice
    keys: slice
    batch: int
    num_queries: int
    stop: int
    is_kept: bool
    is_whole: bool  # its stretch is attended to at once in the forward pass


@lru_cache(maxsize=1)
def has_amx() -> bool:
    """Return whether this processor multiplies tiles of bf16 numbers (Intel's AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class Layout:
    """Where the tokens of a pack stand when stretches of like length are side by side, head by head.

    The keys of a prefix stand in front of those of each stretch that shares it.

    queries     the row of (L*heads) at each place of the gathered queries; any row at a padded place
    keys        the row of (L*kv_heads) at each place of the gathered keys
    to_queries  (L*heads,) the place of each row; to_keys (L*kv_heads,), None where keys stand at several places
    padding     the padded places of the gathered queries
    key_places  the places of the gathered keys that are not padded
    whole       the tokens of each stretch that is attended to at once in the forward pass
    """

    def __init__(self, lengths: Sequence[int], heads: int, kv_heads: int, parents: Sequence[int] | None = None) -> None:
        parents = parents or [-1] * len(lengths)
        starts = list(accumulate(lengths, initial=0))
        seen = seen_lengths(lengths, parents)
        samples = [
            Stretch(keys - length, keys, start, starts[parent])
            for length, keys, start, parent in zip(lengths, seen, starts, parents, strict=False)
        ]
        self.blocks: list[Block] = []
        self.whole: list[slice] = []
        queries, keys = [], []  # rows, below 0 at padded places
        num_queries = num_keys = 0
        by_group = torch.arange(heads).view(kv_heads, -1, 1)
        by_head = torch.arange(kv_heads).view(-1, 1)
        for group in _alike(sorted(samples)):
            prefix, width = group[0].prefix, group[-1].length
            tokens = torch.stack([stretch.tokens(width) for stretch in group])
            keys.append((tokens[:, None] * kv_heads + by_head).flatten())
            seen_by = slice(num_keys, num_keys + len(keys[-1]))
            num_keys = seen_by.stop
            is_kept = width <= KEPT
            is_whole = not is_kept and prefix == 0 and len(group) == 1 and has_amx()
            self.whole += [slice(group[0].start, group[0].start + width)] if is_whole else []
            for block in _blocks(prefix, width):
                rows = tokens[:, None, None, block] * heads + by_group  # (n, kv_heads, heads/kv_heads, b)
                queries.append(rows.flatten())
                asked = slice(num_queries, num_queries + rows.numel())
                num_queries = asked.stop
                size = (len(group) * kv_heads, rows.shape[-1], block.stop)
                self.blocks.append(Block(asked, seen_by, *size, is_kept, is_whole))
        self.queries, self.to_queries, self.padding = _both_ways(torch.cat(queries))
        rows = torch.cat(keys)
        self.key_places = (rows >= 0).nonzero().flatten()
        self.keys, self.to_keys = rows.clamp(min=0), None if max(parents) >= 0 else _both_ways(rows)[1]


class Stretch(NamedTuple):
    """A stretch of a pack: how many keys its prefix has, how many it sees in all, and where both begin."""

    prefix: int
    length: int
    start: int
    prefix_start: int

    def tokens(self, width: int) -> Tensor:
        """The token at each of `width` places, below 0 at padded ones."""
        places = torch.arange(width)
        own = torch.where(places < self.length, places + (self.start - self.prefix), -1)
        return torch.where(places < self.prefix, places + self.prefix_start, own)


def seen_lengths(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Count the keys of each stretch: its own, and those of its prefix."""
    return [length + (lengths[parent] if parent >= 0 else 0) for length, parent in zip(lengths, parents, strict=True)]


@lru_cache(maxsize=4)
def lay_out(lengths: tuple[int, ...], heads: int, kv_heads: int, parents: tuple[int, ...] | None = None) -> Layout:
    """Make the layout of a pack once for all layers."""
    return Layout(lengths, heads, kv_heads, parents)


def _both_ways(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the row at each place, below 0 at padded ones: that row or the first, the place of each row, the padded."""
    places = (rows >= 0).nonzero().flatten()
    inverse = torch.empty_like(places)
    inverse[rows[places]] = places
    return rows.clamp(min=0), inverse, (rows < 0).nonzero().flatten()


def _alike(samples: list[Stretch]) -> list[list[Stretch]]:
    """Part stretches, sorted by prefix and length, into groups of one length of prefix and like length."""
    groups: list[list[Stretch]] = []
    for sample in samples:
        first = groups[-1][0] if groups else None
        if (
            first is None
            or sample.prefix != first.prefix
            or sample.length > WASTE * first.length
            or sample.length * (len(groups[-1]) + 1) > TOGETHER
        ):
            groups.append([])
        groups[-1].append(sample)
    return groups


def _blocks(prefix: int, width: int) -> list[slice]:
    if width - prefix <= SHORT:
        return [slice(prefix, width)]
    return [slice(start, min(start + BLOCK, width)) for start in range(prefix, width, BLOCK)]


class PackedProducts(torch.autograd.Function):
    """Attend causally within each stretch of a pack: query (L, heads, d), key and value (L, kv_heads, d) -> as query.

    A stretch with a prefix sees that first. Padding comes last, so causality hides it; its own gradient is zero.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        size = query.shape[-1]
        queries = query.reshape(-1, size).index_select(0, layout.queries).mul_(scale)  # (_, d)
        keys, values = (tensor.reshape(-1, size).index_select(0, layout.keys) for tensor in (key, value))  # (_, d)
        made = torch.empty_like(queries)
        kept = []
        for block in layout.blocks:
            if block.is_whole:
                continue
            q, k, v = _of(block, queries, keys, values)
            shares = _shares(q, k, block)
            torch.bmm(shares, v, out=made[block.queries].view_as(q))
            kept += [shares] if block.is_kept else []
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.layout, ctx.scale = layout, scale
        output = made.index_select(0, layout.to_queries).view_as(query)
        for tokens in layout.whole:
            q, k, v = (tensor[tokens].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))  # (1, _, l, d)
            whole = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            output[tokens] = whole[0].transpose(0, 1)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:  # noqa: D102
        queries, keys, values, *kept = ctx.saved_tensors
        layout: Layout = ctx.layout
        size = queries.shape[-1]
        d_made = gradients[0].reshape(-1, size).index_select(0, layout.queries)
        d_made.index_fill_(0, layout.padding, 0)
        d_queries = torch.empty_like(queries)
        d_keys, d_values = (
            torch.zeros_like(tensor, dtype=torch.float32) for tensor in (keys, values)
        )  # sums of blocks
        for block in layout.blocks:
            q, k, v = _of(block, queries, keys, values)
            shares = kept.pop(0) if block.is_kept else _shares(q, k, block)  # (_, _, stop)
            d_out = d_made[block.queries].view_as(q)
            d_k, d_v = (
                tensor[block.keys].view(block.batch, -1, size)[:, : block.stop] for tensor in (d_keys, d_values)
            )
            d_v += shares.transpose(1, 2) @ d_out
            d_shares = d_out @ v.transpose(1, 2)
            d_scores = torch.ops.aten._softmax_backward_data(d_shares, shares, -1, shares.dtype)
            torch.bmm(d_scores, k, out=d_queries[block.queries].view_as(q))
            d_k += d_scores.transpose(1, 2) @ q
        d_query = d_queries.index_select(0, layout.to_queries).mul_(ctx.scale).view_as(gradients[0])
        d_key, d_value = (_back(tensor, layout, keys.dtype) for tensor in (d_keys, d_values))
        shape = (len(d_query), -1, size)
        return d_query, d_key.view(shape), d_value.view(shape), None, None


def _back(d_gathered: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Bring the gradient of gathered keys back to their rows; one that several stretches see is the sum."""
    if layout.to_keys is not None:
        return d_gathered.to(dtype).index_select(0, layout.to_keys)
    rows = layout.keys[layout.key_places]
    summed = d_gathered.new_zeros(int(rows.max()) + 1, d_gathered.shape[1])
    return summed.index_add_(0, rows, d_gathered[layout.key_places]).to(dtype)


def _of(block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a block's queries (batch, heads/kv_heads * b, d) and the keys and values that it sees (batch, stop, d)."""
    size = queries.shape[-1]
    k, v = (tensor[block.keys].view(block.batch, -1, size)[:, : block.stop] for tensor in (keys, values))
    return queries[block.queries].view(block.batch, -1, size), k, v


def _shares(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """Softmax of the scores of a block: (batch, heads/kv_heads * b, stop)."""
    scores = q @ k.transpose(1, 2)
    width = block.num_queries
    last = scores.view(block.batch, -1, width, block.stop)[..., block.stop - width :]
    last.add_(_future(width, scores.dtype))  # several times as fast as filling by a mask
    return scores.softmax(-1)


@lru_cache(maxsize=256)
def _future(width: int, dtype: torch.dtype) -> Tensor:
    """Minus infinity at the keys that come after each query: (W, W)."""
    return torch.full((width, width), float("-inf"), dtype=dtype).triu(1)


CACHED = (lay_out, _future)


def attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to every position, without a backward pass: (T, heads, P, d) -> (T, P, heads, d)."""
    if has_amx():
        return scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
    num_tiles, heads, num_patches, size = query.shape
    output = query.new_empty(num_tiles, num_patches, heads, size)
    for tile in range(num_tiles):
        for head in range(heads):
            scores = (query[tile, head] * scale) @ key[tile, head].T  # (num_patches, num_patches)
            output[tile, :, head] = scores.softmax(-1) @ value[tile, head]
    return output
