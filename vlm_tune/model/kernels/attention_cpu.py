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
from itertools import accumulate, pairwise
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
    """The same queries of trees of similar length, and the keys that they may see.

    queries  rows of the gathered queries: (batch, heads/kv_heads, num_queries), batch = trees * kv_heads
    keys     rows of the gathered keys: (batch, places of a tree), of which the first `stop` are seen
    hidden   what is added to the scores of the last C of them: (trees or 1, 1, num_queries, C), minus infinity or 0
    """

    queries: slice
    keys: slice
    batch: int
    num_queries: int
    stop: int
    hidden: Tensor
    is_kept: bool
    is_whole: bool  # it belongs to a stretch that is attended to at once in the forward pass


@lru_cache(maxsize=1)
def has_amx() -> bool:
    """Return whether this processor multiplies tiles of bf16 numbers (Intel's AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class Layout:
    """Where the tokens of a pack stand when trees of like length are side by side, head by head.

    A tree is a sample alone, or the prefix of some samples with the rest of each behind it: one row of keys, of which
    each token sees the earlier ones of its own stretch and of the prefix.

    queries     the row of (L*heads) at each place of the gathered queries; any row at a padded place
    keys        the row of (L*kv_heads) at each place of the gathered keys
    to_queries  (L*heads,) the place of each row; to_keys (L*kv_heads,)
    padding     the padded places of the gathered queries
    whole       the tokens of each stretch that is attended to at once in the forward pass
    """

    def __init__(self, lengths: Sequence[int], heads: int, kv_heads: int, parents: Sequence[int] | None = None) -> None:
        self.blocks: list[Block] = []
        self.whole: list[slice] = []
        queries, keys = [], []  # rows, below 0 at padded places
        num_queries = num_keys = 0
        by_group = torch.arange(heads).view(kv_heads, -1, 1)
        by_head = torch.arange(kv_heads).view(-1, 1)
        for group in _alike(sorted(_trees(lengths, parents))):
            width = group[-1].length
            tokens = torch.stack([tree.tokens(width) for tree in group])
            keys.append((tokens[:, None] * kv_heads + by_head).flatten())
            seen_by = slice(num_keys, num_keys + len(keys[-1]))
            num_keys = seen_by.stop
            # a long tree alone has blocks of its prefix, then of the rest
            root = group[0].stretches[0] if len(group) == 1 and width > SHORT else width
            whole = root if len(group) == 1 and root > KEPT and has_amx() else 0
            self.whole += [slice(group[0].start, group[0].start + whole)] if whole else []
            for block in (*_blocks(0, root), *_blocks(root, width)):
                rows = tokens[:, None, None, block] * heads + by_group  # (n, kv_heads, heads/kv_heads, b)
                queries.append(rows.flatten())
                asked = slice(num_queries, num_queries + rows.numel())
                num_queries = asked.stop
                size = (len(group) * kv_heads, rows.shape[-1], block.stop)
                is_kept = (root if block.stop <= root else width) <= KEPT
                self.blocks.append(Block(asked, seen_by, *size, _hidden(group, block), is_kept, block.stop <= whole))
        self.queries, self.to_queries, self.padding = _both_ways(torch.cat(queries))
        self.keys, self.to_keys, _ = _both_ways(torch.cat(keys))


class Tree(NamedTuple):
    """Stretches of a pack, one behind the other: a sample, or a prefix and the rest of each sample that begins so."""

    is_shared: bool
    length: int
    start: int
    stretches: tuple[int, ...]  # their lengths

    def tokens(self, width: int) -> Tensor:
        """The token at each of `width` places, below 0 at padded ones."""
        places = torch.arange(width)
        return torch.where(places < self.length, places + self.start, -1)

    def stretch_of(self, width: int) -> Tensor:
        """Number the stretch of each of `width` places; padded ones belong to the last."""
        ends = torch.tensor(self.stretches).cumsum(0)
        return torch.bucketize(torch.arange(width), ends, right=True).clamp(max=len(ends) - 1)


def _trees(lengths: Sequence[int], parents: Sequence[int] | None) -> list[Tree]:
    """Find the trees of a pack: each stretch without a parent begins one, and its branches follow it."""
    parents = parents or [-1] * len(lengths)
    starts = list(accumulate(lengths, initial=0))
    roots = [number for number, parent in enumerate(parents) if parent < 0]
    trees = []
    for root, after in pairwise([*roots, len(lengths)]):
        assert all(parent == root for parent in parents[root + 1 : after]), "branches follow their prefix"
        stretches = tuple(lengths[root:after])
        trees.append(Tree(after - root > 1, sum(stretches), starts[root], stretches))
    return trees


def _hidden(group: list[Tree], block: slice) -> Tensor:
    """What hides the last keys of a block, from the first that any of its queries does not see: see `Block`."""
    shared = [tree.stretches[0] for tree in group if tree.is_shared]
    if block.stop <= min(shared, default=block.stop):
        return _future(block.stop - block.start)
    places = torch.arange(block.stop)
    queries, keys = places[block], places[min(*shared, block.start) :]
    stretches = torch.stack([tree.stretch_of(block.stop) for tree in group])
    asks, asked = stretches[:, queries, None], stretches[:, None, keys]
    is_seen = (keys <= queries[:, None]) & ((asked == asks) | (asked == 0))
    return torch.zeros(is_seen.shape, dtype=torch.bfloat16).masked_fill_(~is_seen, float("-inf")).unsqueeze(1)


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


def _alike(trees: list[Tree]) -> list[list[Tree]]:
    """Part trees, sorted by kind and length, into groups of one kind and like length."""
    groups: list[list[Tree]] = []
    for tree in trees:
        first = groups[-1][0] if groups else None
        if (
            first is None
            or tree.is_shared != first.is_shared
            or tree.length > WASTE * first.length
            or tree.length * (len(groups[-1]) + 1) > TOGETHER
        ):
            groups.append([])
        groups[-1].append(tree)
    return groups


def _blocks(start: int, stop: int) -> list[slice]:
    size = stop - start if stop - start <= SHORT else BLOCK
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size or 1)]


class PackedProducts(torch.autograd.Function):
    """Attend causally within each stretch of a pack: query (L, heads, d), key and value (L, kv_heads, d) -> as query.

    A stretch with a prefix sees that too. Padding comes last, so causality hides it; its own gradient is zero.
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
        shape = (len(d_query), -1, size)
        d_key, d_value = (
            tensor.to(keys.dtype).index_select(0, layout.to_keys).view(shape) for tensor in (d_keys, d_values)
        )
        return d_query, d_key, d_value, None, None


def _of(block: Block, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take a block's queries (batch, heads/kv_heads * b, d) and the keys and values that it sees (batch, stop, d)."""
    size = queries.shape[-1]
    seen = (tensor[block.keys].view(block.batch, -1, size)[:, : block.stop] for tensor in (keys, values))
    k, v = (tensor.contiguous() for tensor in seen)  # bmm would copy each of them for each product, and turned: slower
    return queries[block.queries].view(block.batch, -1, size), k, v


def _shares(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """Softmax of the scores of a block: (batch, heads/kv_heads * b, stop)."""
    scores = q @ k.transpose(1, 2)
    last = scores.view(len(block.hidden), -1, block.num_queries, block.stop)[..., -block.hidden.shape[-1] :]
    last.add_(block.hidden)  # several times as fast as filling by a mask
    return scores.softmax(-1)


@lru_cache(maxsize=256)
def _future(width: int) -> Tensor:
    """Minus infinity at the keys that come after each query: (1, 1, W, W)."""
    return torch.full((1, 1, width, width), float("-inf"), dtype=torch.bfloat16).triu(1)


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
